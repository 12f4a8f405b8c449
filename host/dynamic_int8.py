"""MODEL in, MODEL that multiplies integers out (Singh & Kumar; Diffusia's dynamic quantization)."""

from __future__ import annotations

import logging

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention

from ..quant import QuantSpec, QuantTuneError, keep_float
from ..quant.int8 import Granularity
from ..quant.plan import FLOAT, BitPlan
from . import int8_speed
from .build import load_model, quantized_model, resident
from .int8 import OPTION, Int8Mode, backend_for
from .layout import is_uniform
from .ops import scaled_layers
from .quantize import float_model, quantizable_layers, quantize_model

LAYERS = {
    "all": "none",
    "convolutions": None,
    "all but first and last": "first_last",
    "all but time embedding": "time_embedding",
    "all but first, last and time": "first_last_time",
}
"""Choices of layers, as the ``quant.QUANTIZE_PRESETS`` of those that stay out; None: all Linear."""
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "unchanged")
GRANULARITIES = ("auto", *(g.value for g in Granularity))
CALIBRATED, DYNAMIC = "calibrated", "dynamic"
RANGES = (CALIBRATED, DYNAMIC)
ALL = "all"
"""The key of `LAYERS` that leaves the choice to a plan."""
SPEC = QuantSpec(8, symmetric=True)
"""How a float MODEL is quantized: symmetric integers need no correction in a product."""


def dynamic_int8(patcher, layers: str = "all", precision: str = "auto", granularity: str = "auto",
                 fast_attention: bool = True, ranges: str = CALIBRATED, name: str = "model",
                 plan: BitPlan | None = None):
    """A MODEL whose Linear and convolutions multiply 8-bit integers.

    A float MODEL is quantized to 8 bits first. A quantized one keeps its integers (those of 4 bits
    and fewer are unpacked to 8 for the product), which both MODELs then share.

    Args:
        patcher: any MODEL; LoRAs may come before or after, scales after or, on a quantized MODEL,
            before.
        layers: a key of `LAYERS`.
        precision: what everything else computes in; "auto" is bfloat16 on processors that have
            instructions for it, and no change elsewhere.
        granularity: what shares an activation scale, see ``quant.int8.Granularity``.
        fast_attention: on a processor, use PyTorch's attention in place of the host's default.
        ranges: "calibrated" takes the static activation ranges that a MODEL from *Calibrate INT8*
            has; "dynamic" finds them at run time in any case.
        name: what to call the model in messages.
        plan: chooses the layers in place of ``layers``: those of 8 bits multiply integers, all
            others stay as they are.

    Returns:
        ``(MODEL, note)``; the note says what runs and what it gains here.

    Raises:
        QuantTuneError: an unknown setting, a plan beside a choice of layers, one of other widths
            or of another model, or no layer left to multiply integers.
    """
    device = comfy.model_management.get_torch_device()
    dtype = compute_dtype(precision, device)
    lines = []
    if ranges not in RANGES:
        raise QuantTuneError(f"ranges is '{ranges}', but it has to be one of {', '.join(RANGES)}.")
    if plan is not None and layers != ALL:
        raise QuantTuneError(f"layers is '{layers}', but the connected plan chooses the layers; "
                             f"set layers to '{ALL}', or disconnect the plan.")
    if quantized_model(patcher) is None:
        kept = kept_layers(quantizable_layers(patcher.model), layers, plan)
        quantized, report = quantize_model(
            patcher, SPEC, kept, name, dtypes=None if dtype is None else (dtype, None), plan=plan,
            disable_dynamic=True)
        chosen = _integer_layers(quantized).keys()
        lines.append(str(report))
    else:
        quantized = resident(patcher)
        if dtype is not None and dtype != _computes_in(quantized):
            quantized.set_model_compute_dtype(dtype)
        own = _integer_layers(quantized)
        chosen = own.keys() - kept_layers(scaled_layers(quantized.model.diffusion_model), layers,
                                          plan)
        if not chosen:
            by, instead = ((f"layers = '{layers}'", f"choose '{ALL}'") if plan is None else
                           (f"the plan '{plan.label}'", "make a plan for other layers"))
            raise QuantTuneError(
                f"No layer of '{name}' is left to multiply integers with {by}; {instead}, or take "
                "a base that was quantized without keeping those layers in float.")
        if plan is not None and own.keys() - chosen:
            lines.append("This MODEL is quantized: what the plan keeps in float is turned into "
                         "floats in each step here, which takes longer than the plan expects; "
                         "connect the float model for the time of the plan.")
    modules = scaled_layers(quantized.model.diffusion_model)
    found = {layer: backend_for(modules[layer], device) for layer in sorted(chosen)}
    taken = sum(b is not None for b, _ in found.values())
    options = quantized.model_options["transformer_options"]
    reasons = _reasons(found)
    if not taken:
        lines.append(f"Integer products are not available on {device} ({reasons}): the model "
                     "computes in float with its integer weights, which saves memory but no time.")
        logging.warning(lines[-1])
    else:
        checkpoint = quantized_model(quantized).checkpoint
        static = checkpoint.ranges if ranges == CALIBRATED else None
        facts = {} if static is None else checkpoint.metadata.calibration
        options[OPTION] = Int8Mode(
            frozenset(chosen), None if granularity == "auto" else Granularity(granularity),
            static, quantized.model, facts.get("scales", ""), facts.get("patches", ""))
        multiply = {name for name, (backend, _) in found.items() if backend is not None}
        with_ranges = "" if static is None else (
            f", {len(multiply & static.layers.keys())} of them with calibrated ranges")
        lines.append(f"{taken} of {len(modules)} layers multiply integers{with_ranges}. "
                     f"{int8_speed.describe(device, _computes_in(quantized, dtype))}")
        if reasons:
            lines.append(f"{len(found) - taken} layers cannot on {device} ({reasons}).")
    if fast_attention and hasten_attention(options, device):
        lines.append("Attention runs by PyTorch's kernel in place of ComfyUI's default.")
    return quantized, "\n".join(lines)


def _reasons(found: dict) -> str:
    """Why some layers have no backend, each reason once; ``found`` is layer to `backend_for`."""
    told = dict.fromkeys(f"{name}: {reason}" for backend, refused in found.values()
                         if backend is None for name, reason in refused.items())
    none = any(backend is None and not refused for backend, refused in found.values())
    return "; ".join([*told, *(["no backend is known"] if none else [])])


def load_ready(path: str, name: str, bits: int | None = None):
    """The MODEL of a quantized file; with calibrated ranges it multiplies integers at once.

    ``bits``: as in `build.load_model`.
    """
    patcher = load_model(path, name, bits)
    own = quantized_model(patcher)
    if own is None or own.checkpoint.ranges is None:
        return patcher
    checkpoint = own.checkpoint
    # As it was calibrated: with other layers or another precision it would be another model.
    facts = checkpoint.metadata.calibration
    layers, precision = facts.get("layers", ALL), facts.get("precision", "auto")
    return dynamic_int8(patcher, layers if layers in LAYERS else ALL,
                        precision if precision in PRECISIONS else "auto", name=name)[0]


def _integer_layers(patcher) -> dict:
    """The layers of a quantized MODEL that hold integers, by name."""
    layers = scaled_layers(patcher.model.diffusion_model)
    return {name: m for name, m in layers.items() if is_uniform(m.weight)}


def kept_layers(modules: dict, layers: str, plan: BitPlan | None = None) -> set[str]:
    """Names of the layers that stay in float, by a key of `LAYERS` or else by a plan."""
    if plan is not None:
        return _kept_by(plan, modules)
    if layers not in LAYERS:
        raise QuantTuneError(f"layers is '{layers}', but it has to be one of {', '.join(LAYERS)}.")
    if LAYERS[layers] is None:
        return {name for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    return keep_float(list(modules), LAYERS[layers])


def _kept_by(plan: BitPlan, modules: dict) -> set[str]:
    plan.check_layers(modules)
    if others := sorted({bits for bits in plan.bits.values() if bits not in (8, FLOAT)}):
        raise QuantTuneError(
            f"The plan '{plan.label}' holds layers of {' and '.join(map(str, others))} bits; use "
            "it in 'Quantize UNet' and connect that MODEL here without it, or make a plan with "
            "budget = 'time'.")
    chosen = {name for name, bits in plan.bits.items() if bits == 8}
    if not chosen:
        raise QuantTuneError(f"The plan '{plan.label}' keeps every layer in float, so that nothing "
                             "would multiply integers; make one for less time.")
    return set(modules) - chosen


def _computes_in(patcher, dtype=None) -> torch.dtype:
    # Not the model's own attribute, which is another clone's where that was loaded last.
    return dtype or patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in, or None to leave the MODEL's."""
    if precision not in PRECISIONS:
        raise QuantTuneError(
            f"precision is '{precision}', but it has to be one of {', '.join(PRECISIONS)}.")
    if precision == "auto":
        return torch.bfloat16 if device.type == "cpu" and _has_fast_bfloat16() else None
    return None if precision == "unchanged" else getattr(torch, precision)


def _has_fast_bfloat16() -> bool:
    """Whether the processor has bfloat16 products; what torch calls supported may be emulated."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def fast_float(patcher, precision: str = "auto"):
    """A float MODEL with all that `dynamic_int8` changes but the integers: what these gain alone is
    what it gains over this one.

    Args:
        patcher: float MODEL.
        precision: as in `dynamic_int8`.
    """
    device = comfy.model_management.get_torch_device()
    dtype = compute_dtype(precision, device)
    model = float_model(patcher, dtypes=None if dtype is None else (dtype, None))
    hasten_attention(model.model_options["transformer_options"], device)
    return model


def float_changes(patcher, precision: str = "auto") -> list[str]:
    """What `fast_float` changes in a float MODEL, in words."""
    device = comfy.model_management.get_torch_device()
    dtype = compute_dtype(precision, device)
    changes = []
    if dtype not in (None, _computes_in(patcher)):
        changes.append(str(dtype).removeprefix("torch."))
    if _slow_attention(device, patcher.model_options["transformer_options"]):
        changes.append("fast attention")
    return changes


def hasten_attention(options: dict, device: torch.device) -> bool:
    """Set PyTorch's attention in ``transformer_options`` where the host's default is slower.

    Returns whether it was.
    """
    slow = _slow_attention(device, options)
    if slow:
        options["optimized_attention_override"] = use_pytorch_attention
    return slow


def _slow_attention(device: torch.device, options: dict) -> bool:
    """Whether the host would use one of its own kernels, which on a processor are much slower."""
    return (device.type == "cpu" and "optimized_attention_override" not in options
            and optimized_attention is not attention_pytorch)


def use_pytorch_attention(chosen, *args, **kwargs):
    """The host's ``optimized_attention_override``: PyTorch's kernel, whichever was chosen."""
    return attention_pytorch(*args, **kwargs)
