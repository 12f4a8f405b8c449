"""A packed quantized weight: the integers, their scales, and how to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import quantizer
from .dequantize import dequantize_into
from .errors import QuantTuneError
from .low_rank import LowRank
from .packing import pack, unpack
from .spec import QuantSpec


def check_split(split: int | None, shape: tuple[int, ...]) -> None:
    """Raise `QuantTuneError` unless ``split`` cuts the second dimension of ``shape`` in two."""
    if split is None:
        return
    if isinstance(split, bool) or not isinstance(split, int) or not 0 < split < shape[1]:
        raise QuantTuneError(
            f"The input split is {split!r}, but a weight of shape {list(shape)} can only be "
            f"split between 1 and {shape[1] - 1}."
        )


@dataclass
class QuantizedWeight:
    """The weight of a Linear or convolution in ``bits`` bits, ``scale * (q - zero_point)``.

    Attributes:
        packed: uint8 codes in the layout of `packing.pack`, rows being output channels.
        scale: ``[out, P]`` float32, ``P`` = 2 with a ``split``, else 1.
        zero_point: ``[out, P]`` float32 holding integers.
        bits: 2, 3, 4 or 8.
        shape: logical shape, ``(out, in / groups, *kernel)``.
        split: number of input channels in the first part, or None. Each part has its own scale and
            zero point, as Q-Diffusion quantizes the shortcuts that join two feature maps.
        symmetric: whether the zero point is fixed at ``2**(bits - 1)``.
        low_rank: what a LoRA adds to the weight, or None. It is no part of the integers: it counts
            wherever a float weight is made or multiplied, and nowhere else.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    shape: tuple[int, ...]
    split: int | None = None
    symmetric: bool = False
    low_rank: LowRank | None = None

    @classmethod
    def quantize(cls, weight: Tensor, spec: QuantSpec, split: int | None = None) -> QuantizedWeight:
        """Quantize a float weight of shape ``[out, in / groups, ...]``.

        Raises:
            QuantTuneError: NaN or infinite weights, fewer than two dimensions, a wrong split.
        """
        shape = tuple(weight.shape)
        if len(shape) < 2 or weight.numel() == 0:
            raise QuantTuneError(
                f"A weight of shape {list(shape)} cannot be quantized; keep this layer in float."
            )
        check_split(split, shape)
        w2d = weight.detach().reshape(shape[0], -1)
        border = None if split is None else split * math.prod(shape[2:])
        scales, zero_points, codes = [], [], []
        for part in [w2d] if border is None else [w2d[:, :border], w2d[:, border:]]:
            scale, zero_point = quantizer.choose_qparams(part, spec)
            codes.append(quantizer.quantize_codes(part, scale, zero_point, spec.bits))
            scales.append(scale)
            zero_points.append(zero_point)
        return cls(
            packed=pack(codes[0] if border is None else torch.cat(codes, dim=1), spec.bits),
            scale=torch.stack(scales, dim=1),
            zero_point=torch.stack(zero_points, dim=1),
            bits=spec.bits,
            shape=shape,
            split=split,
            symmetric=spec.symmetric,
        )

    @property
    def parts(self) -> int:
        """Number of separately scaled groups of input channels, 1 or 2."""
        return 1 if self.split is None else 2

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.packed.device

    def codes(self) -> Tensor:
        """The integers, ``[out, K]`` uint8."""
        return unpack(self.packed, self.bits, self.shape[0], self.numel // self.shape[0])

    def stored(self) -> Tensor:
        """The packed codes for a file."""
        return self.packed

    def dequantize(
        self,
        dtype: torch.dtype = torch.float32,
        r_out: Tensor | None = None,
        s_in: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The float weight ``r_out * (scale * (q - zero_point) + low_rank) * s_in``.

        Args:
            dtype: of the result; ignored when ``out`` is given.
            r_out: ``[out, P]`` float32 or None.
            s_in: ``[in]`` float32 or None.
            out: contiguous buffer of the logical shape to write to, or None for a new tensor.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        return dequantize_into(
            out,
            self.packed,
            self.scale,
            self.zero_point,
            self.bits,
            self.split,
            r_out,
            s_in,
            self.low_rank,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QuantizedWeight:
        """The same weight on another device."""
        moved = [t.to(device, non_blocking=non_blocking) for t in self._tensors()]
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = low_rank.to(device, low_rank.up.dtype)
        return replace(
            self, packed=moved[0], scale=moved[1], zero_point=moved[2], low_rank=low_rank
        )

    def error(self, weight: Tensor) -> float:
        """Relative Frobenius error against the float ``weight``; 0 for an all-zero weight."""
        reference = weight.detach().to(self.device, torch.float32)
        norm = float(torch.linalg.vector_norm(reference))
        difference = self.dequantize().sub_(reference)
        return float(torch.linalg.vector_norm(difference)) / norm if norm else 0.0

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed, self.scale, self.zero_point
