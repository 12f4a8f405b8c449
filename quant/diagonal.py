"""The diagonal pair around a layer that is a black box: ``y = r_out * f(x * s_in) + b`` (eq. 5).

Nothing is known of the layer but that it is linear in its input and what it adds at the end, so
that its weight may be held in any way. With ``l = f(x * s_in) + b``, what the layer itself gives,
``y = l + (r_out - 1) * (l - b)``: its own bias need not be taken off, and half precision keeps an
``r_out`` close to 1, which a product would round away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import multiply, per_sample
from .scales import LayerScales


def scale_input(x: Tensor, scales: LayerScales, channel_dim: int) -> Tensor:
    """``x * s_in`` of activations ``[batch, ...]``, each sample by its own row.

    Args:
        x: not changed.
        scales: one row for all samples, or one row per sample (or per equal run of samples).
        channel_dim: negative index of the channels.

    Raises:
        QuantTuneError: the rows do not fit the batch.
    """
    if scales.s_in is None:
        return x
    return multiply(x, per_sample(scales.s_in, x, channel_dim))


def scale_output(
    y: Tensor,
    bias: Tensor | None,
    scales: LayerScales,
    channel_dim: int,
    first_part: Callable[[], Tensor] | None = None,
) -> Tensor:
    """What a layer gives with its output scales.

    Args:
        y: of the layer for the scaled input, its bias included; not changed.
        bias: ``[out]``, what the layer adds at the end, or None.
        scales: ``r_out`` of ``[N, out]``, or with ``first_part`` ``[N, 2 * out]``.
        channel_dim: negative index of the channels.
        first_part: gives the layer's output, its bias included, for the input with zeros in all
            but the first part of its channels. Called only if ``r_out`` has two parts.

    Raises:
        QuantTuneError: the rows do not fit the batch.
    """
    if bias is not None:
        bias = bias.to(y.dtype).view(-1, *[1] * (-channel_dim - 1))
    changes = (scales.r_out - 1).to(y.dtype)
    if first_part is None:
        return torch.addcmul(y, _without(y, bias), per_sample(changes, y, channel_dim))
    first = first_part()
    changes = [per_sample(c, y, channel_dim) for c in changes.chunk(2, dim=1)]
    total = torch.addcmul(y, _without(first, bias), changes[0])
    return torch.addcmul(total, y - first, changes[1])


def scaled_weight(weight: Tensor, scales: LayerScales, split: int | None = None,
                  groups: int = 1) -> Tensor:
    """The weight of one expert written out, ``r_out * W * s_in``, in float32.

    Args:
        weight: ``[out, in / groups, ...]``.
        scales: of one row; ``r_out`` has ``out`` columns, or twice as many.
        split: input channels of the first part, if ``r_out`` has two.
        groups: of a convolution.
    """
    out, inputs = weight.shape[:2]
    ones = [1] * (weight.dim() - 2)
    r_out = scales.r_out[0].float().to(weight.device)
    rows = r_out[:out, None].expand(out, inputs)
    if len(r_out) != out:
        rows = rows.clone()
        rows[:, split:] = r_out[out:, None]
    weight = weight.float() * rows.reshape(out, inputs, *ones)
    if scales.s_in is None:
        return weight
    s_in = scales.s_in[0].float().to(weight.device).view(groups, 1, inputs, *ones)
    return (weight.view(groups, out // groups, *weight.shape[1:]) * s_in).view(weight.shape)


def only_first(x: Tensor, split: int, channel_dim: int) -> Tensor:
    """A copy of ``x`` with zeros in the channels from ``split`` on."""
    kept = x.clone()
    kept.narrow(channel_dim, split, x.shape[channel_dim] - split).zero_()
    return kept


def _without(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y - bias
