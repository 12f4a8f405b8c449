"""Write quantized models and scale sets into ComfyUI's output folder."""

from __future__ import annotations

import json
import os

import comfy.model_detection
import torch

from ..quant import (
    QuantizedWeight,
    QuantSpec,
    QuantTuneError,
    ScaleSet,
    save_quantized_unet,
    save_scale_set,
)
from ..quant.int8 import Int8Weight
from ..quant.limits import is_finite
from ..quant.whole_file import write_safetensors
from .build import quantized_model
from .compat import knows_stock_int8
from .folders import output_path
from .int8 import OPTION as MODE
from .routing import OPTION as ROUTER


def save_model(patcher, prefix: str) -> tuple[str, str]:
    """Save a quantized MODEL; returns its path and a one-line summary."""
    model = quantized_model(patcher)
    if model is None:
        raise QuantTuneError(
            "This MODEL is not quantized by QuantTune; put 'Quantize UNet' before 'Save Quantized "
            "UNet', or write its weights as floats with 'Export Float UNet'.")
    _refuse_patches(patcher, "'Save Quantized UNet'")
    checkpoint = model.checkpoint
    if checkpoint.source is not None:
        checkpoint.source.check()
    path = output_path(prefix)
    model.checkpoint.metadata = save_quantized_unet(
        path, checkpoint.layers, checkpoint.floats, checkpoint.metadata, ranges=checkpoint.ranges)
    return path, "\n".join([_summary(path), *_left_out(patcher)])


STOCK_PREFIX = "model.diffusion_model."
STOCK_FORMAT = {"format": "int8_tensorwise"}
"""What ComfyUI's own loader calls symmetric 8-bit weights with activations quantized by the row."""


def save_for_stock(patcher, prefix: str) -> tuple[str, str]:
    """Save a quantized MODEL as a file that ComfyUI's own *Load Diffusion Model* runs in INT8.

    ComfyUI multiplies integers in Linear layers alone, symmetric with one scale an output channel:
    such layers of 8 bits are written as they are, others are rounded to that once more, and
    convolutions go back to float16. Returns the path and a summary that says so.
    """
    model = quantized_model(patcher)
    if model is None:
        raise QuantTuneError(
            "This MODEL is not quantized by QuantTune; put 'Quantize UNet' with 8 bits, symmetric, "
            "before 'Save for Stock ComfyUI'.")
    _refuse_patches(patcher, "'Save for Stock ComfyUI'")
    tensors, counts = {}, {"linear": 0, "again": 0, "float": 0}
    squared_error = squared_norm = 0.0
    for name, weight in model.checkpoint.layers.items():
        key = f"{STOCK_PREFIX}{name}"
        if len(weight.shape) != 2:
            tensors[f"{key}.weight"] = _half(weight.dequantize())
            counts["float"] += 1
            continue
        exact = weight
        if weight.bits != 8 or not weight.symmetric or weight.split is not None:
            full = weight.dequantize()
            exact = QuantizedWeight.quantize(full, QuantSpec(8, symmetric=True))
            squared_error += float((exact.dequantize() - full).square().sum())
            squared_norm += float(full.square().sum())
            counts["again"] += 1
        ((_, integers),) = Int8Weight.parts(exact)
        tensors[f"{key}.weight"] = integers.values
        tensors[f"{key}.weight_scale"] = exact.scale
        tensors[f"{key}.comfy_quant"] = torch.tensor(
            list(json.dumps(STOCK_FORMAT).encode()), dtype=torch.uint8)
        counts["linear"] += 1
    for name, value in model.checkpoint.floats.items():
        tensors[f"{STOCK_PREFIX}{name}"] = _half(value)
    if not counts["linear"]:
        raise QuantTuneError(
            "This MODEL has no quantized Linear layer, and ComfyUI runs no other in INT8; quantize "
            "it without keeping those in float.")
    mark_prediction(patcher.model, tensors)
    path = output_path(prefix)
    write_safetensors(path, tensors, {"format": "comfyui.int8_tensorwise", "source": model.name})
    lines = [_summary(path), f"{counts['linear']} Linear layers in INT8, {counts['float']} "
             "convolutions in float16 (ComfyUI has no integers for them)."]
    if counts["again"]:
        error = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
        lines.append(f"{counts['again']} layers were not symmetric 8-bit and were rounded once "
                     f"more (error {100 * error:.2f} %).")
    if not knows_stock_int8():
        lines.append("This ComfyUI is too old to load such a file itself: it knows no "
                     "'int8_tensorwise', which ComfyUI 0.27 does.")
    return path, "\n".join([*lines, *_left_out(patcher)])


def _half(value: torch.Tensor) -> torch.Tensor:
    """In float16, or in bfloat16 what is too large for that."""
    half = value.to(torch.float16)
    return half if is_finite(half) else value.to(torch.bfloat16)


def mark_prediction(model, tensors: dict[str, torch.Tensor],
                    instead: str = "use 'Save Quantized UNet', which keeps what it is") -> None:
    """Add the empty tensors by which ComfyUI's loader knows what a model predicts.

    Those of a UNet whose size that loader does not know are for readers that do.

    Raises QuantTuneError where no mark makes it the same as in ``model``, and says what to do
    ``instead``.
    """
    # Only weights reach the detector, as in `stock_int8.read_stock`; a configuration is made anew
    # each time, since it keeps what it is told and cannot be copied.
    weights = {k: v for k, v in tensors.items() if not k.endswith((".comfy_quant", "_scale"))}
    known = comfy.model_detection.model_config_from_unet(weights, STOCK_PREFIX) is not None
    wanted, zsnr = model.model_type, bool(model.model_config.sampling_settings.get("zsnr"))
    marks = [] if wanted.name != "V_PREDICTION" else ["v_pred", *(["ztsnr"] if zsnr else [])]

    def found():
        own = {k.removeprefix(STOCK_PREFIX): v for k, v in tensors.items()}
        config = (comfy.model_detection.model_config_from_unet(weights, STOCK_PREFIX) if known
                  else type(model.model_config)(dict(model.model_config.unet_config)))
        return config.model_type(own, "")

    if marks and found() != wanted:
        added = {f"{STOCK_PREFIX}{mark}": torch.zeros(0) for mark in marks}
        tensors.update(added)
        if not known and found() != wanted:
            for mark in added:
                del tensors[mark]
    if known and found() != wanted:  # unknown to that loader: it says so itself
        raise QuantTuneError(
            f"ComfyUI's own loader would take this {wanted.name} model for a {found().name} one "
            f"and draw noise; {instead}.")


def _left_out(patcher) -> list[str]:
    """What is applied to a MODEL and not in its file, in words."""
    options, lines = patcher.model_options["transformer_options"], []
    if ROUTER in options:
        lines += ["The scales that are applied to it are not in the file; 'Save TuneQDM "
                  "Scales' keeps them."]
    if (mode := options.get(MODE)) is not None and mode.ranges is None:
        lines += ["The file holds its integers, not that they are multiplied as such; put 'Dynamic "
                  "INT8' after 'Load Quantized UNet'."]
    return lines


def save_scales(scale_set: ScaleSet, prefix: str) -> tuple[str, str]:
    """Save a scale set; returns its path and a one-line summary."""
    path = output_path(prefix)
    save_scale_set(path, scale_set)
    return path, _summary(path)


def _refuse_patches(patcher, node: str) -> None:
    if patcher.patches or patcher.injections:
        raise QuantTuneError(
            f"This MODEL has a LoRA or merge on top, which integers cannot hold; connect {node} to "
            "the model from before the LoRA and apply the LoRA again after loading.")


def _summary(path: str) -> str:
    return f"Saved {path} ({os.path.getsize(path) / 2**20:.2f} MiB)"
