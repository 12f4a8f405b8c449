"""Integer weights for integer products: any packed bit width as signed 8-bit values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weight import QuantizedWeight


@dataclass(frozen=True)
class Int8Weight:
    """``scale * (values + offset)``, the weight of a layer for an integer product.

    Attributes:
        values: int8 ``[out, in / groups, *kernel]``.
        scale: ``[out]`` float32.
        offset: ``[out]`` float32 holding integers that are added to each row, or None for zeros.
            Only asymmetric 8-bit codes (and zero points far outside of fewer bits) need one.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None = None

    @classmethod
    def parts(cls, qweight: QuantizedWeight) -> list[tuple[slice, Int8Weight]]:
        """The weight as one or two integer weights, each with the input channels it reads.

        ``codes - zero_point`` is kept as it is where it fits into 8 signed bits, which it does for
        symmetric 8-bit weights and all usual ones of 4 bits and fewer; else the middle of the
        codes is subtracted and the rest goes to ``offset``. Either way nothing is rounded.
        """
        border = qweight.split
        inputs = qweight.shape[1]
        columns = (
            [slice(0, inputs)] if border is None else [slice(0, border), slice(border, inputs)]
        )
        codes = qweight.codes().view(qweight.shape).to(torch.int16)
        shape = (-1, *[1] * (len(qweight.shape) - 1))
        return [
            (part, cls._part(codes[:, part], qweight, index, shape))
            for index, part in enumerate(columns)
        ]

    @classmethod
    def _part(cls, codes: Tensor, qweight: QuantizedWeight, index: int, shape) -> Int8Weight:
        zero_point = qweight.zero_point[:, index]
        middle = 2 ** (qweight.bits - 1)
        lowest, highest = torch.aminmax(codes.flatten(1), dim=1)
        fits = bool((lowest - zero_point >= -128).all() and (highest - zero_point <= 127).all())
        if fits:
            values = codes - zero_point.to(torch.int16).view(shape)
            offset = None
        else:
            values, offset = codes - middle, middle - zero_point
        return cls(values.to(torch.int8).contiguous(), qweight.scale[:, index].contiguous(), offset)

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        shape = (-1, *[1] * (self.values.dim() - 1))
        values = self.values.float()
        if self.offset is not None:
            values = values + self.offset.view(shape)
        return values * self.scale.view(shape)
