"""The readers of pictures and their captions, of datasets, configurations and measurements."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import archives
from .decode import pickled
from .run import Files, Reader
from .scratch import folder_files

NAMES = ("a.png", "b.jpg", "c.webp", "d.bmp")
PICTURES = 512 * 2**20
"""Bytes: a picture of the most pixels that are read, as Pillow holds it."""


def picture(name: str, shade: int = 0) -> bytes:
    """A small picture of the kind that its name says."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = (np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3) * 7 + shade) % 256
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF"}
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kinds[name.rpartition(".")[2]])
    return buffer.getvalue()


def picture_seeds() -> list[Files]:
    """Pictures of every kind that is read; two of kinds that pretend to be another."""
    from PIL import Image

    grey, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 9).astype(np.uint16)).save(grey, "PNG")
    Image.new("RGBA", (32, 32), (9, 8, 7, 100)).save(clear, "PNG")
    return [
        *({n: picture(n)} for n in NAMES),
        {"a.png": grey.getvalue()},
        {"a.png": clear.getvalue()},
        {"a.png": picture("x.gif")},
        {"a.png": picture("x.tif")},
    ]


def read_pictures(folder: Path, target: str) -> Any:
    """*Training Images* on a folder of pictures."""
    from quanttune.host.images import read_folder

    return read_folder(str(folder), "none", resolution=64)


def check_pictures(files: Files, found: Any) -> str | None:
    """Squares of numbers from 0 to 1, with a caption for each."""
    for image in found.images.images:
        if tuple(image.shape) != (64, 64, 3) or image.dtype != torch.float32:
            return f"a picture of shape {list(image.shape)}"
        if not bool(((image >= 0) & (image <= 1)).all()):
            return "a picture with numbers outside of 0 to 1"
    if len(found.images.captions) != len(found.images.images):
        return "another number of captions than of pictures"
    long = [w for w in found.warnings if len(w) > 1500 or "\n" in w]
    return f"a warning that is no sentence: {long[0][:200]!r}" if long else None


def caption_seeds(kind: str) -> list[Files]:
    """Pictures with a list of their captions."""
    pictures = {n: picture(n, i) for i, n in enumerate(NAMES[:2])}
    rows = [{"file_name": n, "text": f"a thing no. {i}"} for i, n in enumerate(pictures)]
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, rows)).encode()
        return [{**pictures, "metadata.jsonl": text}]
    if kind == "csv":
        text = "file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows)
        return [{**pictures, "metadata.csv": text.encode()}]
    if kind == "txt":
        return [
            {**pictures, "a.txt": b"a red thing\nin the sun", "b.txt": "ein Ding, groß".encode()}
        ]
    return [{**pictures, "metadata.parquet": _parquet(rows)}]


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def read_captions(folder: Path, target: str) -> Any:
    """*Training Images* with a list, or with text files."""
    from quanttune.host.images import folder_state, read_folder

    kind = "text files" if target.endswith(".txt") else "metadata.jsonl"
    folder_state(str(folder), kind)
    return read_folder(str(folder), kind, phrase="a phrase", resolution=64)


def check_captions(files: Files, found: Any) -> str | None:
    """As `check_pictures`; captions are one line each."""
    for caption in found.images.captions:
        if not isinstance(caption, str) or "\n" in caption:
            return f"a caption {caption!r:.100}"
    return check_pictures(files, found)


def dataset_seeds(kind: str) -> list[Files]:
    """Hugging Face datasets: Arrow as they are saved to disk, Parquet as on the Hub."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table(
        {
            "image": [{"bytes": picture(n, 3), "path": n} for n in NAMES[:2]],
            "text": ["one", "two"],
            "more": [[1, 2], [3]],
        }
    )
    if kind == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(rows, buffer)
        plain = pyarrow.table({"image": [picture("a.png")], "text": ["x"]})
        other = io.BytesIO()
        pyarrow.parquet.write_table(plain, other, compression="none", use_dictionary=False)
        return [{"data/train-00000.parquet": buffer.getvalue()}, {"x.parquet": other.getvalue()}]
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, 1)
    stream = sink.getvalue().to_pybytes()
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, 1)
    state = json.dumps({"_data_files": [{"filename": "d.arrow"}], "_split": None}).encode()
    return [
        {"state.json": state, "d.arrow": stream},
        {
            "dataset_dict.json": b'{"splits": ["train"]}',
            "train/state.json": state,
            "train/d.arrow": stream,
        },
        {"d.arrow": sink.getvalue().to_pybytes()},
    ]


def read_dataset(folder: Path, target: str) -> Any:
    """*Training Images* on a dataset."""
    from quanttune.host.images import folder_state, read_folder

    folder_state(str(folder), "dataset column")
    return read_folder(str(folder), "dataset column", resolution=64, phrase="x")


CONFIG = b"""[base]
starter = true
bits = 4
device = "cpu"

[images]
folder = "images"
captions = "text files"
resolution = 128

[training]
steps = 20
learning_rate = 0.001
num_experts = 4

[output]
folder = "out"
trackers = ["tensorboard"]
"""


def read_configuration(folder: Path, target: str) -> Any:
    """The first part of ``python -m quanttune train-scales``."""
    from quanttune.host.command import read_config
    from quanttune.host.command_checks import check_base
    from quanttune.training.config import ScaleTraining

    config = read_config(folder / target)
    check_base(folder / target, config["base"], scales=True)
    return config, ScaleTraining.from_dict(config.get("training", {}))


def check_configuration(files: Files, found: Any) -> str | None:
    """What Python's own reader finds."""
    import tomllib

    lines = io.StringIO(next(iter(files.values())).decode("utf-8"), newline=None)
    wanted = tomllib.loads(lines.read())
    config = {**found[0], "images": wanted.get("images")}
    return None if repr(config) == repr({**wanted}) or config == wanted else "other settings"


def read_prompt_file(folder: Path, target: str) -> Any:
    """Prompts of ``python -m quanttune report``."""
    from quanttune.host.report_command import read_prompts

    return read_prompts(str(folder / target))


def sensitivity_seeds() -> list[Files]:
    """What *Layer Sensitivity* measured, as benchmarks keep it."""
    from quanttune.metrics.sensitivity import Sensitivity

    found = Sensitivity(
        {"a": ("a",), "b": ("b.0", "b.1")},
        {"a": (4, 6), "b.0": (3, 4, 3, 3), "b.1": (3, 4)},
        {"a": 2},
        ("8", "4"),
        torch.rand(2, 2, 3, dtype=torch.float64),
        (4, 0, 2),
    )
    return [{"s.json": found.to_json().encode()}]


def read_sensitivity(folder: Path, target: str) -> Any:
    """The same, and a plan from it."""
    from quanttune.metrics.sensitivity import Sensitivity

    found = Sensitivity.from_json(
        (folder / target).read_text("utf-8", "replace"), f"The file {target}"
    )
    return found, found.mean(), found.report()


def check_sensitivity(files: Files, found: Any) -> str | None:
    """Errors are finite numbers of the shape that units and precisions have."""
    sensitivity, mean, _ = found
    shape = (len(sensitivity.units), len(sensitivity.precisions))
    return None if tuple(mean.shape) == shape and bool(mean.isfinite().all()) else "odd errors"


def lpips_seeds() -> list[Files]:
    """SqueezeNet's shapes as torchvision names them, all zeros."""
    from torchvision.models import squeezenet1_1

    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in squeezenet1_1().state_dict().items() if k.startswith("features")
        }
    state = {k: torch.zeros(s) for k, s in shapes.items()}
    from safetensors.torch import save

    return [{"squeeze.safetensors": save(state)}, {"squeeze.pth": archives.saved(state)}]


def read_lpips(folder: Path, target: str) -> Any:
    """*Compare Images*' network."""
    from quanttune.metrics.similarity import load_perceptual_network

    return dict(load_perceptual_network(folder / target).module.net.state_dict())


def check_lpips(files: Files, found: Any) -> str | None:
    """All weights are finite."""
    return None if all(bool(t.isfinite().all()) for t in found.values()) else "not finite"


def state_seeds() -> list[Files]:
    """The state of a training that was stopped."""
    from quanttune.tests.training.toy import trainer

    return [
        {
            "checkpoint.pt": folder_files(
                lambda path: trainer(path, steps=8, num_experts=2, save_every=1).run()
            )["checkpoint.pt"]
        }
    ]


def read_state(folder: Path, target: str) -> Any:
    """*Train Scales* going on from a state."""
    from quanttune.tests.training.toy import trainer

    return trainer(folder, steps=8, num_experts=2, save_every=1)


def check_state(files: Files, found: Any) -> str | None:
    """The scales are the state's, and finite."""
    state = pickled(files["checkpoint.pt"])
    for parameter, value in zip(found.scales.parameters(), state["scales"], strict=True):
        if not torch.equal(parameter.detach(), value):
            return "other scales than the state's"
        if not bool(value.isfinite().all()):
            return "scales that are not finite"
    for optimizer in found.optimizers:
        for entry in optimizer.state_dict()["state"].values():
            if not all(
                bool(v.isfinite().all()) for v in entry.values() if isinstance(v, torch.Tensor)
            ):
                return "moments that are not finite"
    return None if found.step == state["step"] == len(found.history) else "another step"


def lists(name: str) -> bool:
    """A list of captions."""
    return name.startswith("metadata")


def texts(name: str) -> bool:
    """A caption."""
    return name.endswith(".txt")


def readers() -> list[Reader]:
    """All of this file."""
    return [
        Reader(
            "training pictures",
            picture_seeds,
            read_pictures,
            check_pictures,
            memory=PICTURES,
            share=0.4,
        ),
        *(
            Reader(
                f"captions, {k}",
                lambda k=k: caption_seeds(k),
                read_captions,
                check_captions,
                texts if k == "txt" else lists,
                share=s,
            )
            for k, s in (("jsonl", 2), ("csv", 2), ("txt", 1), ("parquet", 1))
        ),
        *(
            Reader(
                f"dataset, {k}",
                lambda k=k: dataset_seeds(k),
                read_dataset,
                check_captions,
                share=s,
                memory=PICTURES,
            )
            for k, s in (("arrow", 1), ("parquet", 1))
        ),
        Reader(
            "configuration",
            lambda: [{"c.toml": CONFIG}],
            read_configuration,
            check_configuration,
            inputs=("The setting ", "experts", "There is no setting"),
            share=12,
        ),
        Reader(
            "prompts",
            lambda: [{"p.txt": b"a fox\n\na city at night\n"}],
            read_prompt_file,
            lambda f, found: None if all(p.strip() for p in found) else "an empty prompt",
            share=2,
        ),
        Reader("sensitivity", sensitivity_seeds, read_sensitivity, check_sensitivity, share=2),
        Reader("LPIPS backbone", lpips_seeds, read_lpips, check_lpips, share=0.06),
        Reader("training state", state_seeds, read_state, check_state, share=1),
    ]
