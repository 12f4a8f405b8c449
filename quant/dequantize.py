"""Fast dequantization of packed weights into a float buffer (eq. 2 and 5).

On CPU the work is done in blocks that stay in the L2 cache: unpack to bytes, convert to float32,
subtract the zero point, multiply by the scale, and only then leave the cache. Half precision
buffers are filled from the float32 block, which is both faster and better rounded than half
precision arithmetic. A low-rank term is added in the same block, without another pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import LowRank
from .packing import fold_factor, folded_codes, unpack
from .scratch import ScratchPool

BLOCK_CODES = 128 * 1024
"""Codes worked on at once by the CPU path: 512 KiB of float32, a quarter of a usual L2 cache."""

_SCRATCH = ScratchPool()
_SHIFTS = {
    width: torch.arange(0, 8, width, dtype=torch.uint8)[:, None, None] for width in (1, 2, 4)
}


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    split: int | None = None,
    r_out: Tensor | None = None,
    s_in: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Fill ``out`` with ``r_out * (scale * (q - zero_point) + low_rank) * s_in``.

    Not differentiable.

    Args:
        out: contiguous float32, bfloat16 or float16 buffer of the weight's logical shape
            ``[out, in / groups, ...]``.
        packed: uint8 codes as laid out by `packing.pack`.
        scale, zero_point: ``[out, P]`` float32; ``P`` is 2 with a ``split``, else 1.
        bits: 2, 3, 4 or 8.
        split: number of input channels of the first part (Q-Diffusion's shortcut split).
        r_out: ``[out, P]`` float32 multipliers of the scale, or None for ones.
        s_in: ``[in]`` float32 input scales, or None for ones. In a grouped convolution ``in`` is
            groups times the weight's second dimension.
        low_rank: a term that is added to the weight, or None.

    Returns:
        ``out``.
    """
    with torch.no_grad():
        rows = out.shape[0]
        columns = out.numel() // rows
        parts = _column_parts(out, split)
        terms = [] if low_rank is None else _terms(low_rank, r_out, parts, out.device)
        if r_out is not None:
            scale = scale * r_out
        column_scale = None if s_in is None else _column_scale(s_in, out)
        folded = fold_factor(rows, columns, bits) * columns
        unpadded = folded == folded_codes(rows, columns, bits)
        # A compiler fuses the plain form into one pass of its own.
        if out.device.type == "cpu" and unpadded and not torch.compiler.is_compiling():
            return _fill_blocks(out, packed, scale, zero_point, bits, parts, column_scale, terms)
        values = unpack(packed, bits, rows, columns).float()
        _affine(values, scale, zero_point, parts)
        _add(values, terms, slice(0, rows))
        if column_scale is not None:
            _scale_columns(values, column_scale, slice(0, rows), rows)
        return out.copy_(values.view(out.shape))


def _column_parts(out: Tensor, split: int | None) -> list[slice]:
    """The weight matrix's columns that belong to each quantization part."""
    if split is None:
        return [slice(None)]
    border = split * out[0, 0].numel()
    return [slice(0, border), slice(border, None)]


def _column_scale(s_in: Tensor, out: Tensor) -> Tensor:
    """``s_in`` spread over the columns of the weight matrix: ``[groups, K]`` float32."""
    spread = s_in.float().view(-1, out.shape[1], 1)
    return spread.expand(-1, -1, out[0, 0].numel()).reshape(spread.shape[0], -1)


def _affine(values: Tensor, scale: Tensor, zero_point: Tensor, parts: list[slice]) -> None:
    """``values = (values - zero_point) * scale`` in place, part by part."""
    for index, columns in enumerate(parts):
        part = values[:, columns]
        part.sub_(zero_point[:, index, None]).mul_(scale[:, index, None])


def _terms(
    low_rank: LowRank, r_out: Tensor | None, parts: list[slice], device: torch.device
) -> list[tuple[slice, Tensor, Tensor]]:
    """Columns of the weight matrix and the factors, float32, of what is added to them."""
    whole = low_rank.to(device, torch.float32)
    if r_out is None:
        return [(slice(None), whole.up, whole.down)]
    return [
        (columns, whole.up * r_out[:, index, None], whole.down[:, columns])
        for index, columns in enumerate(parts)
    ]


def _add(values: Tensor, terms: list[tuple[slice, Tensor, Tensor]], block: slice) -> None:
    """Add the low-rank ``terms`` to the rows ``block`` of a weight matrix, in place."""
    for columns, up, down in terms:
        values[:, columns].addmm_(up[block], down)


def _scale_columns(values: Tensor, column_scale: Tensor, block: slice, rows: int) -> None:
    """Multiply the rows ``block`` of a weight matrix by their group's column scales, in place."""
    groups = column_scale.shape[0]
    if groups > 1:
        index = torch.arange(block.start, block.stop, device=values.device)
        column_scale = column_scale[index // (rows // groups)]
    values.mul_(column_scale)


def _fill_blocks(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    parts: list[slice],
    column_scale: Tensor | None,
    terms: list[tuple[slice, Tensor, Tensor]],
) -> Tensor:
    """The CPU path of `dequantize_into`, block by block."""
    rows = out.shape[0]
    flat = out.view(rows, -1)
    fold = rows // packed.shape[0]
    step = min(packed.shape[0], max(1, BLOCK_CODES // (fold * flat.shape[1])))
    # Bytes are four times cheaper to subtract than floats, where a byte can hold the difference.
    early = bits != 8 and fold == 1 and len(parts) == 1 and _fits_int8(zero_point)
    zeros = zero_point.to(torch.int8) if early else zero_point
    blocks = zip(
        packed.split(step),
        flat.split(step * fold),
        scale.split(step * fold),
        zeros.split(step * fold),
    )
    work = None
    for index, (source, target, block_scale, block_zero) in enumerate(blocks):
        if work is None or work.height != source.shape[0]:
            work = _Workspace(source, target, bits)
        values = target if work.values is None else work.values
        codes = work.unpack(source)
        if early:
            codes.sub_(block_zero)
        values.view(codes.shape[1], codes.shape[0], -1).copy_(codes.transpose(0, 1))
        if early:
            values.mul_(block_scale)
        else:
            _affine(values, block_scale, block_zero, parts)
        start = index * step * fold
        block = slice(start, start + target.shape[0])
        _add(values, terms, block)
        if column_scale is not None:
            _scale_columns(values, column_scale, block, rows)
        if values is not target:
            target.copy_(values)
    return out


def _fits_int8(zero_point: Tensor) -> bool:
    """Whether ``q - zero_point`` fits int8 for every 4-bit ``q``; imported bases may not."""
    low, high = torch.aminmax(zero_point)
    return -112 <= float(low) and float(high) <= 127


class _Workspace:
    """Scratch tensors for blocks of one height, made once because making views costs time too.

    Codes are unpacked plane-major, ``[planes, n, codes / planes]``, so that each step is one long
    contiguous operation however short the rows are.
    """

    def __init__(self, source: Tensor, target: Tensor, bits: int) -> None:
        self.bits = bits
        self.height, width = source.shape
        self.values = None
        if target.dtype != torch.float32:
            self.values = _SCRATCH.get(target.shape, torch.float32)
        if bits == 3:
            run = width // 3
            both = _SCRATCH.get((2, 8 * self.height * run), torch.uint8)
            self.planes = both[0].view(4, self.height, 2 * run)
            self.tops = both[1].view(8, self.height, run)
            # Each plane of low bits spans two planes of top bits.
            self.spans = self.planes.view(4, self.height, 2, run)
            self.top_spans = self.tops.view(4, 2, self.height, run).transpose(1, 2)
        elif bits != 8:
            self.planes = _SCRATCH.get((8 // bits, self.height, width), torch.uint8)
        if bits != 8:
            self.signed = self.planes.view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        """The codes of some folded rows, int8 (uint8 for 8 bits), valid until the next call."""
        if self.bits == 8:
            return packed.unsqueeze(0)
        if self.bits != 3:
            torch.bitwise_right_shift(packed, _SHIFTS[self.bits], out=self.planes)
            self.planes.bitwise_and_(2**self.bits - 1)
            return self.signed
        border = packed.shape[1] * 2 // 3
        torch.bitwise_right_shift(packed[:, :border], _SHIFTS[2], out=self.planes)
        torch.bitwise_right_shift(packed[:, border:], _SHIFTS[1], out=self.tops)
        self.planes.bitwise_and_(3)
        self.tops.bitwise_and_(1)
        self.spans.add_(self.top_spans, alpha=4)
        return self.signed
