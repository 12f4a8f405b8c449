"""True packing of 2, 3, 4 and 8 bit codes into bytes, laid out for contiguous unpacking.

Layout, "folded planar": ``g`` consecutive rows are folded into one row of ``C = g*K`` codes, where
``g`` is the smallest divisor of the number of rows that makes ``C`` a multiple of what the width
needs (8 codes for 3 bits, 4 for 2 bits, 2 for 4 bits, 1 for 8 bits). If no divisor does, all rows
are folded into one and zeros are appended. Within a folded row, code ``j`` shares its byte with
the codes ``j + C/2`` (4 bits) or ``j + C/4, j + 2C/4, j + 3C/4`` (2 bits), lowest bits first, so
each plane unpacks as one contiguous run. 3 bits are the low two bits as ``C/4`` bytes in the 2-bit
layout, followed by the top bit as ``C/8`` bytes in eight planes: exactly 3 bits a weight.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from .spec import check_bits

CODES_MULTIPLE = {2: 4, 3: 8, 4: 2, 8: 1}


def fold_factor(rows: int, columns: int, bits: int) -> int:
    """How many rows fold into one: the smallest suitable divisor of ``rows``, else ``rows``."""
    multiple = CODES_MULTIPLE[check_bits(bits)]
    needed = multiple // gcd(multiple, columns)
    return needed if rows % needed == 0 else rows


def folded_codes(rows: int, columns: int, bits: int) -> int:
    """Number of codes ``C`` in one folded row, padding included."""
    multiple = CODES_MULTIPLE[check_bits(bits)]
    codes = fold_factor(rows, columns, bits) * columns
    return -(-codes // multiple) * multiple


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Shape of the packed uint8 tensor of a ``[rows, columns]`` code matrix."""
    return rows // fold_factor(rows, columns, bits), folded_codes(rows, columns, bits) * bits // 8


def _pack_planes(codes: Tensor, width: int) -> Tensor:
    """Pack ``[n, C]`` codes of ``width`` bits (1, 2 or 4) as planes: ``[n, C*width/8]`` uint8."""
    planes = codes.unflatten(1, (8 // width, -1))
    packed = planes[:, 0].clone()
    for plane in range(1, 8 // width):
        packed.bitwise_or_(planes[:, plane] << (plane * width))
    return packed


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack a code matrix.

    Args:
        codes: ``[rows, K]`` uint8, every value below ``2**bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 tensor of shape ``packed_shape(rows, K, bits)``.
    """
    rows, columns = codes.shape
    folded = codes.reshape(rows // fold_factor(rows, columns, bits), -1)
    padding = folded_codes(rows, columns, bits) - folded.shape[1]
    if padding:
        folded = torch.nn.functional.pad(folded, (0, padding))
    if bits == 8:
        return folded.contiguous()
    if bits == 3:
        return torch.cat([_pack_planes(folded & 3, 2), _pack_planes(folded >> 2, 1)], dim=1)
    return _pack_planes(folded, bits)


def _unpack_planes(packed: Tensor, width: int) -> Tensor:
    """Invert `_pack_planes`: ``[n, C]`` codes of ``width`` bits."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts.unsqueeze(1)) & (2**width - 1)).flatten(1)


def unpack(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Invert `pack`: ``[rows, columns]`` uint8 codes."""
    if bits == 8:
        folded = packed.clone()
    elif bits == 3:
        border = packed.shape[1] // 3 * 2
        low = _unpack_planes(packed[:, :border], 2)
        folded = low | (_unpack_planes(packed[:, border:], 1) << 2)
    else:
        folded = _unpack_planes(packed, bits)
    used = rows * columns // packed.shape[0]
    return folded[:, :used].reshape(rows, columns)
