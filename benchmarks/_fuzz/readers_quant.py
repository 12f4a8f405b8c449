"""The readers of safetensors files: quantized UNets, scale sets, and those of other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quanttune.quant import (
    QuantizedWeight,
    QuantSpec,
    ScaleSet,
    UNetMetadata,
    load_quantized_unet,
    load_scale_set,
    save_quantized_unet,
    save_scale_set,
    unpack,
)
from quanttune.quant.int8.ranges import ActivationRanges
from quanttune.quant.safe_file import METADATA_KEY, read_header, read_with_strings
from quanttune.quant.tensor_file import open_tensors

from .decode import Stored, Unreadable, safetensors
from .run import Files, Reader
from .scratch import written

UNET, SCALES = "model.safetensors", "scales.safetensors"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_seeds() -> list[Files]:
    """Quantized UNets of a few layers: every width, a split, ranges, floats of each kind."""
    seeds = []
    for bits, ranges in ((4, False), (3, True), (8, False), (2, True)):
        layers = {
            "a.b": QuantizedWeight.quantize(random(6, 8), QuantSpec(bits)),
            "c": QuantizedWeight.quantize(random(4, 6, 3, 3, seed=1), QuantSpec(bits), 4),
        }
        floats = {
            "a.b.bias": random(6),
            "norm": random(5).half(),
            "wide": random(2, 3).bfloat16(),
            "narrow": random(4).to(torch.float8_e5m2),
        }
        found = ActivationRanges({"a.b": torch.tensor([[[-1.0, 2.0]], [[-0.5, 1.0]]])})
        metadata = UNetMetadata(
            "SD15",
            {"model_channels": 32, "channel_mult": [1, 2]},
            "EPS",
            calibration={"steps": 4} if ranges else {},
        )
        seeds.append(
            {
                UNET: written(
                    UNET,
                    lambda path, args=(layers, floats, metadata, found if ranges else None): (
                        save_quantized_unet(path, *args[:3], ranges=args[3])
                    ),
                )
            }
        )
    return seeds


def differing(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> str | None:
    """A name under which two readers found something else, or None."""
    if tensors.keys() != stored.keys():
        return f"other tensors: {sorted(tensors.keys() ^ stored.keys())[:3]}"
    return next(
        (f"{n} is not what the file holds" for n, t in tensors.items() if not stored[n].same(t)),
        None,
    )


def told(data: bytes) -> tuple[dict[str, str], dict[str, Stored]] | str:
    """What an independent reader finds, or a sentence that the file breaks the format's rules."""
    try:
        return safetensors(data)
    except Unreadable as error:
        return f"a file that is none was accepted: {error}"


def finite(stored: Mapping[str, Stored]) -> str | None:
    """A float tensor that holds NaN or an infinity, or None."""
    for name, tensor in stored.items():
        if (
            tensor.dtype.startswith(("F", "B"))
            and tensor.dtype != "BOOL"
            and not bool(np.isfinite(tensor.floats()).all())
        ):
            return f"{name} is not finite"
    return None


def check_unet(files: Files, found: Any) -> str | None:
    """Codes, scales and floats are those of the file, and all of them are sound."""
    decoded = told(files[UNET])
    if isinstance(decoded, str):
        return decoded
    strings, stored = decoded
    tensors = dict(found.floats)
    for name, layer in found.layers.items():
        tensors |= {
            f"{name}.weight": layer.packed,
            f"{name}.weight_scale": layer.scale,
            f"{name}.weight_zero_point": layer.zero_point,
        }
        facts = json.loads(strings[METADATA_KEY])["layers"][name]
        if [facts["bits"], facts["shape"]] != [layer.bits, list(layer.shape)]:
            return f"{name} has another shape than its description"
        codes = unpack(layer.packed, layer.bits, layer.shape[0], math.prod(layer.shape[1:]))
        if not (0 <= int(codes.min()) and int(codes.max()) < 2**layer.bits):
            return f"{name} has integers out of range"
        if not bool((layer.scale > 0).all()):
            return f"{name} has a scale that is not above 0"
    if found.ranges is not None:
        tensors |= {f"{n}.input_range": r for n, r in found.ranges.layers.items()}
    json.dumps(found.metadata.unet_config, allow_nan=False)
    return differing(tensors, stored) or finite(stored)


def scale_seeds() -> list[Files]:
    """Scale sets with and without input scales."""
    shapes = {"a.b": (6, 8), "c": (4, 6)}
    seeds = []
    for experts, with_s_in in ((1, True), (3, True), (2, False)):
        found = ScaleSet.identity(shapes, experts, with_s_in=with_s_in)
        seeds.append({SCALES: written(SCALES, lambda path, s=found: save_scale_set(path, s))})
    return seeds


def check_scales(files: Files, found: ScaleSet) -> str | None:
    """Scales are the file's numbers in float32."""
    decoded = told(files[SCALES])
    if isinstance(decoded, str):
        return decoded
    tensors = {
        f"{n}.{k}": t
        for n, s in found.layers.items()
        for k, t in (("r_out", s.r_out), ("s_in", s.s_in))
        if t is not None
    }
    if tensors.keys() != decoded[1].keys():
        return "other tensors than the file's"
    for name, tensor in tensors.items():
        wanted = decoded[1][name].floats().reshape(decoded[1][name].shape)
        if tensor.shape != wanted.shape or not np.array_equal(tensor.numpy(), wanted):
            return f"{name} is not what the file holds"
    said = json.loads(decoded[0][METADATA_KEY])
    if found.num_experts != said["num_experts"] or found.num_timesteps != said["num_timesteps"]:
        return "another number of experts or timesteps"
    return finite(decoded[1])


def plain_seeds() -> list[Files]:
    """Safetensors files of other programs, every type."""
    from safetensors.torch import save

    tensors = {
        str(dtype).removeprefix("torch."): random(3, 4).to(dtype)
        for dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5)}
    return [
        {"a.safetensors": save(tensors, {"format": "pt", "note": '{"a": [1, 2]}'})},
        {"a.safetensors": save({"one": random(7)})},
    ]


def read_plain(folder: Path, target: str) -> Any:
    """The same file by both readers, and its header alone."""
    path = folder / target
    try:
        strings, tensors = read_with_strings(path)
    except Exception:
        # Whatever the one refuses the other has to refuse, or to read rightly.
        file = open_tensors(path)
        return {}, None, {n: file.read(n) for n in file.shapes}, {}, {}
    file = open_tensors(path)
    read = {n: file.read(n) for n in file.shapes}
    return strings, tensors, read, {n: file.view(n) for n in file.shapes}, read_header(path)[1]


def check_plain(files: Files, found: Any) -> str | None:
    """Both readers give what the file holds."""
    decoded = told(files["a.safetensors"])
    if isinstance(decoded, str):
        return decoded
    strings, tensors, read, view, shapes = found
    if tensors is None:  # such as for half a character in what no reader looks at
        return differing(read, decoded[1])
    if strings != decoded[0] or shapes != {n: s.shape for n, s in decoded[1].items()}:
        return "other metadata or shapes"
    return next((wrong for t in (tensors, read, view) if (wrong := differing(t, decoded[1]))), None)


def readers() -> list[Reader]:
    """All of this file."""
    return [
        Reader(
            "quantized UNet",
            unet_seeds,
            lambda f, t: load_quantized_unet(f / t),
            check_unet,
            share=22,
        ),
        Reader(
            "scale set", scale_seeds, lambda f, t: load_scale_set(f / t), check_scales, share=24
        ),
        Reader("safetensors", plain_seeds, read_plain, check_plain, share=20),
    ]
