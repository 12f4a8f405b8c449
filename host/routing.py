"""Timestep-routed scales on a ComfyUI model: a wrapper around its diffusion model."""

from __future__ import annotations

import logging

import torch
from comfy.patcher_extension import WrappersMP

from ..quant import QuantTuneError, ScaleBank, ScaleSet, check_fits, check_strength
from .ops import scaled_layers

KEY = "quanttune"


class ScaleRouter:
    """Selects each sample's expert from its timestep and hands every layer its two vectors.

    ``entries`` are ``(ScaleSet, strength)``; several blend as
    ``1 + sum_i strength_i * (scale_i - 1)`` (strength 0 is the base, 1 the trained set). The
    vectors live in one flat bank, so a change of expert costs a few vector operations for the
    whole model and never touches a weight (TuneQDM eq. 6).
    """

    def __init__(self, model, shapes: dict[str, tuple[int, int]],
                 entries: list[tuple[ScaleSet, float]]):
        self.model, self.entries = model, entries
        self.bank = ScaleBank(shapes, entries)

    def __call__(self, executor, x, timesteps, *args, **kwargs):
        """The wrapper itself: put the scales of ``timesteps`` in place, then run the model."""
        # State is set, never cleared: a checkpointed training step recomputes layers after this
        # returns. The next forward of any clone starts by clearing it (see reset_before_forward).
        apply_scales(executor.class_obj, self.resolve(timesteps.to(x.device), x.device))
        return executor(x, timesteps, *args, **kwargs)

    def resolve(self, timesteps: torch.Tensor, device: torch.device):
        """Layer name to its vectors for the batch's timesteps ``[B]`` of the model."""
        self.bank = self.bank.to(device)
        # Read at each forward: nodes after this one may replace the model's sampling.
        convert, num_timesteps = timestep_units(self.model.model_sampling)
        return self.bank.resolve(convert(timesteps), num_timesteps)

    def to(self, device_or_dtype):
        """Move the bank; the host also passes dtypes, which do not concern float32 scales."""
        if isinstance(device_or_dtype, torch.device):
            self.bank = self.bank.to(device_or_dtype)
        return self


def apply_scales(diffusion_model: torch.nn.Module, scales: dict | None) -> None:
    """Put each layer's ``LayerScales`` in place; layers without one (or None for all) get none."""
    for name, module in _layers_of(diffusion_model).items():
        module.active_scales = scales.get(name) if scales else None


def reset_before_forward(diffusion_model: torch.nn.Module) -> None:
    """Make every forward start without scales, so that a routed clone never leaks into another."""
    if not getattr(diffusion_model, "quanttune_reset", None):
        diffusion_model.quanttune_reset = diffusion_model.register_forward_pre_hook(
            lambda module, args: apply_scales(module, None))


def _layers_of(diffusion_model):
    layers = diffusion_model.__dict__.get("quanttune_layers")
    if layers is None:
        layers = diffusion_model.__dict__["quanttune_layers"] = scaled_layers(diffusion_model)
    return layers


def layer_shapes(diffusion_model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Layer name to (length of r_out, length of s_in) of every layer that takes scales."""
    shapes = {}
    for name, module in _layers_of(diffusion_model).items():
        out = module.weight.shape[0]
        inputs = module.weight.shape[1] * getattr(module, "groups", 1)
        shapes[name] = (out * (2 if module.scale_split() else 1), inputs)
    return shapes


def timestep_units(model_sampling):
    """``(convert, T)``: ``convert`` turns the timesteps a model is given into units of 0..T.

    Discrete models count 0..T-1 (the paper's case); flow models are given sigma times a
    multiplier, or sigma itself. Those are linear already. Models that are given a function of
    log-sigma use the position of that sigma in the model's own table.
    """
    kinds = {c.__name__ for c in type(model_sampling).__mro__}
    if kinds & {"ModelSamplingDiscreteEDM", "ModelSamplingContinuousEDM"}:
        def by_table(t):
            table = model_sampling.sigmas.to(t.device, torch.float32)
            return torch.searchsorted(table, model_sampling.sigma(t.float()).contiguous())
        return by_table, len(model_sampling.sigmas)
    if hasattr(model_sampling, "multiplier"):
        return lambda t: t, model_sampling.multiplier
    if hasattr(model_sampling, "num_timesteps"):
        return lambda t: t, model_sampling.num_timesteps
    return lambda t: t, 1


def apply_scale_set(patcher, scale_set: ScaleSet, strength: float, name: str = "scale set"):
    """A clone of ``patcher`` routed through ``scale_set``; chained calls blend.

    Returns ``(clone, warnings)``. Raises QuantTuneError when the model cannot take scales, the
    shapes differ or the strength is not finite.
    """
    try:
        strength = check_strength(strength)
    except QuantTuneError as error:
        raise QuantTuneError(f"'{name}': {error}") from error
    model = patcher.model
    shapes = layer_shapes(model.diffusion_model)
    if not shapes:
        raise QuantTuneError(
            f"'{name}' needs a quantized model, but this MODEL has no quantized layer; put "
            "'Quantize UNet' or 'Load Quantized UNet' before 'Apply TuneQDM Scales'.")
    warnings = _check_fit(shapes, scale_set, patcher, name)
    clone = patcher.clone()
    entries = [(scale_set, strength)]
    for router in clone.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        entries = router.entries + entries
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY,
                               ScaleRouter(model, shapes, entries))
    for warning in warnings:
        logging.warning(warning)
    return clone, warnings


def _check_fit(shapes, scale_set, patcher, name) -> list[str]:
    try:
        check_fits(scale_set, shapes)
    except QuantTuneError as error:
        raise QuantTuneError(f"'{name}' does not fit this MODEL: {error}") from error
    warnings = []
    attachment = patcher.get_attachment("quanttune")
    trained_on = scale_set.metadata.base_fingerprint
    if attachment is not None and trained_on and trained_on != attachment.fingerprint:
        warnings.append(
            f"'{name}' was trained on another base ({scale_set.metadata.base_name or 'unnamed'}, "
            f"fingerprint {trained_on[:12]}) than this model (fingerprint "
            f"{attachment.fingerprint[:12]}): the result may be off.")
    missing = [layer for layer in shapes if layer not in scale_set.layers]
    if missing:
        warnings.append(f"'{name}' has no scales for {len(missing)} of {len(shapes)} layers "
                        f"(first: '{missing[0]}'); they stay as in the base.")
    return warnings
