"""How much a LoRA changes a weight, found without the weight."""

from __future__ import annotations

import math

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..quant.limits import is_finite

LIMIT = torch.finfo(torch.float16).max
"""A LoRA that changes a value of a weight by more overflows a model in half precision."""


def largest_change(patch, key: str, shape, strength: float) -> float:
    """How much a patch may change a value of a weight: a bound, exact if it is above `LIMIT`.

    Raises whatever the host does, and ValueError for a patch that it would pass over.
    """
    if isinstance(patch, tuple):
        kind, (values, *_) = patch
        if values.shape != shape:
            raise ValueError(f"it holds {list(values.shape)} values, the layer {list(shape)}")
        return _peak(values) * (1.0 if kind == "set" else strength)
    if not isinstance(patch, LoRAAdapter) or patch.weights[3] is not None or (
            patch.weights[5] is not None):
        return _trial(patch, key, shape) * strength
    up, down, alpha, _, magnitude, _ = patch.weights
    factor = strength * (1.0 if alpha is None else abs(alpha) / down.shape[0])
    largest = _peak(up) * _peak(down) * down.shape[0] * factor
    # The host scales the product, not the factors.
    if not largest <= min(LIMIT, torch.finfo(torch.float32).max * factor):
        largest = _peak(up.float().flatten(1) @ down.float().flatten(1)) * factor
    return largest if magnitude is None else largest + _peak(magnitude) * strength


def _trial(patch, key: str, shape) -> float:
    """The largest value that an adapter of the host's adds to a weight of ones."""
    changes = []

    def kept(change):
        changes.append(_peak(change))
        # So that also an adapter of zeros leaves a trace where the host came to its end.
        return torch.full_like(change, 0.7)

    with torch.no_grad():
        result = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, kept)], torch.ones(shape),
                                             key)
    if not changes or result.shape != shape or bool((result == 1).all()):
        raise ValueError(f"ComfyUI cannot compute it for a weight of {list(shape)} values")
    return changes[0] if is_finite(result) else math.inf


def _peak(tensor: Tensor) -> float:
    return float(tensor.detach().float().abs().max()) if tensor.numel() else 0.0
