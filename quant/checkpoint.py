"""The file format of a quantized UNet (``docs/formats.md``)."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import QuantTuneError
from .fingerprint import fingerprint
from .int8.ranges import ActivationRanges
from .limits import is_finite, is_whole
from .mapped_file import MappedFile
from .packing import packed_shape
from .safe_file import DTYPE_NAMES, read_safetensors
from .spec import SUPPORTED_BITS
from .unet_metadata import (
    AGAIN,
    CALIBRATED_VERSION,
    UNetMetadata,
    complete_metadata,
    layer_facts,
    read_metadata,
)
from .weight import QuantizedWeight, check_split
from .whole_file import write_safetensors

RANGES = "input_range"
SUFFIXES = ("weight", "weight_scale", "weight_zero_point")


@dataclass
class QuantizedCheckpoint:
    """A loaded quantized UNet; the tensors are views of the mapped file.

    Attributes:
        metadata: `UNetMetadata`.
        layers: layer name to `QuantizedWeight`.
        floats: tensor name (relative to the UNet) to float tensor.
        ranges: static activation ranges from a calibration, or None.
        source: the file that the tensors are views of, or None.
    """

    metadata: UNetMetadata
    layers: dict[str, QuantizedWeight]
    floats: dict[str, Tensor]
    ranges: ActivationRanges | None = None
    source: MappedFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weights and floats."""
        floats = sum(t.numel() * t.element_size() for t in self.floats.values())
        return floats + sum(layer.nbytes for layer in self.layers.values())


def save_quantized_unet(
    path: str | os.PathLike[str],
    layers: Mapping[str, QuantizedWeight],
    floats: Mapping[str, Tensor],
    metadata: UNetMetadata,
    overwrite: bool = True,
    ranges: ActivationRanges | None = None,
) -> UNetMetadata:
    """Write a quantized UNet, completely or not at all.

    Args:
        path: target file.
        layers: layer name, relative to the UNet, to its quantized weight, or to one that is
            computed when it is written (`qdiffusion.QDiffusionLayer`).
        floats: every other tensor of the UNet (biases, norms, layers kept in float) by name.
        metadata: `UNetMetadata`; what it says of layers and floats is replaced by what is saved.
        overwrite: False refuses to replace an existing file.
        ranges: static activation ranges, or None.

    Returns:
        The metadata as written.

    Raises:
        QuantTuneError: nothing to save, a name used twice, metadata that is not JSON, or a file
            that cannot be written.
    """
    if not layers:
        raise QuantTuneError(
            f"There are no quantized layers to save to {os.fspath(path)}; "
            "run the model through Quantize UNet first."
        )
    tensors = dict(floats)
    for name, layer in layers.items():
        for suffix, tensor in zip(SUFFIXES, (layer.stored(), layer.scale, layer.zero_point)):
            key = f"{name}.{suffix}"
            if key in tensors:
                raise QuantTuneError(
                    f"The tensor {key} is both quantized and float; leave one of them out."
                )
            tensors[key] = tensor
    if ranges is not None:
        tensors |= {f"{name}.{RANGES}": r.contiguous() for name, r in ranges.layers.items()}
    facts = {name: layer_facts(w.shape, w.bits, w.symmetric, w.split) for name, w in layers.items()}
    mark = metadata.fingerprint or fingerprint(layers)
    metadata, described = complete_metadata(metadata, facts, floats, mark, ranges is not None)
    write_safetensors(path, tensors, described, overwrite)
    return metadata


def load_quantized_unet(
    path: str | os.PathLike[str], families: Collection[str] | None = None
) -> QuantizedCheckpoint:
    """Map a quantized UNet file and check it.

    Args:
        path: file written by `save_quantized_unet`.
        families: names of the model families that the caller can build, or None for any.

    Raises:
        QuantTuneError: the file is missing, damaged, of another kind, version or family, or its
            tensors do not match its metadata.
    """
    path = os.fspath(path)
    source = MappedFile.of(path) if os.path.isfile(path) else None
    header, tensors = read_safetensors(path)
    metadata = read_metadata(path, header, families)
    layers = {
        name: _read_layer(path, name, facts, tensors) for name, facts in metadata.layers.items()
    }
    missing = [name for name in metadata.floats if name not in tensors]
    if missing:
        raise QuantTuneError(
            f"The file {path} lacks the tensor {missing[0]} that it lists; {AGAIN}."
        )
    floats = {name: tensors.pop(name) for name in metadata.floats}
    ranges = _read_ranges(path, metadata, layers, tensors)
    if tensors:
        extra = next(iter(tensors))
        raise QuantTuneError(
            f"The file {path} holds a tensor {extra} that its metadata does not list; {AGAIN}."
        )
    for name, tensor in floats.items():
        check_float(path, name, tensor)
    return QuantizedCheckpoint(metadata, layers, floats, ranges, source)


def _read_ranges(path, metadata, layers, tensors) -> ActivationRanges | None:
    """Take the activation ranges out of ``tensors``."""
    if metadata.format_version != CALIBRATED_VERSION:
        return None
    found = {}
    for name, weight in layers.items():
        ranges = tensors.pop(f"{name}.{RANGES}", None)
        if ranges is None:
            continue
        if ranges.dim() != 3 or ranges.shape[1] != weight.parts:
            raise QuantTuneError(
                f"The file {path} has activation ranges of shape {list(ranges.shape)} for the "
                f"layer {name}; {AGAIN}."
            )
        found[name] = ranges
    try:
        return ActivationRanges(found)
    except QuantTuneError as error:
        raise QuantTuneError(f"The file {path} is damaged: {error} Please {AGAIN}.") from error


def _read_layer(path: str, name: str, facts: Any, tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Take a layer's three tensors out of ``tensors`` and check them against ``facts``."""

    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(f"The file {path} has a damaged layer {name}: {what}; {AGAIN}.")

    if not isinstance(facts, dict):
        raise wrong("its metadata is not an object")
    bits, shape, split = facts.get("bits"), facts.get("shape"), facts.get("split")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in SUPPORTED_BITS:
        raise wrong(f"it claims {bits!r} bits, not 2, 3, 4 or 8")
    sizes_ok = isinstance(shape, list) and 2 <= len(shape) <= 5
    if not sizes_ok or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise wrong(f"its shape is {shape!r}")
    if not isinstance(facts.get("symmetric"), bool):
        raise wrong("it does not say whether it is symmetric")
    try:
        check_split(split, tuple(shape))
    except QuantTuneError:
        raise wrong(f"its input split is {split!r}") from None
    parts = 1 if split is None else 2
    found = []
    for suffix in SUFFIXES:
        if f"{name}.{suffix}" not in tensors:
            raise wrong(f"the tensor {name}.{suffix} is missing")
        found.append(tensors.pop(f"{name}.{suffix}"))
    packed, scale, zero_point = found
    expected = packed_shape(shape[0], math.prod(shape[1:]), bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise wrong(
            f"its codes are {list(packed.shape)} {packed.dtype}, not {list(expected)} uint8"
        )
    for label, tensor in (("scale", scale), ("zero point", zero_point)):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (shape[0], parts):
            raise wrong(f"its {label} is {list(tensor.shape)} {tensor.dtype}")
    if not is_finite(scale) or float(scale.min()) <= 0:
        raise wrong("a scale is NaN, infinite or not above 0")
    # A base quantized elsewhere may have zero points outside of 0 .. 2**bits - 1.
    if not is_whole(zero_point):
        raise wrong("a zero point is not a whole number")
    return QuantizedWeight(packed, scale, zero_point, bits, tuple(shape), split, facts["symmetric"])


def check_float(path: str, name: str, tensor: Tensor) -> None:
    """Refuse float tensors that are not float, or hold NaN or infinity."""
    if not tensor.is_floating_point() or tensor.dtype not in DTYPE_NAMES:
        raise QuantTuneError(
            f"The file {path} has a tensor {name} of type {tensor.dtype} where a float is "
            f"needed; {AGAIN}."
        )
    if not is_finite(tensor):
        raise QuantTuneError(f"The file {path} has NaN or infinite values in {name}; {AGAIN}.")
