"""What the numbers of a model may be: files that hold others are damaged, or not weights."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGER_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
"""Types of tensors that may hold integers or zero points."""
LARGEST_SCALE = 2.0**24
"""Of a quantization scale; weights themselves end at 65504, float16's largest."""
LARGEST_ZERO = 2.0**40
"""Of a zero point. A channel whose weights are all alike gets a step of 1e-8 from both authors'
quantizers, and so a zero point of 1e8 for each 1 of its weights."""
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
"""A type that has neither NaN nor infinities, and that torch cannot turn into another."""
MOST_SIDES = 16
"""Dimensions of a tensor; a shape of hundreds of ones is no model's, and no message can tell it."""
BLOCK = 2**22
"""Values that are looked at at once where that takes memory."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any type holds neither NaN nor an infinity, as float32 would hold it.

    float64 beyond float32's largest number counts as infinite: nothing here computes with more.
    Nothing of the tensor's size is allocated, unless it is not contiguous. Sparse tensors and those
    without data (meta) have no answer: torch raises.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.numel() or not tensor.is_floating_point() or tensor.dtype is FLOAT4:
        return True
    # 8-bit floats have no such reduction, nor have all devices.
    if tensor.element_size() > 1 and tensor.device.type == "cpu":
        return bool(torch.stack(torch.aminmax(tensor)).float().isfinite().all())
    return all(bool(block.float().isfinite().all()) for block in tensor.flatten().split(BLOCK))


def is_whole(tensor: Tensor) -> bool:
    """Whether all numbers are finite and whole."""
    return is_finite(tensor) and bool((tensor == tensor.round()).all())


def largest(tensor: Tensor) -> float:
    """The size of the largest number of either sign; 0 where there is none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
