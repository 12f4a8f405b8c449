"""The state of TuneQDM's authors and ours, into each other.

Their layer computes ``W = (W_int - zero_point) * delta_out[i] * delta_in[i]`` with signed integers
and, for each expert ``i``, the whole output scale: what the layer was quantized with is not in the
file any more. Ours is ``W = r_out * s0 * (q - z) * s_in``. So ``q = W_int + 2^(b-1)`` and
``z = zero_point + 2^(b-1)``, which leaves every difference as it is, and any ``s0`` above 0 will do
as long as ``r_out = delta_out / s0``: the mean of the experts' sizes, unless the float weights are
there to find the true one again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import QuantTuneError
from .fingerprint import fingerprint
from .packing import pack
from .quantizer import TINY
from .scales import LayerScales, ScaleMetadata, ScaleSet
from .tuneqdm_state import (
    CONFIG,
    DEFAULT_STEPS,
    IN,
    INTEGERS,
    OUR_SCALES,
    OURS,
    OUT,
    SCALED,
    STATE,
    ZERO,
    StateLayer,
    TuneqdmState,
)
from .weight import QuantizedWeight

SMALLEST = 1e-8
"""Below which the authors' quantizer lets no scale fall."""


def quantize_as_authors(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Integers, zero points and scales that the authors' code gives a float weight.

    Returns:
        ``[out, in, *kernel]`` int8, ``[out]`` and ``[out]`` float32.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    rows = weight.detach().to(torch.float32).flatten(1)
    if symmetric:
        scale = (rows.abs().amax(1).clamp_(min=SMALLEST) / max(high, 1)).clamp_(min=SMALLEST)
        zero = torch.zeros_like(scale)
    else:
        least, most = torch.aminmax(rows, dim=1)
        scale = ((most - least) / (high - low)).clamp_(min=SMALLEST)
        zero = low - torch.round(least / scale)
    integers = torch.round(rows / scale[:, None] + zero[:, None]).clamp_(low, high)
    return integers.to(torch.int8).reshape(weight.shape), zero, scale


def find_base(layer: StateLayer, weight: Tensor, symmetric: bool, bits: int) -> StateLayer:
    """A layer with what it was quantized with, found again from its float weight.

    Args:
        layer: of a file.
        weight: of the float model that the training began with, or of any other.
        symmetric, bits: of the file.

    Returns:
        The layer with ``s0``, and with integers where it had none; unchanged when its integers are
        not those of this weight.
    """
    integers, zero, scale = quantize_as_authors(weight, bits, symmetric)
    if layer.integers is not None:
        # Another processor may round a few of them the other way.
        apart = (layer.integers.to(torch.int16) - integers.to(torch.int16)).abs()
        if apart.max() > 1 or (apart > 0).float().mean() > 1e-3 or bool(
                (layer.zero_point - zero).abs().max() > 1):
            return layer
        integers, zero = layer.integers, layer.zero_point
    return replace(layer, integers=integers, zero_point=zero, s0=scale)


def from_state(state: TuneqdmState, names: Mapping[str, str],
               base_name: str = "") -> tuple[dict[str, QuantizedWeight], ScaleSet]:
    """A state as quantized weights and a scale set of ours.

    Args:
        state: of `read_state`.
        names: name of a layer in the state to its name here, for all of them.
        base_name: what the scale set calls its base.

    Returns:
        Layer name to weight, and the scales with the fingerprint of those weights.

    Raises:
        QuantTuneError: a state without integers, or a layer that ``names`` lacks.
    """
    layers, scales = {}, {}
    scaled = state.ours.get(SCALED, {})
    for name, layer in state.layers.items():
        if name not in names:
            raise QuantTuneError(f"The TuneQDM state has a layer '{name[:100]}' that the UNet has "
                                 "not; choose the state of an SD1.x, SD2.x or SDXL model.")
        if layer.integers is None:
            raise _without_integers(state, name, base_name)
        half = 1 << (layer.bits - 1)
        zero = (layer.zero_point + half).reshape(-1, 1)
        if layer.z is not None and torch.equal(layer.z, zero.flatten()):
            zero = layer.z.reshape(-1, 1).clone()  # the same numbers, zeros of the same sign
        s0 = layer.s0 if layer.s0 is not None else mean_scale(layer.s_out)
        codes = (layer.integers.to(torch.int16) + half).to(torch.uint8).flatten(1)
        layers[names[name]] = QuantizedWeight(
            pack(codes, layer.bits), s0.reshape(-1, 1).clone(), zero, layer.bits,
            tuple(layer.integers.shape), None, bool((zero == half).all()))
        r_out = (layer.s_out.double() / s0.double()).float()
        s_in, ones = layer.s_in, layer.s_in is None or bool((layer.s_in == 1).all())
        if scaled and ones and name not in scaled and torch.equal(layer.s_out, s0.expand_as(
                layer.s_out)):
            continue  # written for their code, which has scales in every layer
        scales[names[name]] = LayerScales(r_out, None if ones and scaled.get(name) is False
                                          else s_in)
    bits = [w.bits for w in layers.values()]
    told = {**state.ours.get("scales", {}), "base_fingerprint": fingerprint(layers)}
    told.setdefault("base_name", base_name)
    told.setdefault("bits", max(set(bits), key=bits.count))
    told["extra"] = {**told.get("extra", {}), "tuneqdm": _plain(state.config)}
    return layers, ScaleSet(scales, state.num_experts, state.num_timesteps, ScaleMetadata(**told))


def _without_integers(state: TuneqdmState, name: str, base_name: str) -> QuantTuneError:
    """The error for a state, or a layer of it, that is scales alone."""
    count = sum(layer.integers is None for layer in state.layers.values())
    what = f"The TuneQDM state {base_name}".rstrip()
    which = "any layer" if count == len(state.layers) else f"the layer '{name[:100]}'"
    return QuantTuneError(
        f"{what} has no integers for {which}, only scales, which say "
        "nothing without the float model that they were trained on; give that model to 'python -m "
        "quanttune convert STATE OUT.safetensors --base MODEL' and use what it writes, "
        "OUT-scales.safetensors in 'Apply TuneQDM Scales' on OUT.safetensors.")


def to_state(layers: Mapping[str, QuantizedWeight], floats: Mapping[str, Tensor],
             scales: ScaleSet | None, names: Mapping[str, str],
             note: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Quantized weights and scales of ours as the authors' file holds them.

    Their code reads it, with N experts and all; what they do not save (the weights of the norms,
    and a note of this program) is there as well, so that the file needs no base to come back.

    Args:
        layers: layer name to weight.
        floats: every other tensor of the UNet.
        scales: a set for these layers, or None for the base alone.
        names: name of a tensor of the float UNet here to its name in diffusers, for all of them.
        note: JSON-able, for whoever reads the file back.

    Raises:
        QuantTuneError: what their layers cannot hold: inputs in two parts, layers kept in float,
            scales of other shapes.
    """
    count = scales.num_experts if scales else 1
    if scales and (unknown := sorted(scales.layers.keys() - layers.keys())):
        raise QuantTuneError(f"The scales are for the layer '{unknown[0][:100]}' "
                             f"({len(unknown)} such), which the quantized model has not; choose "
                             "the model that they were trained on.")
    state, noted, own, scaled = {}, {}, {}, {}
    for name, weight in layers.items():
        theirs = _their_name(names, f"{name}.weight").removesuffix(".weight")
        if weight.split is not None:
            raise QuantTuneError(
                f"The layer '{name}' has scales for two groups of inputs, which TuneQDM's own "
                "layers have not; quantize the model without split_shortcuts.")
        out, inputs, ones = weight.shape[0], weight.shape[1], (1,) * (len(weight.shape) - 2)
        given = scales.layers.get(name) if scales else None
        if given is not None:
            scaled[theirs] = given.s_in is not None
        r_out = torch.ones(count, out) if given is None else given.r_out.detach().float().cpu()
        s_in = torch.ones(count, inputs) if given is None or given.s_in is None else (
            given.s_in.detach().float().cpu())
        if tuple(r_out.shape) != (count, out) or tuple(s_in.shape) != (count, inputs):
            raise QuantTuneError(f"The scales of the layer '{name}' do not fit its weight "
                                 f"{list(weight.shape)}; choose the model that they were trained "
                                 "on.")
        half = 1 << (weight.bits - 1)
        codes = weight.codes().to(torch.int16).cpu() - half
        state[f"{theirs}.{INTEGERS}"] = codes.to(torch.int8).reshape(weight.shape)
        s0 = weight.scale.cpu().flatten()
        zero = weight.zero_point.cpu().flatten() - half
        state[f"{theirs}.{ZERO}"] = zero.reshape(out, 1, *ones)
        state[f"{theirs}.{OUT}"] = (r_out * s0).reshape(count, out, 1, *ones)
        state[f"{theirs}.{IN}"] = s_in.reshape(count, 1, inputs, *ones).contiguous()
        noted[theirs], own[theirs] = weight.bits, torch.stack(
            [s0, weight.zero_point.cpu().flatten()])
    for name, value in floats.items():
        theirs = _their_name(names, name)
        if value.dim() > 1:
            raise QuantTuneError(f"The layer '{name.removesuffix('.weight')}' is kept in float, "
                                 "which TuneQDM's own models have not; quantize the model with "
                                 "keep_float = none.")
        state[theirs] = value.detach().cpu().contiguous()
    config = {"n_bits": max(noted.values()), "symmetric": all(w.symmetric for w in layers.values()),
              "num_experts": count, "total_denoising_steps": DEFAULT_STEPS, "train_delta_in": True,
              "train_bias": False}
    facts: dict[str, Any] = {**(note or {}), "bits": noted}
    if scales:
        facts[SCALED] = scaled
        config |= {"total_denoising_steps": scales.num_timesteps,
                   "train_delta_in": scales.has_s_in}
        extra = dict(scales.metadata.extra)
        config |= {k: v for k, v in _plain(extra.pop("tuneqdm", {})).items()
                   if k in ("n_bits", "train_bias")}
        told = scales.metadata
        facts["scales"] = {"base_name": told.base_name, "subject": told.subject, "bits": told.bits,
                           "steps": told.steps, "seed": told.seed, "extra": extra}
    return {STATE: state, CONFIG: config, OURS: json.dumps(facts), OUR_SCALES: own}


def mean_scale(s_out: Tensor) -> Tensor:
    """``s0`` for the output scales ``[N, out]`` of some experts: the mean of their sizes.

    Scales that training carried through 0 keep their sign in ``r_out``; a channel of zeros gets 1.
    """
    mean = s_out.double().abs().mean(0).float()
    return torch.where(mean > TINY, mean, torch.ones_like(mean))


def _their_name(names: Mapping[str, str], name: str) -> str:
    if name not in names:
        raise QuantTuneError(f"The tensor '{name[:100]}' has no name in diffusers; only UNets of "
                             "SD1.x, SD2.x and SDXL can be exported.")
    return names[name]


def _plain(config: object) -> dict[str, Any]:
    """The settings that can be written as JSON."""
    return {key: value for key, value in (config.items() if isinstance(config, dict) else ())
            if isinstance(value, (bool, int, str))
            or (isinstance(value, float) and math.isfinite(value))}
