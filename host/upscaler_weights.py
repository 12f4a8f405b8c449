"""The parts of a diffusers folder, read whole: what is missing of one is told in one sentence."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.safe_file import is_cut_short, read_header, read_with_strings
from .lora_keys import brief

MODEL = "stabilityai/stable-diffusion-x4-upscaler"
"""Where a folder of the upscaler comes from; it is named in messages, never fetched."""
STEMS = {"unet": ("diffusion_pytorch_model",), "vae": ("diffusion_pytorch_model",),
         "text_encoder": ("model", "pytorch_model")}
"""Part of a pipeline to how its savers name the weights."""
VARIANTS = {"": 0, "fp16": 1, "bf16": 2}
"""Which of several precisions is taken first; training's other copies come last."""
UNFINISHED = (".incomplete", ".part", ".crdownload", ".download")
"""How programs name what they have not downloaded to its end."""
LFS = b"version https://git-lfs"
"""How the little file begins that Git leaves in place of a large one it did not fetch."""
MOST_SHARDS = 1000


def read_json(folder: Path, name: str) -> dict:
    """One of the folder's JSON files.

    Raises:
        QuantTuneError: it is missing, or no JSON object.
    """
    path = folder / name
    if what := fault(path):
        raise unfinished(folder, f"{name} {what}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unfinished(folder, f"{name} cannot be read ({brief(error)})") from error
    if not isinstance(value, dict):
        raise unfinished(folder, f"{name} holds no settings")
    return value


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a part, by the names they have there.

    Those of safetensors files are views of the mapped files.

    Args:
        folder: of the pipeline.
        part: a key of `STEMS`.

    Raises:
        QuantTuneError: no weights, or a file of them that is missing, damaged or cut short.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(folder, part):
        if path.suffix == ".safetensors":
            state |= read_with_strings(path)[1]
        else:
            state |= _read_bin(path)
    return state


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files that hold a part's weights: one, or several shards.

    Of several forms the first that is whole is taken: safetensors before .bin, full precision
    before half.

    Raises:
        QuantTuneError: as `read_weights`, as far as sizes and first bytes tell.
    """
    troubles = []
    for choice in _choices(folder, part):
        files, trouble = _shards(choice) if choice.suffix == ".json" else ([choice], None)
        for path in () if trouble else files:
            if what := fault(path):
                trouble = f"{part}/{path.name} {what}"
                break
        if trouble is None:
            return files
        troubles.append(trouble)
    missing = f"{part}/{STEMS[part][0]}.safetensors is missing"
    raise unfinished(folder, troubles[0] if troubles else missing)


def fault(path: Path) -> str | None:
    """What is wrong with a file as far as its size and first bytes tell, or None."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not start:
        return "is empty"
    if start == LFS:
        return "is a Git LFS pointer in place of the file ('git lfs pull' fetches it)"
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except QuantTuneError:
            return "is damaged or cut short"
        return "is cut short" if is_cut_short(path) else None
    cut = path.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(path)
    return "is cut short" if cut else None


def unfinished(folder: Path, what: str) -> QuantTuneError:
    """The error for a folder that is not whole; ``what`` begins with the file's name."""
    left = _left_over(folder)
    seen = f" (a download stopped at {left})" if left else ""
    return QuantTuneError(f"The upscaler folder {folder} is not whole: {what}{seen}; download "
                          f"{MODEL} into this folder again.")


def _left_over(folder: Path) -> str:
    """The name of a file whose download was not finished, or nothing."""
    # A snapshot in Hugging Face's cache keeps its files two folders up.
    for root in (folder, folder.parent.parent / "blobs"):
        for path in root.rglob("*") if root.is_dir() else ():
            if path.name.endswith(UNFINISHED):
                return path.name
    return ""


def _choices(folder: Path, part: str) -> list[Path]:
    """Files and shard indices that may be a part's weights, the best first."""
    found = []
    for order, stem in enumerate(STEMS[part]):
        one = re.compile(rf"{stem}(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
        index = re.compile(rf"{stem}(?:\.(?P<v>\w+))?\.(?P<kind>safetensors|bin)\.index"
                           r"(?:\.(?P<variant>\w+))?\.json")
        try:
            names = sorted(path.name for path in (folder / part).iterdir())
        except OSError:
            names = []
        for name in names:
            match = one.fullmatch(name) or index.fullmatch(name)
            if match:
                facts = match.groupdict()
                variant = facts["variant"] or facts.get("v") or ""
                found.append((facts["kind"] == "bin", VARIANTS.get(variant, len(VARIANTS)),
                              name.endswith(".json"), order, name))
    return [folder / part / entry[-1] for entry in sorted(found)]


def _shards(index: Path) -> tuple[list[Path], str | None]:
    """The files that an index names, or what is wrong with it."""
    where = f"{index.parent.name}/{index.name}"
    if what := fault(index):
        return [], f"{where} {what}"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name and Path(name).suffix in (".safetensors", ".bin")
                    for name in names)
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        names, plain = [], False
    if not names or not plain or len(names) > MOST_SHARDS:
        return [], f"{where} does not list the files of the weights"
    return [index.with_name(name) for name in names], None


def _read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, of which nothing but tensors is read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises is not documented
        raise QuantTuneError(
            f"The file {path} is damaged or holds more than weights ({brief(error, 80)}); "
            "download it again, or its .safetensors form.") from error
    if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise QuantTuneError(f"The file {path} holds something else than the weights of a model; "
                             "download it again, or its .safetensors form.")
    return state
