"""What a quantized UNet file says about itself (``docs/formats.md``)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .errors import QuantTuneError

UNET_FORMAT = "quanttune.unet"
UNET_FORMAT_VERSION = 1
CALIBRATED_VERSION = 2
"""Of files with activation ranges, which earlier programs would not know what to do with."""
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
        latent_preview: ``{"factors": [[r, g, b], ...], "bias": [r, g, b] or None}`` that a preview
            takes latents to colours with, one row a channel; empty: the latent format's own.
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
    latent_preview: Mapping[str, Any] = field(default_factory=dict)


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
        latent_preview=_jsonable(metadata.latent_preview, "latent_preview"),
        format=UNET_FORMAT,
        format_version=CALIBRATED_VERSION if with_ranges else UNET_FORMAT_VERSION,
    )
    described = asdict(metadata)
    if not with_ranges:
        described.pop("calibration")  # files of version 1 stay the same, byte for byte
    if not metadata.latent_preview:
        described.pop("latent_preview")
    return metadata, described


def read_metadata(
    path: str, header: dict[str, Any] | None, families: Collection[str] | None
) -> UNetMetadata:
    """The metadata of a file by its header, checked.

    Args:
        path: of the file, for messages.
        header: our JSON object in it, or None.
        families: names of the model families that the caller can build, or None for any.

    Raises:
        QuantTuneError: none, or of another kind, version or family, or with entries of wrong types.
    """
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
    optional = {"latent_format": str, "calibration": dict, "latent_preview": dict}
    kinds |= {key: kind for key, kind in optional.items() if key in known}
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
