"""The file format of a scale set (``docs/formats.md``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from .errors import QuantTuneError
from .safe_file import read_safetensors
from .scales import LayerScales, ScaleMetadata, ScaleSet
from .whole_file import write_safetensors

SCALES_FORMAT = "quanttune.scales"
SCALES_FORMAT_VERSION = 1
AGAIN = "train or download the scale file again"


def save_scale_set(
    path: str | os.PathLike[str], scale_set: ScaleSet, overwrite: bool = True
) -> None:
    """Write a scale set as float32, completely or not at all.

    Raises:
        QuantTuneError: no layers, NaN values, or a file that cannot be written.
    """
    if not scale_set.layers:
        raise QuantTuneError(
            f"The scale set for {os.fspath(path)} has no layers; train it before saving."
        )
    # The values may have changed since the set was built: its tensors are a trainer's parameters.
    ScaleSet(scale_set.layers, scale_set.num_experts, scale_set.num_timesteps)
    tensors = {}
    for name, scales in scale_set.layers.items():
        tensors[f"{name}.r_out"] = scales.r_out.detach().to(torch.float32)
        if scales.s_in is not None:
            tensors[f"{name}.s_in"] = scales.s_in.detach().to(torch.float32)
    facts = asdict(scale_set.metadata)
    metadata = {
        "format": SCALES_FORMAT,
        "format_version": SCALES_FORMAT_VERSION,
        "num_experts": scale_set.num_experts,
        "num_timesteps": scale_set.num_timesteps,
        **facts,
    }
    write_safetensors(path, tensors, metadata, overwrite)


def load_scale_set(path: str | os.PathLike[str]) -> ScaleSet:
    """Read a scale set file and check it.

    Raises:
        QuantTuneError: the file is missing, damaged, of another kind or version, or holds values
            that are not finite or shapes that do not fit its number of experts.
    """
    path = os.fspath(path)
    header, tensors = read_safetensors(path)
    _check_kind(path, header)
    facts = _scale_metadata(path, header)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if not name or kind not in ("r_out", "s_in"):
            raise QuantTuneError(f"The file {path} holds a tensor {key} that is no scale; {AGAIN}.")
        pairs.setdefault(name, {})[kind] = tensor
    if not pairs:
        raise QuantTuneError(f"The file {path} holds no scales; {AGAIN}.")
    for name, pair in pairs.items():
        if "r_out" not in pair:
            raise QuantTuneError(f"The file {path} lacks the scales {name}.r_out; {AGAIN}.")
        for kind, tensor in pair.items():
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise QuantTuneError(
                    f"The file {path} holds {name}.{kind} as {tensor.dtype}, not float; {AGAIN}."
                )
    try:
        # Copied: they are small, and a mapped file could not be replaced on Windows.
        copies = {
            name: {kind: t.to(torch.float32, copy=True) for kind, t in pair.items()}
            for name, pair in pairs.items()
        }
        layers = {n: LayerScales(pair["r_out"], pair.get("s_in")) for n, pair in copies.items()}
        return ScaleSet(layers, header["num_experts"], header["num_timesteps"], facts)
    except QuantTuneError as error:
        text = str(error)
        cure = "" if ";" in text else f"; {AGAIN}"
        message = f"In the file {path}: {text[0].lower()}{text[1:-1]}{cure}."
        raise QuantTuneError(message) from None


def _check_kind(path: str, header: Mapping[str, Any] | None) -> None:
    if header is None:
        raise QuantTuneError(
            f"The file {path} is not a scale set: it has no QuantTune metadata; "
            "choose a file that was saved by Save TuneQDM Scales."
        )
    if header.get("format") != SCALES_FORMAT:
        hint = "use Load Quantized UNet" if header.get("format") == "quanttune.unet" else ""
        raise QuantTuneError(
            f"The file {path} is not a scale set but says it is {header.get('format')!r}; "
            f"{hint or 'choose another file'}."
        )
    version = header.get("format_version")
    if version != SCALES_FORMAT_VERSION:
        raise QuantTuneError(
            f"The file {path} has format version {version!r} and this program reads version "
            f"{SCALES_FORMAT_VERSION}; update ComfyUI-QuantTune."
        )
    for key in ("num_experts", "num_timesteps"):
        if key not in header:
            raise QuantTuneError(f"The file {path} has no {key} in its metadata; {AGAIN}.")


def _scale_metadata(path: str, header: Mapping[str, Any]) -> ScaleMetadata:
    values = {}
    for key, default in asdict(ScaleMetadata()).items():
        value = header.get(key, default)
        if type(value) is not type(default):
            raise QuantTuneError(f"The file {path} has no valid {key} in its metadata; {AGAIN}.")
        values[key] = value
    return ScaleMetadata(**values)
