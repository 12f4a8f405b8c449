"""A layer of a Q-Diffusion checkpoint that is still in its file (see `qdiffusion`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import QuantTuneError
from .limits import is_finite
from .packing import pack, packed_shape
from .paging import let_go
from .torch_archive import StoredTensor
from .weight import QuantizedWeight
from .whole_file import Later


@dataclass(frozen=True)
class Rounding:
    """One quantizer of a layer: of all its input channels, or of those on one side of a split.

    Attributes:
        delta, zero_point: ``[out]`` float32.
        alpha: of the shape of the weights it rounds, or None: to nearest.
        steps: ``[out]`` float32, ``(highest - lowest weight) / delta``.
    """

    delta: Tensor
    zero_point: Tensor
    alpha: StoredTensor | None
    steps: Tensor


@dataclass(frozen=True)
class QDiffusionLayer:
    """A layer whose integers are computed from the file when they are asked for.

    It has what a `QuantizedWeight` has; `weight` gives that, in memory.

    Attributes:
        name: of the layer, without the file's prefix.
        bits: bit width.
        shape: ``[out, in, *kernel]``.
        split: number of input channels of the first part, or None.
        scale, zero_point: ``[out, P]`` float32; the latter holds whole numbers of any size.
    """

    name: str
    bits: int
    shape: tuple[int, ...]
    split: int | None
    scale: Tensor = field(repr=False)
    zero_point: Tensor = field(repr=False)
    _weight: StoredTensor = field(repr=False)
    _roundings: tuple[Rounding, ...] = field(repr=False)
    symmetric: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def codes(self) -> Tensor:
        """The integers, ``[out, K]`` uint8.

        Raises:
            QuantTuneError: the file was changed, cannot be read, or an alpha is NaN or infinite.
        """
        let_go(8 * self.numel)  # the blocks of the layer before, or of one much like it
        codes = torch.empty(self.shape[0], self.numel // self.shape[0], dtype=torch.uint8)
        for block, weight in self._weight.blocks():
            values = weight.flatten(1)
            for columns, rounding in zip(self._columns(), self._roundings):
                part = values[:, columns]
                part.div_(rounding.delta[block, None])
                if rounding.alpha is None:
                    part.round_()
                else:
                    alpha = rounding.alpha.rows(block).flatten(1)
                    if not is_finite(alpha):
                        raise QuantTuneError(
                            f"The layer {self.name[:100]!r} of {self._weight.path} has NaN or an "
                            "infinity in its alpha; download the checkpoint again or choose "
                            "another."
                        )
                    part.floor_().add_(alpha >= 0)
                part.add_(rounding.zero_point[block, None]).clamp_(0, 2**self.bits - 1)
            codes[block].copy_(values)
        return codes

    def _columns(self) -> list[slice]:
        if self.split is None:
            return [slice(None)]
        border = self.split * math.prod(self.shape[2:])
        return [slice(0, border), slice(border, None)]

    @property
    def packed(self) -> Tensor:
        """The packed codes, computed anew each time."""
        return pack(self.codes(), self.bits)

    def stored(self) -> Later:
        """The packed codes for a file, computed when they are written."""
        shape = packed_shape(self.shape[0], self.numel // self.shape[0], self.bits)
        return Later(torch.uint8, shape, lambda: self.packed)

    def weight(self) -> QuantizedWeight:
        """The layer in memory, independent of the file."""
        return QuantizedWeight(
            self.packed, self.scale, self.zero_point, self.bits, self.shape, self.split
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight that the integers stand for, in the shape of the original one."""
        return self.weight().dequantize(dtype)
