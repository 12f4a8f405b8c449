"""A frozen low-rank term beside a packed weight: ``W = scale * (q - zero_point) + up @ down``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``up @ down``, what one or several LoRAs add to a layer's weight.

    Attributes:
        up: ``[out, R]``, strengths included.
        down: ``[R, K]``, ``K`` the columns of the weight matrix (``in / groups`` times kernel).
    """

    up: Tensor
    down: Tensor

    @classmethod
    def join(
        cls,
        terms: Iterable[tuple[Tensor, Tensor, float]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LowRank:
        """The sum of ``factor * up @ down`` over ``terms``, their ranks one after the other.

        Args:
            terms: at least one ``(up [out, r, ...], down [r, ...], factor)``, for instance the
                weights of 1x1 and 3x3 convolutions; ``r`` may differ.
            dtype: of the result. The two factors share each rank's magnitude by a power of two, so
                that half precision rounds the product to its last digit and no more.
            device: of the result.
        """
        ups, downs = [], []
        for up, down, factor in terms:
            up = up.detach().to(device, torch.float32).flatten(1) * factor
            down = down.detach().to(device, torch.float32).flatten(1)
            ups.append(up)
            downs.append(down)
        up, down = torch.cat(ups, 1), torch.cat(downs)
        ratio = down.abs().amax(1) / up.abs().amax(0)
        shift = ratio.log2().div(2).round()
        # A rank that adds nothing has no magnitude to share.
        shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift)).exp2()
        return cls((up * shift).to(dtype), (down / shift[:, None]).to(dtype))

    @property
    def rank(self) -> int:
        """``R``, the sum of the ranks joined."""
        return self.down.shape[0]

    def cheaper_beside(self, positions: int) -> bool:
        """Whether to multiply activations by ``down`` and ``up`` rather than to add the product.

        ``positions`` is how many vectors of inputs the layer multiplies. Both ways are exact; the
        first costs ``R * (out + K)`` multiply-adds a position, the second ``R * out * K`` once.
        """
        outputs, columns = self.up.shape[0], self.down.shape[1]
        return positions * (outputs + columns) < outputs * columns

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRank:
        """The same term elsewhere or in another precision."""
        return LowRank(self.up.to(device, dtype), self.down.to(device, dtype))

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight + up @ down`` in the dtype and logical shape of ``weight``."""
        term = self.to(weight.device, torch.float32)
        total = torch.addmm(weight.flatten(1).float(), term.up, term.down)
        return total.view(weight.shape).to(weight.dtype)

    def scaled(self, r_out: Tensor | None, column_scale: Tensor | None) -> LowRank:
        """``r_out * (up @ down) * column_scale`` of vectors ``[out]`` and ``[K]``, or None."""
        up = self.up if r_out is None else self.up * r_out[:, None]
        down = self.down if column_scale is None else self.down * column_scale
        return LowRank(up, down)
