"""Fake quantization: a float layer that computes what its integers will, and can learn.

Step sizes learn as in LSQ (Esser et al. 2020), activation ranges by both ends (Bhalgat et al. 2020,
LSQ+), weights straight through the rounding (Bengio et al. 2013). Everything is relative to where
it started, so that one learning rate suits all layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import QuantTuneError
from .int8.activation import STEPS, TINY
from .int8.backend import ConvGeometry
from .packing import pack
from .weight import QuantizedWeight

SMALLEST = 0.05
"""Of a relative step size or range: what learns must not turn around."""


class _QuantizeActivation(torch.autograd.Function):
    """``scale * (clamp(floor(x / scale + z + 1/2), 0, 255) - z)`` for a range ``[low, high]``."""

    @staticmethod
    def forward(ctx, x, low, high):
        scale = ((high - low) / STEPS).clamp(min=TINY).to(torch.float32)
        zero_point = torch.round(-low.float() / scale)
        codes = torch.floor(x.float() / scale + (zero_point + 0.5)).clamp_(0, 255)
        y = codes.sub_(zero_point).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, y, low, high, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, low, high, scale = ctx.saved_tensors
        below, above = x < low, x > high
        inside = ~(below | above)
        dx = grad * inside
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return dx, None, None
        # Inside, y = x + residual * step; outside, y is the end itself.
        grown = (dx.float() * (y.float() - x.float())).sum() / (scale * STEPS)
        grad = grad.float()
        return dx, (grad * below).sum() - grown, (grad * above).sum() + grown


class _QuantizeWeight(torch.autograd.Function):
    """``r * clamp(round(u / r), low, high)``: weights ``u`` in units of their first step size."""

    @staticmethod
    def forward(ctx, u, r, low, high):
        v = u / r
        q = torch.minimum(torch.maximum(v.round(), low), high)
        ctx.save_for_backward(u, r, low, high)
        return q * r

    @staticmethod
    def backward(ctx, grad):
        u, r, low, high = ctx.saved_tensors
        v = u / r
        inside = (v >= low - 0.5) & (v <= high + 0.5)
        q = torch.minimum(torch.maximum(v.round(), low), high)
        dr = grad * torch.where(inside, q - v, q)
        dims = [d for d, n in enumerate(r.shape) if n == 1]
        return grad * inside, dr.sum(dims, keepdim=True), None, None


def quantize_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` as 8-bit integers would give it back, differentiable in all three.

    Args:
        x: activations.
        low, high: ends of the range, scalars with ``low <= 0 <= high``.
    """
    return _QuantizeActivation.apply(x, low, high)


class FakeQuantLayer(nn.Module):
    """A Linear or Conv2d over simulated integers (Diffusia's QAT).

    Args:
        qweight: the integers to start from.
        conv: None for a Linear.
        ranges: ``[N, P, 2]`` static activation ranges, or None for the range of the moment.
        weight: the float weight, to train what is rounded; None leaves the integers as they are
            and trains their step sizes alone.

    Attributes:
        r_out: ``[out, P]`` step sizes over those of ``qweight``.
        ends: ``[N, P, 2]`` ends of the ranges over those of ``ranges``, or None.
        steps: the weight in units of the first step sizes, or None.
        buckets: of the samples in the next forward.
    """

    def __init__(
        self,
        qweight: QuantizedWeight,
        conv: ConvGeometry | None,
        ranges: Tensor | None = None,
        weight: Tensor | None = None,
    ):
        super().__init__()
        if weight is not None and tuple(weight.shape) != qweight.shape:
            raise QuantTuneError(
                f"A float weight of shape {list(weight.shape)} does not belong to integers of "
                f"shape {list(qweight.shape)}; use the model that was quantized."
            )
        # Clones: autograd does not take tensors that were made in inference mode.
        qweight = replace(
            qweight, scale=qweight.scale.clone(), zero_point=qweight.zero_point.clone()
        )
        self.qweight, self.conv = qweight, conv
        self.buckets: tuple[int, ...] = (0,)
        border = qweight.shape[1] if qweight.split is None else qweight.split
        self.columns = [slice(0, border), slice(border, qweight.shape[1])][: qweight.parts]
        self.r_out = nn.Parameter(torch.ones_like(qweight.scale))
        self.register_buffer("ranges", None if ranges is None else ranges.clone())
        self.ends = None if ranges is None else nn.Parameter(torch.ones_like(ranges))
        self.steps = None
        if weight is not None:
            steps = [
                self._rows(weight[:, c].float(), 1 / qweight.scale[:, i])
                for i, c in enumerate(self.columns)
            ]
            self.steps = nn.Parameter(torch.cat(steps, 1))

    def _rows(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``weight`` with each output channel times its factor."""
        return weight * factor.view(-1, *[1] * (weight.dim() - 1))

    def _ratio(self) -> Tensor:
        return self.r_out.clamp(min=SMALLEST)

    def _limits(self, part: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest integer of each output channel, shaped for the weight."""
        shape = (-1, *[1] * (len(self.qweight.shape) - 1))
        zero_point = self.qweight.zero_point[:, part].view(shape)
        return -zero_point, 2**self.qweight.bits - 1 - zero_point

    def weight_of(self, part: int) -> Tensor:
        """The float32 weight of a part of the input channels, as its integers give it."""
        scale, ratio = self.qweight.scale[:, part], self._ratio()[:, part]
        if self.steps is None:
            whole = self.qweight.dequantize()[:, self.columns[part]]
            return self._rows(whole, ratio)
        shape = (-1, *[1] * (len(self.qweight.shape) - 1))
        steps = self.steps[:, self.columns[part]]
        rounded = _QuantizeWeight.apply(steps, ratio.view(shape), *self._limits(part))
        return self._rows(rounded, scale)

    def range_of(self, part: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the activation range in this forward."""
        if self.ranges is None:
            low, high = torch.aminmax(x.detach().float())
            return low.clamp(max=0.0), high.clamp(min=0.0)
        now = self.current_ranges()[sorted(set(self.buckets)), part]
        return now[:, 0].amin(), now[:, 1].amax()

    def current_ranges(self) -> Tensor:
        """``[N, P, 2]`` as learnt."""
        return self.ranges * self.ends.clamp(min=SMALLEST)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output in the dtype of ``x``.

        Args:
            x: ``[..., in]``, or ``[batch, in, height, width]`` for a convolution.
            bias: ``[out]`` or None.
        """
        total = None
        for part, columns in enumerate(self.columns):
            own = (
                x
                if len(self.columns) == 1
                else (x[..., columns] if self.conv is None else x[:, columns])
            )
            own = quantize_activation(own, *self.range_of(part, own))
            weight = self.weight_of(part).to(x.dtype)
            if self.conv is None:
                y = F.linear(own, weight)
            else:
                c = self.conv
                y = F.conv2d(own, weight, None, c.stride, c.padding, c.dilation, c.groups)
            total = y if total is None else total + y
        if bias is None:
            return total
        shape = (-1,) if self.conv is None else (-1, 1, 1)
        return total + bias.to(total.dtype).view(shape)

    @torch.no_grad()
    def export(self) -> tuple[QuantizedWeight, Tensor | None]:
        """The integers and step sizes as learnt, and the activation ranges ``[N, P, 2]``."""
        qweight = replace(self.qweight, scale=self.qweight.scale * self._ratio())
        if self.steps is not None:
            shape = (-1, *[1] * (len(qweight.shape) - 1))
            codes = []
            for part, columns in enumerate(self.columns):
                ratio = self._ratio()[:, part].view(shape)
                low, high = self._limits(part)
                q = torch.minimum(
                    torch.maximum((self.steps[:, columns] / ratio).round(), low), high
                )
                codes.append((q - low).to(torch.uint8))
            whole = torch.cat(codes, 1).flatten(1).cpu()
            qweight = replace(qweight, packed=pack(whole, qweight.bits))
        ranges = None if self.ranges is None else self.current_ranges().detach().cpu().clone()
        return qweight.to("cpu"), ranges
