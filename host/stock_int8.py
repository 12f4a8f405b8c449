"""ComfyUI's own INT8 files (``int8_tensorwise``) as packed integers of ours."""

from __future__ import annotations

import json
import os

import comfy.model_detection
import torch

from ..quant import QuantizedCheckpoint, QuantizedWeight, QuantTuneError, pack
from ..quant.checkpoint import check_float
from ..quant.limits import is_finite
from ..quant.safe_file import read_safetensors
from .describe import describe_config

MARK = ".comfy_quant"
"""How ComfyUI names what it says of a quantized layer: JSON as bytes."""
FORMAT = "int8_tensorwise"
PREDICTION_MARKS = {"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max",
                    "edm_vpred.sigma_min"}
"""Tensors that say what a model predicts and are no part of it."""
MIDDLE = 128


def read_stock(path: str) -> QuantizedCheckpoint | None:
    """The UNet of a file with ComfyUI's INT8 layers, or None if it has no layer of that kind.

    The integers are taken as they are: symmetric, one scale an output channel.

    Raises:
        QuantTuneError: a damaged file or layer, another quantization, an unknown model.
    """
    _, tensors = read_safetensors(path)
    if not any(key.endswith(MARK) for key in tensors):
        return None
    # Only weights reach the detector: it counts and measures, and knows no marks.
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    layers = {}
    for key in [k for k in own if k.endswith(MARK)]:
        name = key.removesuffix(MARK)
        layers[name] = _layer(path, name, own)
    shapes = {**own, **{f"{n}.weight": torch.empty(w.shape, device="meta")
                        for n, w in layers.items()}}
    config = comfy.model_detection.model_config_from_unet(
        {prefix + k: v for k, v in shapes.items()}, prefix)
    if config is None:
        raise QuantTuneError(
            f"The file {os.path.basename(path)} holds no model that this ComfyUI knows; choose "
            "another file or update ComfyUI.")
    for mark in PREDICTION_MARKS & own.keys():
        del own[mark]  # `describe_config` reads them from the file
    for name, value in own.items():
        if not value.is_floating_point() or value.element_size() < 2:
            raise QuantTuneError(
                f"The file {os.path.basename(path)} holds '{name}' as {value.dtype} without saying "
                "how it is quantized; load it with ComfyUI's own loader.")
        check_float(path, name, value)
    name = os.path.basename(path)
    metadata = describe_config(config, {k.removeprefix(prefix): v for k, v in tensors.items()},
                               name, {"source": name, "bits": 8, "symmetric": True})
    return QuantizedCheckpoint(metadata, layers, own)


def _layer(path: str, name: str, tensors: dict) -> QuantizedWeight:
    """Take a layer's tensors out of ``tensors``."""
    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(
            f"The file {os.path.basename(path)} has a layer '{name}' {what}; load it with "
            "ComfyUI's own loader, or download it again if that fails, too.")

    try:
        facts = json.loads(bytes(tensors.pop(f"{name}{MARK}").tolist()))
        kind = facts["format"]
        rotated = facts.get("convrot") or facts.get("params", {}).get("convrot")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise wrong("with an unreadable description") from None
    if kind != FORMAT or rotated:
        raise wrong(f"quantized as {str(kind)[:40]}{' with a rotation' if rotated else ''}, which "
                    "this pack does not read")
    values, scale = tensors.pop(f"{name}.weight", None), tensors.pop(f"{name}.weight_scale", None)
    if values is None or values.dtype != torch.int8 or values.dim() < 2 or not values.numel():
        raise wrong("without int8 weights")
    outputs = values.shape[0]
    if scale is None or not scale.is_floating_point() or scale.numel() not in (1, outputs):
        raise wrong("without a scale, or with one of a wrong size")
    scale = scale.float().reshape(-1, 1).expand(outputs, 1).contiguous()
    if not is_finite(scale):
        raise wrong("whose scale is not finite")
    codes = (values.to(torch.int16) + MIDDLE).to(torch.uint8).flatten(1)
    return QuantizedWeight(pack(codes, 8), scale, torch.full_like(scale, MIDDLE), 8,
                           tuple(values.shape), symmetric=True)
