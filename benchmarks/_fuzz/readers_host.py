"""The readers of UNets that need the host: folders and files of other programs, MODELs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import archives
from .decode import Unreadable, pickled, safetensors
from .readers_quant import finite
from .run import Files, Reader
from .scratch import folder_files, written

WEIGHTS = "diffusion_pytorch_model.safetensors"


def settled(read):
    """A reader as the host's executor runs it."""

    def run(folder: Path, target: str) -> Any:
        with torch.inference_mode():
            return read(folder, target)

    return run


@lru_cache(maxsize=1)
def pipeline() -> Files:
    """A tiny SD1 pipeline's folder as diffusers saves it."""
    from quanttune.tests.host import unets

    return folder_files(lambda path: unets.save_pipeline(unets.tiny_unet(), path / "sd"))


@lru_cache(maxsize=1)
def host_state() -> dict[str, Tensor]:
    """The tensors of the same UNet by the host's names."""
    from quanttune.host.unet_source import open_unet

    found: dict[str, Tensor] = {}

    def read(path: Path) -> None:
        for name, content in pipeline().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        source = open_unet(path / "sd")
        found.update({n: source.read(n) for n in source.shapes})

    folder_files(read)
    return found


def sharded(kind: str = "safetensors") -> Files:
    """The folder with its weights in two files of a kind ("safetensors", "bin") and an index."""
    saver = stored_file if kind == "safetensors" else archives.saved
    files = dict(pipeline())
    tensors = {n: _tensor(s) for n, s in safetensors(files.pop(f"sd/unet/{WEIGHTS}"))[1].items()}
    names = sorted(tensors)
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.{kind}"
        files[f"sd/unet/{file}"] = saver({n: tensors[n] for n in part})
        index["weight_map"] |= dict.fromkeys(part, file)
    name = f"diffusion_pytorch_model.{kind}.index.json"
    files[f"sd/unet/{name}"] = json.dumps(index).encode()
    return files


def _tensor(stored) -> Tensor:
    return torch.from_numpy(stored.floats().astype(np.float32)).reshape(stored.shape)


def stored_file(tensors: Mapping[str, Tensor], strings: dict | None = None) -> bytes:
    """A safetensors file of tensors."""
    from safetensors.torch import save

    return save({n: t.contiguous().clone() for n, t in tensors.items()}, strings)


def sums(tensors: Iterable[Tensor]) -> list[int]:
    """Checksums of the tensors' float32 values, sorted: what was read, whatever it is called."""
    return sorted(zlib.crc32(t.float().contiguous().numpy().tobytes()) for t in tensors)


def stored_sums(files: Files, names: Iterable[str]) -> list[int] | str:
    """The same of files, or a sentence that one of them is none."""
    found = []
    for name in names:
        try:
            if name.endswith(".safetensors"):
                _, stored = safetensors(files[name])
                if wrong := finite(stored):
                    return wrong
                found += [_tensor(s) for s in stored.values()]
            else:
                state = pickled(files[name])
                state = state.get("state_dict", state)
                found += [t for t in state.values() if isinstance(t, Tensor)]
        except Unreadable as error:
            return f"a file that is none was accepted: {error}"
    return sums(found)


def read_unet(folder: Path, target: str) -> dict[str, Tensor]:
    """What *Load Diffusers UNet* reads, layer by layer, of a folder or a file."""
    from quanttune.host.load_unet import plan_quantization
    from quanttune.host.unet_source import open_unet
    from quanttune.quant import QuantSpec

    path = folder / "sd" if target.startswith("sd/") else folder / target
    plan = plan_quantization(open_unet(path), QuantSpec(8))
    return {n: plan.source.read(n) for n in plan.source.shapes}


def check_folder(files: Files, found: dict[str, Tensor]) -> str | None:
    """The numbers of the folder's weight files, all of them."""
    names = [n for n in files if n.endswith((".safetensors", ".bin", ".pt", ".ckpt"))]
    index = next((n for n in files if n.endswith(".index.json")), None)
    if index is not None:
        listed = set(json.loads(files[index])["weight_map"].values())
        names = [n for n in names if Path(n).name in listed]
    wanted = stored_sums(files, names)
    if isinstance(wanted, str):
        return wanted
    if not all(bool(t.isfinite().all()) for t in found.values()):
        return "something is not finite"
    return None if sums(found.values()) == wanted else "other numbers than the files hold"


def file_seeds() -> list[Files]:
    """Checkpoints in the host's names, with a prefix, in half precision, pickled."""
    state = host_state()
    prefixed = {f"model.diffusion_model.{n}": t for n, t in state.items()}
    half = {n: t.half().float() for n, t in prefixed.items()}
    return [
        {"a.safetensors": stored_file(state)},
        {"a.safetensors": stored_file({n: t.half() for n, t in half.items()}, {"format": "pt"})},
        {"a.ckpt": archives.saved({"state_dict": prefixed, "global_step": 1})},
    ]


def fp8_seeds() -> list[Files]:
    """A checkpoint with fp8 weights and their scales."""
    state = {f"model.diffusion_model.{n}": t for n, t in host_state().items()}
    tensors = {}
    for name, value in state.items():
        if value.dim() == 2 and name.endswith(".weight"):
            tensors[name] = value.to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
        else:
            tensors[name] = value
    tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return [{"a.safetensors": stored_file(tensors)}]


def check_finite(files: Files, found: Any) -> str | None:
    """Whatever was read is finite, and the file is one."""
    try:
        safetensors(next(v for n, v in files.items() if n.endswith(".safetensors")))
    except Unreadable as error:
        return f"a file that is none was accepted: {error}"
    return None if all(bool(t.isfinite().all()) for t in found.values()) else "not finite"


def stock_seeds() -> list[Files]:
    """ComfyUI's own INT8 form of the smallest UNet that its detection knows."""
    import comfy.supported_models

    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "channel_mult": [1],
            "num_res_blocks": [1],
            "context_dim": 768,
            "transformer_depth": [1],
            "transformer_depth_output": [1, 1],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "legacy": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
    )
    skeleton = config.get_model({}, "", device="meta").diffusion_model
    tensors = {}
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    for name, value in skeleton.state_dict().items():
        name = f"model.diffusion_model.{name}"
        if value.dim() == 2 and name.endswith(".weight"):
            tensors[name] = torch.ones(value.shape, dtype=torch.int8)
            tensors[f"{name}_scale"] = torch.tensor(0.01)
            tensors[name.replace(".weight", ".comfy_quant")] = mark
        else:
            tensors[name] = torch.zeros(value.shape, dtype=torch.half)
    return [{"a.safetensors": stored_file(tensors)}]


def bnb_seeds() -> list[Files]:
    """bitsandbytes' LLM.int8 form, with the config of diffusers, and its 4-bit form."""
    import bitsandbytes.functional as functional

    unet = {n: _tensor(s) for n, s in safetensors(pipeline()[f"sd/unet/{WEIGHTS}"])[1].items()}
    int8, four = {}, {}
    for name, value in unet.items():
        if value.dim() == 2 and name.endswith(".weight"):
            scale = value.abs().amax(1)
            int8[name] = (value / scale[:, None] * 127).round().to(torch.int8)
            int8[name.replace(".weight", ".SCB")] = scale
            packed, state = functional.quantize_4bit(value, blocksize=64, quant_type="nf4")
            four[name] = packed
            four |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        else:
            int8[name] = four[name] = value
    config = pipeline()["sd/unet/config.json"]
    return [
        {"a.safetensors": stored_file(tensors), "config.json": config} for tensors in (int8, four)
    ]


def checkpoint_tensors(found: Any) -> dict[str, Tensor]:
    """Floats and scales of what was read."""
    tensors = dict(found.floats)
    for name, layer in found.layers.items():
        tensors[f"{name} scale"] = getattr(layer, "scale", None)
        if tensors[f"{name} scale"] is None:
            tensors[f"{name} scale"] = layer.absmax
    return tensors


def read_stock_file(folder: Path, target: str) -> dict[str, Tensor]:
    """As *Load Quantized UNet* begins."""
    from quanttune.host.stock_int8 import read_stock
    from quanttune.quant import load_quantized_unet

    path = str(folder / target)
    return checkpoint_tensors(read_stock(path) or load_quantized_unet(path))


def read_bnb_file(folder: Path, target: str) -> dict[str, Tensor]:
    """As *Load Quantized UNet* begins."""
    from quanttune.host.bnb_file import is_bnb_file, read_bnb
    from quanttune.quant import load_quantized_unet

    path = str(folder / "a.safetensors")
    return checkpoint_tensors(read_bnb(path) if is_bnb_file(path) else load_quantized_unet(path))


def built_seeds() -> list[Files]:
    """A quantized UNet of ours of every layer of a tiny model."""
    from quanttune.quant import save_quantized_unet
    from quanttune.tests.host import models

    with torch.inference_mode():
        quantized, _ = models.quantize(models.small_model(), 4)
        checkpoint = models.quantized_model(quantized).checkpoint
        return [
            {
                "a.safetensors": written(
                    "a.safetensors",
                    lambda path: save_quantized_unet(
                        path, checkpoint.layers, checkpoint.floats, checkpoint.metadata
                    ),
                )
            }
        ]


def read_model(folder: Path, target: str) -> dict[str, Tensor]:
    """*Load Quantized UNet*, to the MODEL."""
    from quanttune.host.build import load_model, quantized_model

    return checkpoint_tensors(quantized_model(load_model(str(folder / target), target)).checkpoint)


def json_files(name: str) -> bool:
    """Settings alone."""
    return name.endswith(".json")


def readers() -> list[Reader]:
    """All of this file."""
    return [
        Reader(
            "UNet folder",
            lambda: [pipeline(), sharded(), sharded("bin")],
            settled(read_unet),
            check_folder,
            share=0.06,
        ),
        Reader(
            "UNet folder, JSON",
            lambda: [pipeline(), sharded()],
            settled(read_unet),
            check_folder,
            json_files,
            share=0.1,
        ),
        Reader("UNet file", file_seeds, settled(read_unet), check_folder, share=0.1),
        Reader("fp8 file", fp8_seeds, settled(read_unet), check_finite, share=0.06),
        Reader(
            "ComfyUI INT8 file", stock_seeds, settled(read_stock_file), check_finite, share=0.04
        ),
        Reader("bitsandbytes file", bnb_seeds, settled(read_bnb_file), check_finite, share=0.2),
        Reader(
            "quantized UNet to MODEL", built_seeds, settled(read_model), check_finite, share=0.15
        ),
    ]
