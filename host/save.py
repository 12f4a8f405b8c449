"""Write quantized models and scale sets into ComfyUI's output folder."""

from __future__ import annotations

import os

from ..quant import QuantTuneError, ScaleSet, save_quantized_unet, save_scale_set
from .build import quantized_model
from .folders import output_path


def save_model(patcher, prefix: str) -> tuple[str, str]:
    """Save a quantized MODEL; returns its path and a one-line summary."""
    model = quantized_model(patcher)
    if model is None:
        raise QuantTuneError(
            "This MODEL is not quantized by QuantTune; put 'Quantize UNet' before 'Save Quantized "
            "UNet', or save it with 'Save Model'.")
    if patcher.patches:
        raise QuantTuneError(
            "This MODEL has a LoRA or merge on top, which integers cannot hold; connect the model "
            "from before the LoRA and apply the LoRA again after loading.")
    checkpoint = model.checkpoint
    path = output_path(prefix)
    model.checkpoint.metadata = save_quantized_unet(path, checkpoint.layers, checkpoint.floats,
                                                    checkpoint.metadata)
    return path, _summary(path)


def save_scales(scale_set: ScaleSet, prefix: str) -> tuple[str, str]:
    """Save a scale set; returns its path and a one-line summary."""
    path = output_path(prefix)
    save_scale_set(path, scale_set)
    return path, _summary(path)


def _summary(path: str) -> str:
    return f"Saved {path} ({os.path.getsize(path) / 2**20:.2f} MiB)"
