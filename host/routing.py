"""Timestep-routed scales on a ComfyUI model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..quant import LayerScales, QuantTuneError, ScaleBank, ScaleSet, check_fits, check_strength
from ..quant.int8 import bucket_of
from ..quant.mapped_file import MappedFile
from . import int8
from .around import joined_inputs, layers_around, put_around, set_scales, weight_shape
from .expert_feed import ExpertFeed
from .ops import _ScaledOp, scaled_layers
from .patches import loaded_patches

OPTION = "quanttune_router"
"""Key in ``transformer_options`` of whatever chooses the scales of a forward (`ScaleRouter`)."""
AROUND = "quanttune_around_layers"
"""Where a diffusion model keeps its layers with hooks by name, once scales were applied to it."""


class ScaleRouter:
    """Selects each sample's expert from its timestep.

    ``entries`` are ``(ScaleSet, strength)``; several blend as
    ``1 + sum_i strength_i * (scale_i - 1)`` (strength 0 is the base, 1 the trained set). The
    vectors live in one flat bank, so a change of expert costs a few vector operations for the
    whole model and never touches a weight (TuneQDM eq. 6).
    """

    def __init__(self, model, shapes: dict[str, tuple[int, int]],
                 entries: list[tuple[ScaleSet, float]], feed: ExpertFeed | None = None):
        self.model, self.entries, self.feed = model, entries, feed or ExpertFeed()
        self.bank = bank_for(model.diffusion_model, shapes, entries)

    def on(self, model) -> ScaleRouter:
        """The same scales for another of the host's models, which took over this one's MODEL."""
        accept_scales(model.diffusion_model)
        shapes = shapes_for(model.diffusion_model, [s for s, _ in self.entries])
        return ScaleRouter(model, shapes, self.entries, self.feed)

    @cached_property
    def digest(self) -> str:
        """Equal for routers that scale alike."""
        digest = hashlib.sha256()
        for scale_set, strength in self.entries:
            digest.update(repr((scale_set.num_experts, strength)).encode())
            for tensor in scale_set.tensors():
                digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def resolve(self, timesteps: torch.Tensor) -> dict[str, LayerScales]:
        """Layer name to its vectors for the timesteps ``[B, ...]`` the diffusion model is given.

        One row when all samples share their experts, else one row a sample.
        """
        bank = self.bank = self.bank.to(timesteps.device)
        # Read at each forward: nodes after this one may replace the model's sampling.
        convert, num_timesteps = timestep_units(self.model.model_sampling)
        return bank.resolve(convert(_one_each(timesteps)), num_timesteps)


def route_forwards(diffusion_model: torch.nn.Module, source: MappedFile | None = None) -> None:
    """Make every forward of ``diffusion_model`` start by setting, or clearing, its scales and the
    layers that multiply integers.

    A hook rather than one of the host's wrappers: not every family calls those, and a forward of
    a clone without scales must clear what a routed clone left behind. Scales are not cleared when
    a forward ends, because a checkpointed training step recomputes layers after that.

    A forward whose integers lie in the mapped file ``source`` first looks whether somebody has
    written into it.
    """
    if diffusion_model.__dict__.get("quanttune_routed"):
        return
    diffusion_model.__dict__["quanttune_routed"] = True

    def route(module, args, kwargs):
        if source is not None:
            source.check()
        options = kwargs.get("transformer_options") or {}
        router, mode = options.get(OPTION), options.get(int8.OPTION)
        timesteps = timesteps_of(args, kwargs)
        if timesteps is None and (router or (mode and mode.ranges)):
            raise QuantTuneError(
                f"A {type(module).__name__} model is not told the timestep in a way that scales "
                "and calibrated ranges can follow; remove 'Apply TuneQDM Scales', or use 'Dynamic "
                "INT8' with dynamic ranges.")
        device = next(module.parameters()).device if timesteps is None else timesteps.device
        buckets = ()
        if mode is not None and mode.ranges is not None and (mode.scales, mode.patches) != (
                getattr(router, "digest", ""), loaded_patches(module)):
            mode = replace(mode, ranges=None)
        if mode is not None and mode.ranges is not None:
            buckets = buckets_of(timesteps, mode.model.model_sampling, mode.ranges.num_buckets)
        int8.prepare(module, _layers_of(module), mode, device, buckets)
        apply_scales(module, None if router is None else router.resolve(timesteps))
        if feed := getattr(router, "feed", None):
            feed.seen(_one_each(timesteps), options, router.model.model_sampling, timestep_units)

    diffusion_model.register_forward_pre_hook(route, with_kwargs=True)


def timesteps_of(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The timesteps in the arguments of a diffusion model's forward."""
    return args[1] if len(args) > 1 else kwargs.get("timesteps", kwargs.get("timestep"))


def buckets_of(timesteps: torch.Tensor, model_sampling, num_buckets: int) -> tuple[int, ...]:
    """The interval of the denoising process of each sample, 0 .. ``num_buckets`` - 1."""
    if num_buckets == 1:
        return (0,)
    convert, num_timesteps = timestep_units(model_sampling)
    return bucket_of(convert(_one_each(timesteps)), num_timesteps, num_buckets)


def _one_each(timesteps: torch.Tensor) -> torch.Tensor:
    """A timestep a sample: of models with one a frame or token, the noisiest."""
    return timesteps.flatten(1).amax(1) if timesteps.ndim > 1 else timesteps


def apply_scales(diffusion_model: torch.nn.Module, scales: dict[str, LayerScales] | None) -> None:
    """Put each layer's scales in place; layers without any (all of them for None) get none."""
    own, others = scales or {}, diffusion_model.__dict__.get(AROUND, {})
    for name, module in _layers_of(diffusion_model).items():
        pair = own.get(name)
        module.active_scales = pair if name not in others or _fits(module, pair) else None
    for name, module in others.items():
        pair = own.get(name)
        ours = isinstance(module, _ScaledOp)
        set_scales(module, None if ours and _fits(module, pair) else pair)


def _fits(module, pair: LayerScales | None) -> bool:
    """Whether one of our layers computes with a pair itself."""
    return pair is None or pair.r_out.shape[1] == _outputs(module)


def _outputs(module) -> int:
    return module.weight.shape[0] * (2 if module.scale_split() else 1)


def _layers_of(diffusion_model):
    layers = diffusion_model.__dict__.get("quanttune_layers")
    if layers is None:
        layers = diffusion_model.__dict__["quanttune_layers"] = scaled_layers(diffusion_model)
    return layers


def accept_scales(diffusion_model: torch.nn.Module) -> None:
    """Make any of the host's diffusion models follow a `ScaleRouter`; safe to call again.

    Layers of ours do so by themselves. The others get hooks (``host.around``), and so do those of
    ours that join two feature maps without having been quantized in two parts.
    """
    route_forwards(diffusion_model)
    if AROUND in diffusion_model.__dict__:
        return
    own = _layers_of(diffusion_model)
    layers = own or layers_around(diffusion_model)
    joined = joined_inputs(layers)
    around = {name: m for name, m in layers.items()
              if not own or (name in joined and not m.scale_split())}
    for name, module in around.items():
        put_around(name, module, joined.get(name))
    diffusion_model.__dict__[AROUND] = around


def _also_when_rebuilt(executor, *args, **kwargs):
    """Wrapper around the host's ``apply_model``: some nodes build a MODEL's layers anew."""
    accept_scales(executor.class_obj.diffusion_model)
    return executor(*args, **kwargs)


def layer_shapes(diffusion_model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Layer name to (length of r_out, length of s_in) of every layer that takes scales."""
    shapes = {}
    for name, module in _layers_of(diffusion_model).items():
        inputs = module.weight.shape[1] * getattr(module, "groups", 1)
        shapes[name] = _outputs(module), inputs
    if not shapes:
        for name, module in layers_around(diffusion_model).items():
            outputs, inputs = weight_shape(module)[:2]
            shapes[name] = outputs, inputs * getattr(module, "groups", 1)
    return shapes


def shapes_for(diffusion_model: torch.nn.Module, sets: Iterable[ScaleSet]
               ) -> dict[str, tuple[int, int]]:
    """`layer_shapes` with two parts where a set has them, of layers that join two feature maps."""
    shapes = layer_shapes(diffusion_model)
    sets = list(sets)
    for name in _joined(diffusion_model):
        outputs, inputs = shapes[name]
        if any(name in s.layers and s.layers[name].r_out.shape[1] == 2 * outputs for s in sets):
            shapes[name] = 2 * outputs, inputs
    return shapes


def bank_for(diffusion_model: torch.nn.Module, shapes: dict[str, tuple[int, int]],
             entries: Iterable[tuple[ScaleSet, float]]) -> ScaleBank:
    """The scales of sets and strengths for a model's layers; ``shapes`` as from `shapes_for`."""
    return ScaleBank(shapes, [(_in_parts(s, shapes, diffusion_model), strength)
                              for s, strength in entries])


def _joined(diffusion_model: torch.nn.Module) -> dict[str, int]:
    own = _layers_of(diffusion_model)
    return joined_inputs(own or layers_around(diffusion_model)) | {
        name: m.scale_split() for name, m in own.items() if m.scale_split()}


def _in_parts(scale_set: ScaleSet, shapes: dict[str, tuple[int, int]],
              diffusion_model: torch.nn.Module) -> ScaleSet:
    """A set whose output scales act on both parts of shortcuts that have two where it has one."""
    layers = dict(scale_set.layers)
    for name in _joined(diffusion_model).keys() & layers.keys():
        if shapes[name][0] == 2 * layers[name].r_out.shape[1]:
            layers[name] = replace(layers[name], r_out=layers[name].r_out.repeat(1, 2))
    return replace(scale_set, layers=layers)


def timestep_units(model_sampling):
    """``(convert, T)``: ``convert`` turns the timesteps a model is given into units of 0..T.

    Discrete models count 0..T-1 (the paper's case); flow models are given sigma times a
    multiplier, or sigma itself. Those are linear already. Models that are given a function of
    log-sigma use the position of that sigma in the model's own table.
    """
    kinds = {c.__name__ for c in type(model_sampling).__mro__}
    if kinds & {"StableCascadeSampling", "ModelSamplingCosmosRFlow"}:
        return lambda t: t, 1
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


def apply_scale_set(patcher, scale_set: ScaleSet, strength: float, name: str = "scale set",
                    node_id: str | None = None):
    """A clone of ``patcher`` routed through ``scale_set``; chained calls blend.

    Any MODEL does whose layers are Linear and Conv2d of any class: on the same weights the result
    is that of the quantized base, on weights of another precision close to it. The node ``node_id``
    is shown where in the denoising process a sampler is.

    Returns ``(clone, warnings)``. Raises QuantTuneError when the model has no such layer, the
    shapes differ or the strength is not finite.
    """
    try:
        strength = check_strength(strength)
    except QuantTuneError as error:
        raise QuantTuneError(f"'{name}': {error}") from error
    model = patcher.model
    clone = patcher.clone()
    options = clone.model_options["transformer_options"]
    earlier = options[OPTION].entries if OPTION in options else []
    entries = [*earlier, (scale_set, strength)]
    shapes = shapes_for(model.diffusion_model, [s for s, _ in entries])
    if not shapes:
        raise QuantTuneError(
            f"'{name}' acts on Linear and Conv2d layers, of which this MODEL has none; load the "
            "model it was trained on.")
    warnings = _check_fit(shapes, scale_set, patcher, name)
    accept_scales(model.diffusion_model)
    shown = options[OPTION].feed.nodes if OPTION in options else ()
    feed = ExpertFeed(shown if node_id is None else (*shown, node_id))
    options[OPTION] = ScaleRouter(model, shapes, entries, feed)
    if not earlier:
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, OPTION, _also_when_rebuilt, options)
    for warning in warnings:
        logging.warning(warning)
    return clone, warnings


def _check_fit(shapes, scale_set, patcher, name) -> list[str]:
    try:
        check_fits(_in_parts(scale_set, shapes, patcher.model.diffusion_model), shapes)
    except QuantTuneError as error:
        raise QuantTuneError(f"'{name}' does not fit this MODEL: {error}") from error
    warnings = []
    attachment = patcher.get_attachment("quanttune")
    trained_on = scale_set.metadata.base_fingerprint
    base = scale_set.metadata.base_name or "unnamed"
    if attachment is not None and trained_on and trained_on != attachment.fingerprint:
        warnings.append(
            f"'{name}' was trained on another base ({base}, "
            f"fingerprint {trained_on[:12]}) than this model (fingerprint "
            f"{attachment.fingerprint[:12]}): the result may be off.")
    if attachment is None and scale_set.metadata.bits:
        warnings.append(
            f"'{name}' was trained on a base of {scale_set.metadata.bits} bits ({base}): on these "
            "weights the result is close to that, not equal.")
    missing = [layer for layer in shapes if layer not in scale_set.layers]
    if missing:
        warnings.append(f"'{name}' has no scales for {len(missing)} of {len(shapes)} layers "
                        f"(first: '{missing[0]}'); they stay as in the base.")
    return warnings
