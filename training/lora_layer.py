"""The LoRA of one layer, as files hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite


@dataclass(frozen=True)
class LoraLayer:
    """A low-rank change of one Linear or convolution: ``W + alpha / r * (up @ down)``.

    Source: Hu et al., *LoRA*, ICLR 2022; for convolutions the form of kohya's and LyCORIS' files.

    Attributes:
        down: ``[r, in]``, or ``[r, in / groups, kh, kw]`` of a convolution. As all tensors here
            float32 on the CPU, converted where need be.
        up: ``[out, r]``, or ``[out, r, 1, 1]``.
        alpha: the number that is divided by the rank to scale the product.
        dora_scale: DoRA's magnitudes as stock files hold them, ``[out, 1]`` (or ``[1, in]``, each
            with a 1 for every axis of the kernel), or None. See `stock_magnitude`.

    Raises:
        QuantTuneError: NaN or infinite values, or shapes that do not belong together.
    """

    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("down", "up", "dora_scale"):
            value = getattr(self, name)
            if value is None:
                continue
            value = value.detach().to("cpu", torch.float32).contiguous()
            object.__setattr__(self, name, value)
            if not is_finite(value):
                raise QuantTuneError(f"Its '{name}' holds NaN or infinite values; train it again "
                                     "with a lower learning rate, or use another file.")
        object.__setattr__(self, "alpha", float(self.alpha))
        if not math.isfinite(self.alpha):
            raise QuantTuneError(f"Its alpha is {self.alpha}, which is no number; use another "
                                 "file.")
        down, up = self.down, self.up
        if down.ndim < 2 or up.ndim != down.ndim or not down.numel() or not up.numel() or (
                up.shape[1] != down.shape[0] or any(n != 1 for n in up.shape[2:])):
            raise QuantTuneError(f"Its down and up of shapes {list(down.shape)} and "
                                 f"{list(up.shape)} do not belong together; use another file.")
        if self.dora_scale is not None and self.dora_scale.shape not in self._magnitudes():
            raise QuantTuneError(
                f"Its DoRA magnitudes have shape {list(self.dora_scale.shape)}, which does not fit "
                f"a weight of {list(self.weight_shape)}; use another file.")

    def _magnitudes(self) -> tuple[torch.Size, torch.Size]:
        ones = [1] * (self.down.ndim - 2)
        return (torch.Size([self.weight_shape[0], 1, *ones]),
                torch.Size([1, self.weight_shape[1], *ones]))

    @property
    def rank(self) -> int:
        """r, the number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes, ``(out, in / groups, *kernel)``."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """``alpha / r * (up @ down)`` in the shape of the weight; of a DoRA before its magnitudes.
        """
        product = self.up.flatten(1) @ self.down.flatten(1)
        return product.mul_(self.alpha / self.rank).reshape(self.weight_shape)

    def check_rank(self) -> None:
        """Raise QuantTuneError for more rank than the weight has rows or columns."""
        most = largest_rank(self.weight_shape)
        if self.rank > most:
            raise QuantTuneError(
                f"Its rank is {self.rank}, but a weight of shape {list(self.weight_shape)} has no "
                f"more than {most}; choose a rank of {most} or less.")


def largest_rank(weight_shape: tuple[int, ...]) -> int:
    """The smaller side of a weight as a matrix: more rank than that changes nothing more."""
    return min(weight_shape[0], math.prod(weight_shape[1:]))


def stock_magnitude(magnitude: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """peft's DoRA magnitudes in the form in which ComfyUI applies them.

    Both scale each output channel. peft computes ``m * (W + D) / |W + D|``, as the paper does (Liu
    et al., *DoRA*, 2024); ComfyUI divides by ``|W|``. So the result is ``m * |W| / |W + D|``, which
    is exact on the weight it was made with.

    Args:
        magnitude: m, ``out`` values in any shape.
        weight: W, ``[out, ...]`` float.
        delta: D, as `LoraLayer.delta` gives it.

    Returns:
        ``[out, 1, ...]`` float32 for `LoraLayer.dora_scale`.
    """
    return _by_row(magnitude, weight, delta, lambda own, changed: own / changed)


def peft_magnitude(dora_scale: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """The way back from `stock_magnitude`: ``[out, 1, ...]`` float32."""
    return _by_row(dora_scale, weight, delta, lambda own, changed: changed / own)


def _by_row(values: Tensor, weight: Tensor, delta: Tensor, ratio) -> Tensor:
    weight = weight.detach().to("cpu", torch.float32)
    shape = (weight.shape[0], *[1] * (weight.ndim - 1))
    tiny = torch.finfo(torch.float32).tiny
    own = weight.flatten(1).norm(dim=1).clamp_min(tiny)
    changed = (weight + delta.to(weight)).flatten(1).norm(dim=1).clamp_min(tiny)
    values = values.detach().to("cpu", torch.float32).reshape(-1)
    return (values * ratio(own, changed)).reshape(shape)
