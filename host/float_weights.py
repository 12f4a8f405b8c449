"""The float weights that a MODEL of any kind computes with: LoRAs and scales written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..quant import LayerScales, QuantTuneError
from ..quant.diagonal import scaled_weight
from .around import is_layer, joined_inputs, weight_shape
from .layout import QuantizedTensor, is_uniform, unwrap
from .merge_lora import patched_weight
from .quantize import PREFIX
from .routing import OPTION as ROUTER
from .routing import bank_for, shapes_for

UNSTORED = ("input_scale", "pre_quant_scale")
"""Parameters of the host's own quantized layers that are no weights: how activations are
quantized, and a factor on them that belongs into the weight."""


def float_weights(patcher, interval: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 tensor of every weight of a MODEL's diffusion model, on the CPU.

    Patches (LoRAs, merges) and scales are part of the weights, packed ones are dequantized. One
    tensor is made at a time; the MODEL is left as it is.

    Args:
        patcher: any MODEL of the host: float, fp8, quantized by us, by the host or by others.
        interval: of scales with several experts the one to take, counted from 1; 0 for none.

    Raises:
        QuantTuneError: scales that one model cannot hold, a bypass LoRA, a weight whose form is
            not known, or a patch that changes a shape or makes NaN.
    """
    if patcher.injections:
        raise QuantTuneError("This MODEL carries a bypass LoRA, which is in no weight; load it "
                             "with 'Load LoRA' instead.")
    unet = patcher.model.diffusion_model
    scales = scales_of(patcher, interval)
    layers = {name: m for name, m in unet.named_modules() if is_layer(m)}
    joined = joined_inputs(layers)
    for module_name, module in unet.named_modules():
        for leaf, value in _stored(module):
            name = f"{module_name}.{leaf}" if module_name else leaf
            key = PREFIX + name
            weight = _in_float(name, module, leaf, _unpatched(patcher, key, value))
            if key in patcher.patches:
                weight = patched_weight(patcher, key, weight.clone())
            if leaf == "weight" and module_name in scales:
                weight = scaled_weight(weight, scales[module_name], joined.get(module_name),
                                       getattr(module, "groups", 1))
            yield name, weight


def weight_of(patcher, key: str) -> Tensor:
    """One weight of a MODEL's or CLIP's patcher in float32 on the CPU, before any patch.

    Args:
        key: in the host's state dict.
    """
    name, _, leaf = key.rpartition(".")
    module = patcher.model.get_submodule(name)
    return _in_float(key, module, leaf, _unpatched(patcher, key, getattr(module, leaf)))


def _unpatched(patcher, key: str, value: Tensor) -> Tensor:
    """What stood in the place of a weight before the host baked its patches in."""
    for backup in (patcher.hook_backup.get(key), patcher.backup.get(key)):
        if backup is not None:
            value = backup[0] if isinstance(backup, tuple) else backup.weight
    return value


def scales_of(patcher, interval: int = 0) -> dict[str, LayerScales]:
    """The scales of a MODEL in one interval of the timesteps, by layer; empty without any.

    Raises:
        QuantTuneError: several experts and no ``interval``, or one that there is not.
    """
    router = patcher.model_options["transformer_options"].get(ROUTER)
    if router is None:
        return {}
    entries = router.entries
    counts = sorted({s.num_experts for s, _ in entries} - {1})
    if len(counts) > 1:
        raise QuantTuneError(
            f"The scale sets on this MODEL have {' and '.join(map(str, counts))} experts, whose "
            "intervals differ; apply one of them at a time.")
    count = counts[0] if counts else 1
    if count > 1 and not interval:
        raise QuantTuneError(
            f"The scales on this MODEL have {count} experts that take turns over the timesteps, "
            f"which one float model cannot; set interval to 1 (least noise) to {count} for one of "
            "them, or share the base and the scale file.")
    if not 0 <= interval <= count:
        raise QuantTuneError(f"The interval is {interval}, but the scales on this MODEL have "
                             f"{count}; choose one of 1 to {count}.")
    shapes = shapes_for(patcher.model.diffusion_model, [s for s, _ in entries])
    bank = bank_for(patcher.model.diffusion_model, shapes, entries)
    return bank.resolve(torch.tensor([(max(interval, 1) - 0.5) / count]), 1.0)


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What of a module itself belongs into a file."""
    for leaf, value in module._parameters.items():
        if value is not None and leaf not in UNSTORED:
            yield leaf, value
    for leaf, value in module._buffers.items():
        if value is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, value


def _in_float(name: str, module: nn.Module, leaf: str, value: Tensor) -> Tensor:
    """A weight or bias as its layer means it, whatever form it is kept in."""
    with torch.no_grad():
        weight = _dequantized(module, value)
        smooth = getattr(module, "pre_quant_scale", None)
        if leaf == "weight" and smooth is not None:
            weight = weight * smooth.to(weight)
    shape = weight_shape(module) if is_layer(module) else tuple(weight.shape)
    shape = shape[:1] if leaf == "bias" and is_layer(module) else shape
    if tuple(weight.shape) != shape or not weight.is_floating_point():
        raise QuantTuneError(
            f"'{name}' is kept in a form that cannot be written as floats ({weight.dtype} of shape "
            f"{list(weight.shape)} in a {type(module).__name__}); use the float model that this "
            "one was made from.")
    return weight


def _dequantized(module: nn.Module, value: Tensor) -> Tensor:
    if is_uniform(value):
        return unwrap(value).dequantize().cpu()
    if isinstance(value, QuantizedTensor):
        return value.dequantize().to("cpu", torch.float32)
    if callable(getattr(module, "get_weight", None)):  # GGUF layers
        return _without_patches(module, value)
    state = getattr(value, "quant_state", None)
    if state is not None:  # layers of bitsandbytes
        if getattr(state, "packing_format_for_cpu", False):
            # Its forward put the codes into an order for one kind of processor, which its own
            # dequantizer reads as if they were in the usual one.
            return value.data.cpu()
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(value.data, state).to("cpu", torch.float32)
    scale = getattr(value, "SCB", None)
    if scale is None and value.dtype == torch.int8:  # its forward moves them there
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if scale is not None:
        return value.data.to("cpu", torch.float32) * (scale.cpu().float()[:, None] / 127)
    return value.detach().to("cpu", torch.float32) if value.is_floating_point() else value.cpu()


def _without_patches(layer: nn.Module, value: Tensor) -> Tensor:
    """A weight of a GGUF layer before any patch; those it carries are on the MODEL as well."""
    patches = getattr(value, "patches", None)
    if not patches:
        return layer.get_weight(value, torch.float32).to("cpu", torch.float32)
    # Such a tensor is its own copy, and a model that stays loaded is not given its patches again.
    value.patches = []
    try:
        return layer.get_weight(value, torch.float32).to("cpu", torch.float32)
    finally:
        value.patches = patches
