"""Linear and convolution with a quantized weight and per-sample scales (eq. 5).

``y = sum_p r_out_p * f_p(x_p * s_in_p) + b``, where ``f`` is the frozen layer without its bias and
``p`` runs over the one or two parts that the layer's input channels were quantized in. A LoRA's
low-rank term belongs to ``f``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import LinearProduct, conv2d_product, scaled_product
from .errors import QuantTuneError
from .low_rank import LowRank
from .scales import LayerScales
from .scratch import WEIGHTS
from .weight import QuantizedWeight

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""A layer as ``product(x, weight, bias)``."""

LINEAR_CHANNELS = -1
CONV2D_CHANNELS = -3


def linear(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    scales: LayerScales | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` with a quantized weight.

    Args:
        x: ``[batch, ..., in]``.
        qweight: of logical shape ``[out, in]``.
        bias: ``[out]`` or None; never scaled.
        scales: one row for all samples, or one row per sample (or per equal run of samples).

    Raises:
        QuantTuneError: the rows of ``scales`` do not fit the batch, or its channels the weight.
    """
    if _trains(x, scales, bias):
        _check(qweight, scales, 1, x)
        return scaled_product(x, qweight, bias, scales, LinearProduct())
    positions = x.numel() // x.shape[-1]
    return _quantized(x, F.linear, LINEAR_CHANNELS, qweight, bias, scales, 1, positions)


def conv2d(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    scales: LayerScales | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d` with a quantized weight; see `linear`."""
    if _trains(x, scales, bias) and x.dim() == 4:
        closed = conv2d_product(stride, padding, dilation, groups, qweight.shape[2:])
        if closed is not None:
            _check(qweight, scales, groups, x)
            return scaled_product(x, qweight, bias, scales, closed)
    product = partial(_conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups)
    strides = stride**2 if isinstance(stride, int) else stride[0] * stride[1]
    positions = x.numel() // (x.shape[CONV2D_CHANNELS] * strides)
    return _quantized(x, product, CONV2D_CHANNELS, qweight, bias, scales, groups, positions)


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scales: LayerScales | None = None,
    split: int | None = None,
) -> Tensor:
    """`linear` with an ordinary float weight, for instance one that a LoRA has patched."""
    return apply_scales(x, F.linear, LINEAR_CHANNELS, weight, bias, scales, split)


def scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    scales: LayerScales | None = None,
    split: int | None = None,
) -> Tensor:
    """`conv2d` with an ordinary float weight, for instance one that a LoRA has patched."""
    product = partial(_conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return apply_scales(x, product, CONV2D_CHANNELS, weight, bias, scales, split)


def apply_scales(
    x: Tensor,
    product: Product,
    channel_dim: int,
    weight: Tensor,
    bias: Tensor | None,
    scales: LayerScales | None,
    split: int | None = None,
) -> Tensor:
    """Run ``product`` with the scales applied to its input and output.

    Args:
        x: activations, samples first.
        product: the layer, called as ``product(x, weight, bias)``.
        channel_dim: negative index of the channel dimension of both input and output.
        weight: float weight ``[out, in / groups, ...]`` in the dtype of ``x``.
        bias: ``[out]`` or None.
        scales: see `linear`; None runs the layer as it is.
        split: number of input channels of the first part, or None.

    Returns:
        ``sum_p r_out_p * product(x_p * s_in_p, weight_p) + bias``.
    """
    if scales is None:
        return product(x, weight, bias)
    parts = 1 if split is None else 2
    groups = x.shape[channel_dim] // weight.shape[1]
    _check_channels(scales, parts * weight.shape[0], weight.shape[1] * groups)
    r_out, s_in = scales.r_out, scales.s_in
    if s_in is not None:
        x = multiply(x, per_sample(s_in, x, channel_dim))
    if split is None:
        return _combine([product(x, weight, None)], [r_out], bias, channel_dim)
    xs = x.split([split, x.shape[channel_dim] - split], dim=channel_dim)
    ys = [product(xs[0], weight[:, :split], None), product(xs[1], weight[:, split:], None)]
    return _combine(ys, r_out.chunk(2, dim=1), bias, channel_dim)


def _combine(
    ys: Sequence[Tensor], rows: Sequence[Tensor], bias: Tensor | None, channel_dim: int
) -> Tensor:
    """``sum_p y_p * r_p + bias``, overwriting the ``y_p`` when autograd is off.

    In half precision ``y * (r - 1) + bias`` is added to ``y``: a product with an ``r`` that is
    closer to 1 than half a rounding step would give ``y`` back unchanged.
    """
    factors = [per_sample(r, y, channel_dim) for y, r in zip(ys, rows)]
    if ys[0].dtype == factors[0].dtype:
        terms = [y * f if torch.is_grad_enabled() else y.mul_(f) for y, f in zip(ys, factors)]
    else:
        terms = [y * (f - 1).to(y.dtype) for y, f in zip(ys, factors)]
    if bias is not None:
        terms.append(bias.to(ys[0].dtype).view(-1, *[1] * (-channel_dim - 1)))
    if ys[0].dtype != factors[0].dtype:
        terms.extend(ys)
    total = terms[0]
    for term in terms[1:]:
        total = total + term if torch.is_grad_enabled() else total.add_(term)
    return total


def _quantized(
    x: Tensor,
    product: Product,
    channel_dim: int,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    scales: LayerScales | None,
    groups: int,
    positions: int,
) -> Tensor:
    """Dequantize into a buffer, with whatever scales can be folded in, and run ``product``.

    ``positions`` is how many vectors of inputs the layer multiplies: tokens or output pixels.
    """
    _check(qweight, scales, groups, x)
    beside = None
    vectors = () if scales is None else (scales.r_out, scales.s_in)
    if qweight.low_rank is not None and qweight.split is None and groups == 1:
        if qweight.low_rank.cheaper_beside(positions) and not _wants_grad(x, bias, *vectors):
            beside = qweight.low_rank
            qweight = replace(qweight, low_rank=None)
    r_out = s_in = None
    if scales is not None:
        if scales.rows == 1 and not _wants_grad(scales.r_out, scales.s_in):
            # One expert for all samples: the output scale costs nothing next to the quantizer's.
            r_out = scales.r_out.view(qweight.parts, -1).t()
            # Half precision would round away a small change of the activations, but the weight is
            # scaled in float32.
            if scales.s_in is not None:
                if qweight.numel <= x.numel() or x.dtype != scales.s_in.dtype:
                    s_in = scales.s_in[0]
                else:
                    x = x * per_sample(scales.s_in, x, channel_dim)
            scales = None
    weight = dequantize_weight(qweight, x, scales, r_out, s_in)
    if beside is not None:
        beside = _folded(beside, qweight.shape, r_out, s_in).to(x.device, x.dtype)
        product = partial(_both, product, beside, channel_dim)
    bias = None if bias is None else bias.to(x.dtype)
    return apply_scales(x, product, channel_dim, weight, bias, scales, qweight.split)


def _folded(
    low_rank: LowRank, shape: tuple[int, ...], r_out: Tensor | None, s_in: Tensor | None
) -> LowRank:
    """``low_rank`` with the scales that the weight of ``shape`` has folded in."""
    if s_in is not None:
        s_in = s_in.repeat_interleave(low_rank.down.shape[1] // shape[1])
    return low_rank.scaled(None if r_out is None else r_out[:, 0], s_in)


def _both(
    product: Product,
    low_rank: LowRank,
    channel_dim: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``product`` of the weight and of a low-rank term beside it."""
    y = product(x, weight, bias)
    hidden = product(x, low_rank.down.view(-1, *weight.shape[1:]), None)
    if channel_dim == LINEAR_CHANNELS:
        y.view(-1, y.shape[-1]).addmm_(hidden.view(-1, low_rank.rank), low_rank.up.t())
        return y
    return y.add_(F.conv2d(hidden, low_rank.up[:, :, None, None]))


def dequantize_weight(
    qweight: QuantizedWeight,
    x: Tensor,
    scales: LayerScales | None = None,
    r_out: Tensor | None = None,
    s_in: Tensor | None = None,
) -> Tensor:
    """The float weight for a product with ``x``: the shared scratch buffer if nothing needs grad.

    The result is overwritten by the next layer unless autograd may have to keep it, in which case
    it is a tensor of its own.
    """
    keep = _wants_grad(x) or (scales is not None and _wants_grad(scales.r_out, scales.s_in))
    if torch.compiler.is_compiling():
        # The compiler plans buffers itself, and follows neither thread-locals nor mode switches.
        out = torch.empty(qweight.shape, dtype=x.dtype, device=qweight.device)
    elif keep:
        # Outside inference mode even if the host built the weight inside: autograd saves this one.
        with torch.inference_mode(False):
            out = torch.empty(qweight.shape, dtype=x.dtype, device=qweight.device)
    else:
        out = WEIGHTS.get(qweight.shape, x.dtype, qweight.device)
    return qweight.dequantize(r_out=r_out, s_in=s_in, out=out)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`torch.nn.functional.conv2d` with its positional arguments in `Product` order."""
    return F.conv2d(x, weight, bias, **options)


def _wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and one of the tensors takes part in it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _trains(x: Tensor, scales: LayerScales | None, bias: Tensor | None) -> bool:
    """Whether a backward pass may need this layer in its closed form (`autograd`)."""
    vectors = (None, None) if scales is None else (scales.r_out, scales.s_in)
    return x.dim() > 1 and _wants_grad(x, *vectors) and not _wants_grad(bias)


def _check(qweight: QuantizedWeight, scales: LayerScales | None, groups: int, x: Tensor) -> None:
    """Raise `QuantTuneError` for a layer or scales that cannot be run."""
    if qweight.split is not None and groups != 1:
        raise QuantTuneError(
            "A grouped convolution cannot have its input channels split for quantization; "
            "quantize this layer without a split."
        )
    if scales is None:
        return
    _check_channels(scales, qweight.parts * qweight.shape[0], qweight.shape[1] * groups)
    for rows in (scales.r_out, scales.s_in):
        if rows is not None and x.shape[0] % rows.shape[0]:
            raise rows_error(rows, x)


def rows_error(rows: Tensor, x: Tensor) -> QuantTuneError:
    """What to raise when a batch is no multiple of the rows of scales."""
    return QuantTuneError(
        f"The scales are for {rows.shape[0]} samples, but the layer got a batch of shape "
        f"{list(x.shape)}; use a batch size that is a multiple of {rows.shape[0]}."
    )


def _check_channels(scales: LayerScales, outputs: int, inputs: int) -> None:
    """Raise `QuantTuneError` unless the scales have these numbers of columns."""
    for label, tensor, channels in (
        ("output", scales.r_out, outputs),
        ("input", scales.s_in, inputs),
    ):
        if tensor is not None and tensor.shape[-1] != channels:
            raise QuantTuneError(
                f"The scales hold {tensor.shape[-1]} {label} channels where the layer has "
                f"{channels}; use a scale file that was trained on this base model."
            )


def per_sample(rows: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """Scale rows ``[N, C]`` shaped to multiply ``like``, whose first dimension is the batch."""
    trailing = [1] * (-channel_dim - 1)
    if rows.shape[0] == 1:
        return rows.view(-1, *trailing)
    batch = like.shape[0]
    if like.dim() <= -channel_dim or batch % rows.shape[0]:
        raise rows_error(rows, like)
    if batch != rows.shape[0]:
        rows = rows.repeat_interleave(batch // rows.shape[0], dim=0)
    middle = [1] * (like.dim() + channel_dim - 1)
    return rows.view(batch, *middle, -1, *trailing)


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` in the dtype of ``x``, without rounding the factor to half precision.

    Half precision holds ``factor - 1`` to 8 bits or better where it would lose most of ``factor``,
    and the fused multiply-add works in float32 inside.
    """
    if x.dtype == factor.dtype:
        return x * factor
    return torch.addcmul(x, x, (factor - 1).to(x.dtype))
