"""The weights a MODEL really computes with, layer by layer, and how two MODELs differ."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import comfy.lora
import torch

from ..metrics.weight_change import LayerChange, change_of_layer
from ..quant import QuantTuneError
from .layout import is_uniform, unwrap
from .routing import OPTION

PREFIX = "diffusion_model."


def effective_weights(patcher, timestep: float = 0.0) -> dict[str, Callable[[], torch.Tensor]]:
    """Layer name to a function that gives its float weight ``[out, in, ...]``.

    Patches (LoRA) are added; applied scales are multiplied in as eq. 5 says, with the experts of
    ``timestep`` in 0..1000 of the model's schedule.
    """
    router = patcher.model_options["transformer_options"].get(OPTION)
    scales = router.bank.resolve(torch.tensor([float(timestep)]), 1000.0) if router else {}
    found = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() in (2, 4) and (
                isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))):
            found[name] = _reader(patcher, name, module, scales.get(name))
    return found


def _reader(patcher, name, module, scales):
    def read() -> torch.Tensor:
        key = f"{PREFIX}{name}.weight"
        weight = patcher.backup[key].weight if key in patcher.backup else module.weight
        split = None
        if is_uniform(weight):
            packed = unwrap(weight)
            split, weight = packed.split, packed.dequantize()
        weight = weight.detach().float().cpu().clone()
        if key in patcher.patches:
            weight = comfy.lora.calculate_weight(patcher.patches[key], weight, key)
        if scales is not None:
            weight = _scaled(weight, scales, split, getattr(module, "groups", 1))
        return weight
    return read


def _scaled(weight, scales, split, groups):
    """``r_out * W * s_in`` (eq. 5), part by part."""
    ones = [1] * (weight.dim() - 2)
    rows = scales.r_out[0].float().cpu().view(1 if split is None else 2, -1, 1, *ones)
    parts = [weight] if split is None else [weight[:, :split], weight[:, split:]]
    weight = torch.cat([p * r for p, r in zip(parts, rows)], 1)
    if scales.s_in is not None:
        columns = scales.s_in[0].float().cpu().view(groups, 1, -1, *ones)
        shape = weight.shape
        weight = (weight.view(groups, shape[0] // groups, *shape[1:]) * columns).view(shape)
    return weight


def compare_models(base, tuned, layer: str = "", timestep: float = 0.0,
                   progress=None) -> tuple[str, dict[str, LayerChange]]:
    """The layer to look at, and the change of it, or of all layers when ``layer`` is empty.

    Raises QuantTuneError for a layer that is not there, or models of different architecture.
    """
    first, second = (effective_weights(m, timestep) for m in (base, tuned))
    names = [n for n in first if n in second]
    if len(names) < max(len(first), len(second)):
        other = next(n for n in {**first, **second} if n not in names)
        raise QuantTuneError(f"The two models differ in their layers ('{other}' is in one of "
                             "them only); use two models of one architecture.")
    wanted = layer.strip()
    if wanted:
        if wanted not in names:
            close = difflib.get_close_matches(wanted, names, 3, 0.3) or names[:3]
            raise QuantTuneError(f"There is no layer '{wanted}'; similar ones are "
                                 f"{', '.join(close)}.")
        names = [wanted]
    changes = {}
    for index, name in enumerate(names):
        changes[name] = change_of_layer(first[name](), second[name]())
        if progress is not None:
            progress(index + 1, len(names))
    return max(changes, key=lambda n: changes[n].mean), changes
