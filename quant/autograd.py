"""The gradient of a quantized layer with respect to its scales and input, and nothing more.

For ``y = sum_p r_p * f_p(x_p * s_p) + b`` (eq. 5) with ``g`` the gradient of ``y``:

- ``dL/dr_p = sum of g * f_p(x_p * s_p)`` over samples and positions,
- ``dL/dx   = s * f^T(r * g)``,
- ``dL/ds   = sum of x * f^T(r * g)``.

The gradient of a weight is never formed. The float weight is built in a scratch buffer in the
forward and again in the backward, so that between the two nothing of its size is alive: a layer
keeps its input only when ``s`` trains and its output only when ``r`` trains, both of which other
layers mostly keep anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scales import LayerScales
from .scratch import WEIGHTS
from .weight import QuantizedWeight


@dataclass(frozen=True)
class LinearProduct:
    """``x @ weight.T`` and its input gradient; channels are the last dimension."""

    channel_dim: int = -1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer."""
        return F.linear(x, weight, bias)

    def input_gradient(self, shape: Sequence[int], weight: Tensor, grad: Tensor) -> Tensor:
        """Gradient of an input of ``shape`` from that of the output."""
        return grad @ weight


@dataclass(frozen=True)
class Conv2dProduct:
    """A convolution and its input gradient; channels are the third dimension from the end."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    channel_dim: int = -3

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: Sequence[int], weight: Tensor, grad: Tensor) -> Tensor:
        """Gradient of an input of ``shape`` from that of the output."""
        return torch.nn.grad.conv2d_input(
            shape, weight, grad, self.stride, self.padding, self.dilation, self.groups
        )


def conv2d_product(stride, padding, dilation, groups, kernel) -> Conv2dProduct | None:
    """A `Conv2dProduct` of `torch.nn.functional.conv2d`'s arguments.

    None for "same" padding that is not equal on both sides, which has no such closed form.
    """

    def pair(value: int | Sequence[int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    dilation = pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(r % 2 for r in reach):
            return None
        padding = [r // 2 for r in reach]
    return Conv2dProduct(pair(stride), pair(padding), dilation, groups)


class ScaledProduct(torch.autograd.Function):
    """A quantized layer whose scales train (TuneQDM eq. 5) or whose input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        r_out: Tensor | None,
        s_in: Tensor | None,
        bias: Tensor | None,
        qweight: QuantizedWeight,
        product: LinearProduct | Conv2dProduct,
    ) -> Tensor:
        """Run the layer.

        Args:
            ctx: autograd's.
            x: ``[batch, ...]``.
            r_out: ``[1 or batch, P * out]`` float32 or None; one row is folded into the weight.
            s_in: ``[1 or batch, in]`` float32 or None.
            bias: frozen, ``[out]`` in the dtype of ``x``, or None.
            qweight: the frozen integers.
            product: the layer.
        """
        # Kept as they are: the host makes them in inference mode, and autograd would refuse those.
        ctx.bias, ctx.qweight, ctx.product = bias, qweight, product
        ctx.shape, ctx.dtype = x.shape, x.dtype
        folded = r_out is None or r_out.shape[0] == 1
        weight = _weight(qweight, x, *((r_out, s_in) if folded else (None, None)))
        z = x if folded or s_in is None else _times(x, s_in, product)
        if qweight.split is None:
            terms = [product.forward(z, weight, bias if folded else None)]
        else:
            cut = qweight.split
            zs = z.split([cut, z.shape[product.channel_dim] - cut], product.channel_dim)
            terms = [
                product.forward(zs[0], weight[:, :cut], None),
                product.forward(zs[1], weight[:, cut:], bias if folded else None),
            ]
        if folded:
            y = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        else:
            terms = [_times(u, r, product) for u, r in zip(terms, r_out.chunk(len(terms), 1))]
            y = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            if bias is not None:
                y = y + _channels(bias, product)
        _, needs_r, needs_s, *_ = ctx.needs_input_grad
        # What r_1 scales is the difference of these two, so that one of the terms is enough.
        first = terms[0] if needs_r and len(terms) == 2 else None
        ctx.save_for_backward(x if needs_s else None, r_out, s_in, y if needs_r else None, first)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``r_out`` and ``s_in``."""
        x, r_out, s_in, y, first = ctx.saved_tensors
        qweight, product = ctx.qweight, ctx.product
        needs_x, needs_r, needs_s, *_ = ctx.needs_input_grad
        grad_x = grad_r = grad_s = None
        rows = 1 if r_out is None else r_out.shape[0]
        if needs_r:
            # g * (y - b) / r rather than g * f(x): y is alive already.
            total = _reduce(grad, y, rows, product)
            if ctx.bias is not None:
                total = total - _reduce(grad, None, rows, product) * ctx.bias.float()
            if first is not None:
                part = _reduce(grad, first, rows, product)
                total = torch.cat([part, total - part], 1)
            grad_r = total / _nonzero(r_out)
        if needs_x or needs_s:
            folded = rows == 1
            weight = _weight(
                qweight, grad, *((r_out, s_in) if folded else (None, None)), dtype=ctx.dtype
            )
            if folded:
                grad_z = product.input_gradient(ctx.shape, weight, grad)
            elif qweight.split is None:
                grad_z = product.input_gradient(ctx.shape, weight, _times(grad, r_out, product))
            else:
                grad_z = _split_input_gradient(ctx, weight, grad, r_out)
            if needs_s:
                grad_s = _reduce(grad_z, x, rows, product)
                if folded:
                    grad_s = grad_s / _nonzero(s_in)
            if needs_x:
                grad_x = grad_z if folded or s_in is None else _times(grad_z, s_in, product)
        return grad_x, grad_r, grad_s, None, None, None


def _split_input_gradient(ctx: Any, weight: Tensor, grad: Tensor, r_out: Tensor) -> Tensor:
    """The input gradient of a layer in two parts whose samples have scales of their own."""
    product, cut = ctx.product, ctx.qweight.split
    shape, parts = list(ctx.shape), []
    for r, part in zip(r_out.chunk(2, 1), (weight[:, :cut], weight[:, cut:])):
        shape[product.channel_dim] = part.shape[1]
        parts.append(product.input_gradient(shape, part, _times(grad, r, product)))
    return torch.cat(parts, product.channel_dim)


def scaled_product(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    scales: LayerScales | None,
    product: LinearProduct | Conv2dProduct,
) -> Tensor:
    """`ScaledProduct` on a layer's scales; differentiable in them and in ``x``, not in the bias."""
    r_out = s_in = None
    if scales is not None:
        r_out, s_in = (_spread(t, x.shape[0]) for t in (scales.r_out, scales.s_in))
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    bias = None if bias is None else bias.detach().to(x.dtype)
    with torch.autocast(device, enabled=False):
        return ScaledProduct.apply(x, r_out, s_in, bias, qweight, product)


def _spread(rows: Tensor | None, batch: int) -> Tensor | None:
    """One row, or one a sample where there was one for an equal run of samples."""
    if rows is None or rows.shape[0] in (1, batch):
        return rows
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


def _weight(qweight, like, r_out=None, s_in=None, dtype=None) -> Tensor:
    """The float weight in this thread's scratch buffer, with one row of scales folded in."""
    out = WEIGHTS.get(qweight.shape, dtype or like.dtype, qweight.device)
    r = None if r_out is None else r_out.detach().view(qweight.parts, -1).t()
    return qweight.dequantize(r_out=r, s_in=None if s_in is None else s_in.detach()[0], out=out)


def _channels(values: Tensor, product: LinearProduct | Conv2dProduct) -> Tensor:
    """A vector or rows of channels shaped to multiply activations."""
    return values.reshape(*values.shape, *[1] * (-product.channel_dim - 1))


def _times(x: Tensor, rows: Tensor, product: LinearProduct | Conv2dProduct) -> Tensor:
    """``x * rows`` by sample, keeping a change of ``rows`` that half precision would lose."""
    middle = x.dim() - 1 + product.channel_dim
    factor = _channels(rows.reshape(rows.shape[0], *[1] * middle, rows.shape[1]), product)
    if x.dtype == factor.dtype:
        return x * factor
    return torch.addcmul(x, x, (factor - 1).to(x.dtype))


def _reduce(a: Tensor, b: Tensor | None, rows: int, product) -> Tensor:
    """``a * b`` summed over positions, and over samples if ``rows`` is 1: float32 [rows, C]."""
    values = a if b is None else a * b
    keep = {values.dim() + product.channel_dim, *([0] if rows > 1 else [])}
    gone = [d for d in range(values.dim()) if d not in keep]
    # An empty list of dimensions would mean all of them.
    summed = values.sum(gone, dtype=torch.float32) if gone else values.float()
    return summed.view(rows, -1)


def _nonzero(values: Tensor) -> Tensor:
    """Scales to divide by; one that is 0 within float32's last digits counts as that small."""
    tiny = torch.finfo(torch.float32).eps
    return torch.where(values.abs() < tiny, torch.full_like(values, tiny), values)
