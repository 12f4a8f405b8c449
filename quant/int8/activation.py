"""Activations to 8 bits at run time, one scale for a tensor or one for each token.

Per tensor the range is asymmetric (what follows a SiLU or GELU is mostly positive): unsigned codes
``q = floor(x / scale + zero_point + 1/2)`` with 254 steps over the range, so that rounding can
never leave 0..255 and no clamp is needed. Per token it is symmetric: ``q = round(x / scale)``.

On CPU the work is done in blocks that stay in the L2 cache; a compiler gets the plain formula,
which it fuses with the norm or activation function before it.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import QuantTuneError
from ..scratch import ScratchPool

STEPS = 254
"""Steps of an asymmetric range; 255 would need a clamp."""
LARGEST = 127
"""Largest code of a symmetric range."""
TINY = 1e-12
"""Smallest range: an all-zero activation still needs a scale."""
BLOCK = 128 * 1024
"""Elements worked on at once by the CPU path: 512 KiB of float32, a quarter of a usual L2 cache."""

_SCRATCH = ScratchPool()


class Granularity(str, Enum):
    """What shares one activation scale: a whole ``TENSOR`` or each ``TOKEN`` (row) of a Linear."""

    TENSOR = "tensor"
    TOKEN = "token"


class QuantizedActivation(NamedTuple):
    """``scale * (values - zero_point)``.

    Attributes:
        values: uint8 (per tensor) or int8 (per token), shaped as the activation.
        scale: float32, of shape ``[]`` per tensor or ``[tokens, 1]``.
        zero_point: float32 holding an integer, shape ``[]``; 0 per token.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """The float32 activation."""
        return (self.values.float() - self.zero_point) * self.scale


def tensor_qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``(scale, zero_point)`` of a range, widened to contain 0 so that padding is exact."""
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    scale = ((high - low) / STEPS).clamp(min=TINY)
    return scale, torch.round(-low / scale)


def quantize_tensor(x: Tensor, s_in: Tensor | None = None, qparams=None) -> QuantizedActivation:
    """Quantize ``x`` ``[..., C]`` with one scale; ``x * s_in`` where TuneQDM's ``s_in`` is given.

    Args:
        x: floating point, channels last.
        s_in: float32, broadcastable to ``x``, or None.
        qparams: ``(scale, zero_point)`` known beforehand (static quantization); codes are clamped
            then, because a range from calibration need not hold every value.
    """
    if _in_blocks(x, s_in):
        return _tensor_in_blocks(x, s_in, qparams)
    values = x.float() if s_in is None else x.float() * s_in
    clamped = qparams is not None
    if qparams is None:
        qparams = tensor_qparams(values.amin(), values.amax())
    scale, zero_point = qparams
    codes = values * (1.0 / scale) + (zero_point + 0.5)
    if clamped:
        # NaN would become a code like any other: it goes into the scale, which products look at.
        scale = scale + 0.0 * values.sum()
        codes = codes.clamp(0, 255)
    return QuantizedActivation(codes.to(torch.uint8), scale, zero_point)


def quantize_tokens(x: Tensor, s_in: Tensor | None = None) -> QuantizedActivation:
    """Quantize ``x`` ``[tokens, C]`` with one symmetric scale a token; see `quantize_tensor`."""
    if _in_blocks(x, s_in):
        return _tokens_in_blocks(x, s_in)
    values = x.float() if s_in is None else x.float() * s_in
    scale = values.abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST
    codes = torch.round(values * (1.0 / scale)).to(torch.int8)
    return QuantizedActivation(codes, scale, torch.zeros((), device=x.device))


def _in_blocks(x: Tensor, s_in: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and (s_in is None or s_in.numel() == s_in.shape[-1])
    )


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as a matrix, and how many of its rows make a block."""
    rows = x.reshape(-1, x.shape[-1])
    return rows, max(1, min(rows.shape[0], BLOCK // max(1, rows.shape[1])))


def _load(block: Tensor, s_in: Tensor | None, buffer: Tensor) -> Tensor:
    """``block * s_in`` as float32 in ``buffer``."""
    # In two steps: a product of two dtypes takes three times as long as both.
    buffer = buffer[: block.shape[0]].copy_(block)
    return buffer if s_in is None else buffer.mul_(s_in)


def _tensor_in_blocks(x: Tensor, s_in: Tensor | None, qparams) -> QuantizedActivation:
    source, rows = _as_rows(x)
    s_in = None if s_in is None else s_in.reshape(-1)
    shape = (rows, source.shape[1])
    buffer = _SCRATCH.get(shape, torch.float32)
    if qparams is None:
        scale, zero_point = _range(source, s_in, rows, buffer)
    else:
        scale, zero_point = map(float, qparams)
    # A tensor, because a number is no first operand of add; the rest is cheaper in Python.
    inverse, shift = 1.0 / scale, torch.tensor(zero_point + 0.5)
    integers = _SCRATCH.get(shape, torch.int16)
    values = torch.empty(source.shape, dtype=torch.uint8)
    sums = []
    for start in range(0, source.shape[0], rows):
        part = slice(start, start + rows)
        block = _load(source[part], s_in, buffer)
        torch.add(shift, block, alpha=inverse, out=block)
        if qparams is not None:
            # NaN would become a code like any other.
            sums.append(block.sum())
            block.clamp_(0, 255)
        # By way of int16, whose two conversions are vectorized where that of float to uint8 is not.
        values[part] = integers[: block.shape[0]].copy_(block)
    if sums:
        check_finite(float(torch.stack(sums).sum()))
    if qparams is None:
        qparams = torch.tensor(scale), torch.tensor(zero_point)
    return QuantizedActivation(values.view(x.shape), *qparams)


def _range(source: Tensor, s_in: Tensor | None, rows: int, buffer: Tensor) -> tuple[float, float]:
    """`tensor_qparams` of ``source * s_in`` as numbers."""
    low = high = 0.0
    step = source.shape[0] if s_in is None else rows
    for start in range(0, source.shape[0], max(1, step)):
        block = source[start : start + step]
        ends = torch.aminmax(block if s_in is None else _load(block, s_in, buffer))
        low = min(check_finite(float(ends.min)), low)
        high = max(check_finite(float(ends.max)), high)
    scale = max((high - low) / STEPS, TINY)
    return scale, float(round(-low / scale))


def _tokens_in_blocks(x: Tensor, s_in: Tensor | None) -> QuantizedActivation:
    source, rows = _as_rows(x)
    s_in = None if s_in is None else s_in.reshape(-1)
    buffer = _SCRATCH.get((rows, source.shape[1]), torch.float32)
    values = torch.empty(source.shape, dtype=torch.int8)
    scale = torch.empty(source.shape[0], 1)
    for start in range(0, source.shape[0], rows):
        part = slice(start, start + rows)
        block = _load(source[part], s_in, buffer)
        low, high = torch.aminmax(block, dim=1, keepdim=True)
        torch.maximum(-low, high, out=scale[part]).clamp_(min=TINY).div_(LARGEST)
        values[part] = block.mul_(1.0 / scale[part]).round_()
    check_finite(float(scale.sum()))
    return QuantizedActivation(values.view(x.shape), scale, torch.zeros(()))


def check_finite(value: float) -> float:
    """Return an end or the scale of a range if it is finite, else raise `QuantTuneError`."""
    if not math.isfinite(value):
        raise QuantTuneError(
            "An activation is NaN or infinite, so that it has no range to quantize; the model "
            "overflows in this precision or its file is damaged, so run it in float to see which."
        )
    return value
