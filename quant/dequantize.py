"""Fast dequantization of packed weights into a float buffer (eq. 2 and 5).

On CPU the work is done in blocks that stay in the L2 cache: unpack to bytes, convert to float32,
subtract the zero point, multiply by the scale, and only then leave the cache. Half precision
buffers are filled from the float32 block, which is both faster and better rounded than half
precision arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import fold_factor, folded_codes, unpack
from .scratch import ScratchPool

BLOCK_CODES = 128 * 1024
"""Codes worked on at once by the CPU path: 512 KiB of float32, a quarter of a usual L2 cache."""

_SCRATCH = ScratchPool()
_SHIFTS = {width: torch.arange(0, 8, width, dtype=torch.uint8)[:, None] for width in (1, 2, 4)}


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    split: int | None = None,
    r_out: Tensor | None = None,
    s_in: Tensor | None = None,
) -> Tensor:
    """Fill ``out`` with ``r_out * scale * (q - zero_point) * s_in``. Not differentiable.

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

    Returns:
        ``out``.
    """
    with torch.no_grad():
        rows = out.shape[0]
        columns = out.numel() // rows
        if r_out is not None:
            scale = scale * r_out
        parts = _column_parts(out, split)
        column_scale = None if s_in is None else _column_scale(s_in, out)
        folded = fold_factor(rows, columns, bits) * columns
        if out.device.type == "cpu" and folded == folded_codes(rows, columns, bits):
            return _fill_blocks(out, packed, scale, zero_point, bits, parts, column_scale)
        values = unpack(packed, bits, rows, columns).float()
        _affine(values, scale, zero_point, parts)
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
) -> Tensor:
    """The CPU path of `dequantize_into`, block by block."""
    rows = out.shape[0]
    flat = out.view(rows, -1)
    fold = rows // packed.shape[0]
    codes_per_row = fold * flat.shape[1]
    step = min(packed.shape[0], max(1, BLOCK_CODES // codes_per_row))
    codes = _SCRATCH.get((step, codes_per_row), torch.uint8)
    bits3 = torch.empty_like(codes) if bits == 3 else None
    halves = None
    if out.dtype != torch.float32:
        halves = _SCRATCH.get((step * fold, flat.shape[1]), torch.float32)
    for start in range(0, packed.shape[0], step):
        count = min(step, packed.shape[0] - start)
        block = slice(start * fold, (start + count) * fold)
        source = packed[start : start + count]
        values = flat[block] if halves is None else halves[: count * fold]
        if bits != 8:
            source = _unpack_block(source, codes[:count], bits, bits3)
        values.view(count, codes_per_row).copy_(source)
        _affine(values, scale[block], zero_point[block], parts)
        if column_scale is not None:
            _scale_columns(values, column_scale, block, rows)
        if halves is not None:
            flat[block].copy_(values)
    return out


def _unpack_block(packed: Tensor, codes: Tensor, bits: int, spare: Tensor | None) -> Tensor:
    """Unpack some folded rows into ``codes`` ``[n, C]`` uint8, all planes at once."""
    count = codes.shape[1]
    if bits == 3:
        high = packed[:, count // 4 :]
        packed = packed[:, : count // 4]
    width = 2 if bits == 3 else bits
    torch.bitwise_right_shift(
        packed.unsqueeze(1), _SHIFTS[width], out=codes.unflatten(1, (8 // width, -1))
    )
    codes.bitwise_and_(2**width - 1)
    if bits == 3:
        tops = spare[: codes.shape[0]]
        torch.bitwise_right_shift(high.unsqueeze(1), _SHIFTS[1], out=tops.unflatten(1, (8, -1)))
        codes.add_(tops.bitwise_and_(1), alpha=4)
    return codes
