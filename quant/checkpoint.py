"""The file format of a quantized UNet (``docs/formats.md``)."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
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
from .scale_file import load_scale_set, save_scale_set
from .spec import SUPPORTED_BITS
from .weight import QuantizedWeight, check_split
from .whole_file import write_safetensors

__all__ = [
    "QuantizedCheckpoint",
    "UNetMetadata",
    "fingerprint",
    "load_quantized_unet",
    "load_scale_set",
    "save_quantized_unet",
    "save_scale_set",
]

UNET_FORMAT = "quanttune.unet"
UNET_FORMAT_VERSION = 1
CALIBRATED_VERSION = 2
"""Of files with activation ranges, which earlier programs would not know what to do with."""
RANGES = "input_range"
SUFFIXES = ("weight", "weight_scale", "weight_zero_point")
AGAIN = "quantize and save the model again"


@dataclass(frozen=True)
class UNetMetadata:
    """What a quantized UNet file says about itself.

    Attributes:
        family: class name of the host's model family, e.g. ``"SD15"``.
        unet_config: the UNet's own constructor arguments, JSON-able; dtypes are dropped on saving.
        model_type: the host's prediction type, e.g. ``"EPS"`` or ``"V_PREDICTION"``.
        latent_format: the host's class of latents, e.g. ``"SDXL_Playground_2_5"``; empty: the
            family's own.
        sampling_settings: the host's settings of the noise schedule where the family has several.
        layers: layer name to ``{"bits", "symmetric", "shape", "split"}``; filled in on saving.
        floats: names of the tensors that stayed float; filled in on saving.
        provenance: JSON-able facts: source file, program version, command, quantization options.
        fingerprint: of the layers, see `fingerprint.fingerprint`; filled in on saving if empty.
        format, format_version: ``"quanttune.unet"``, and 1, or 2 with activation ranges.
        calibration: JSON-able facts of how the activation ranges were found; empty without them.
    """

    family: str
    unet_config: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""
    latent_format: str = ""
    sampling_settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    floats: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    format: str = UNET_FORMAT
    format_version: int = UNET_FORMAT_VERSION
    calibration: Mapping[str, Any] = field(default_factory=dict)


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


def layer_facts(
    shape: tuple[int, ...], bits: int, symmetric: bool, split: int | None
) -> dict[str, Any]:
    """What the metadata say of one layer."""
    return {"bits": bits, "symmetric": symmetric, "shape": list(shape), "split": split}


def complete_metadata(
    metadata: UNetMetadata,
    layers: Mapping[str, Mapping[str, Any]],
    floats: Collection[str],
    fingerprint: str,
    with_ranges: bool = False,
) -> tuple[UNetMetadata, dict[str, Any]]:
    """The metadata of a file with these layers and floats, and the same as its JSON object.

    Args:
        metadata: what is known beside them.
        layers: layer name to `layer_facts`.
        floats: names of all other tensors.
        fingerprint: of the layers.
        with_ranges: whether activation ranges are in the file.

    Raises:
        QuantTuneError: metadata that are not JSON.
    """
    metadata = replace(
        metadata,
        unet_config=_jsonable(metadata.unet_config, "unet_config"),
        sampling_settings=_jsonable(metadata.sampling_settings, "sampling_settings"),
        provenance=_jsonable(metadata.provenance, "provenance"),
        layers=layers,
        floats=tuple(sorted(floats)),
        fingerprint=fingerprint,
        calibration=_jsonable(metadata.calibration, "calibration") if with_ranges else {},
        format=UNET_FORMAT,
        format_version=CALIBRATED_VERSION if with_ranges else UNET_FORMAT_VERSION,
    )
    described = asdict(metadata)
    if not with_ranges:
        described.pop("calibration")  # files of version 1 stay the same, byte for byte
    return metadata, described


def _jsonable(value: Any, where: str) -> Any:
    """A JSON copy of ``value``; dtypes are dropped since the reader chooses its own."""
    if isinstance(value, Mapping):
        return {
            str(k): _jsonable(v, f"{where}.{k}")
            for k, v in value.items()
            if not isinstance(v, torch.dtype)
        }
    if isinstance(value, (list, tuple)):
        return [_jsonable(v, where) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise QuantTuneError(
        f"The metadata {where} is {value!r}, which cannot be written as JSON; "
        "use numbers, strings, lists and mappings."
    )


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
    metadata = _read_metadata(path, header, families)
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


def _read_metadata(
    path: str, header: dict[str, Any] | None, families: Collection[str] | None
) -> UNetMetadata:
    if header is None:
        raise QuantTuneError(
            f"The file {path} is not a quantized UNet: it has no QuantTune metadata; "
            "load it with the ordinary loader and run Quantize UNet."
        )
    if header.get("format") != UNET_FORMAT:
        hint = "; use Load TuneQDM Scales" if header.get("format") == "quanttune.scales" else ""
        raise QuantTuneError(
            f"The file {path} is not a quantized UNet but says it is {header.get('format')!r}"
            f"{hint or '; choose another file'}."
        )
    version = header.get("format_version")
    if type(version) is not int or version not in (UNET_FORMAT_VERSION, CALIBRATED_VERSION):
        raise QuantTuneError(
            f"The file {path} has format version {version!r} and this program reads versions "
            f"{UNET_FORMAT_VERSION} and {CALIBRATED_VERSION}; update ComfyUI-QuantTune."
        )
    known = {k: header[k] for k in UNetMetadata.__dataclass_fields__ if k in header}
    kinds = {
        "family": str,
        "unet_config": dict,
        "model_type": str,
        "sampling_settings": dict,
        "layers": dict,
        "floats": list,
        "provenance": dict,
        "fingerprint": str,
    }
    kinds |= {k: v for k, v in {"latent_format": str, "calibration": dict}.items() if k in known}
    for key, kind in kinds.items():
        if not isinstance(known.get(key), kind):
            raise QuantTuneError(f"The file {path} has no valid {key} in its metadata; {AGAIN}.")
    if not all(isinstance(name, str) for name in known["floats"]):
        raise QuantTuneError(f"The file {path} has no valid floats in its metadata; {AGAIN}.")
    if not known["family"] or (families is not None and known["family"] not in families):
        raise QuantTuneError(
            f"The file {path} holds a model of the family {known['family']!r}, which this loader "
            "does not know; update ComfyUI or choose another file."
        )
    if not known["layers"]:
        raise QuantTuneError(f"The file {path} lists no quantized layers; {AGAIN}.")
    known["floats"] = tuple(dict.fromkeys(known["floats"]))
    return UNetMetadata(**known)


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
