"""Weight rounding with error feedback (GPTQ, Frantar et al. 2023), convolutions included.

Rounding to nearest treats every weight alone. What matters is the layer's output, so the rounding
error of one input is made up for by the inputs not rounded yet, in proportion to how they occur
together: ``H = E[x x^T]`` over calibration data, ``x`` being what one output position reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import quantizer
from .errors import QuantTuneError
from .packing import pack
from .spec import QuantSpec
from .weight import QuantizedWeight, check_split

BLOCK = 128
"""Columns between two updates of all that follow."""
DAMPING = 0.01
"""Added to the diagonal of ``H``, as a share of its mean."""


class InputMoments:
    """``sum of x x^T`` over what the output positions of a layer read.

    Args:
        inputs: length of ``x``: input channels times kernel size.
        device: where to sum up, and later to round.

    Attributes:
        total: float32 ``[inputs, inputs]``.
        count: how many ``x``.
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.total, self.count = torch.zeros(inputs, inputs, device=device), 0

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` ``[n, inputs]``."""
        rows = rows.to(self.total.device, torch.float32)
        self.total.addmm_(rows.t(), rows)
        self.count += rows.shape[0]


def gptq_quantize(
    weight: Tensor, moments: InputMoments, spec: QuantSpec, split: int | None = None
) -> QuantizedWeight:
    """Quantize a weight so that the output on the calibration data changes least.

    Ranges are those of round-to-nearest; only the integers differ.

    Args:
        weight: ``[out, in, *kernel]``, of a Linear or a convolution with one group.
        moments: of its input.
        spec: bits, symmetry and range.
        split: as in `QuantizedWeight.quantize`.

    Raises:
        QuantTuneError: no data, or data that do not belong to this weight.
    """
    shape = tuple(weight.shape)
    check_split(split, shape)
    w = weight.detach().to(moments.total.device, torch.float32).reshape(shape[0], -1)
    if not moments.count or moments.total.shape[0] != w.shape[1]:
        raise QuantTuneError(
            f"There are no calibration data for a weight of shape {list(shape)}; run the model on "
            "at least one sample, or round to nearest."
        )
    border = w.shape[1] if split is None else split * math.prod(shape[2:])
    parts = [slice(0, border)] + ([slice(border, w.shape[1])] if split is not None else [])
    scales, zero_points = zip(*(quantizer.choose_qparams(w[:, p], spec) for p in parts))
    scale, zero_point = torch.stack(scales, 1), torch.stack(zero_points, 1)
    part_of = [int(column >= border) for column in range(w.shape[1])]
    codes = _feed_back(w, moments, scale, zero_point, part_of, 2**spec.bits - 1)
    return QuantizedWeight(
        packed=pack(codes.cpu(), spec.bits),
        scale=scale.cpu(),
        zero_point=zero_point.cpu(),
        bits=spec.bits,
        shape=shape,
        split=split,
        symmetric=spec.symmetric,
    )


def _feed_back(w, moments, scale, zero_point, part_of, top) -> Tensor:
    """The codes ``[out, K]`` uint8."""
    hessian = moments.total / moments.count
    # What occurs most is rounded first, while many others can still make up for it.
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w, part_of = w[:, order], [part_of[i] for i in order.tolist()]
    upper = _inverse_root(hessian[order][:, order])
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        block, errors = w[:, start:stop], w.new_empty(w.shape[0], stop - start)
        local = upper[start:stop, start:stop]
        for i in range(stop - start):
            part = part_of[start + i]
            s, z = scale[:, part], zero_point[:, part]
            q = (block[:, i] / s).round_().add_(z).clamp_(0, top)
            codes[:, start + i] = q.to(torch.uint8)
            errors[:, i] = (block[:, i] - (q - z) * s) / local[i, i]
            block[:, i + 1 :].addr_(errors[:, i], local[i, i + 1 :], alpha=-1)
        w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return torch.empty_like(codes).index_copy_(1, order, codes)


def _inverse_root(hessian: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``U^T U = (H + damping)^-1``."""
    mean = float(hessian.diagonal().mean())
    damping = DAMPING * mean if mean > 0 else 1.0
    # Inputs that were never anything but 0 have no say.
    hessian.diagonal()[hessian.diagonal() == 0] = damping
    for _ in range(6):
        hessian.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
        damping *= 10
    raise QuantTuneError(
        "The calibration data of a layer are degenerate, so that no error feedback can be "
        "computed; use more samples, or round to nearest."
    )


def sample_rows(
    x: Tensor, layer: torch.nn.Module, count: int, generator: torch.Generator
) -> Tensor:
    """What ``count`` random output positions of a layer read, ``[count, K]``.

    Args:
        x: the layer's input: ``[..., in]``, or ``[batch, in, height, width]`` for a Conv2d.
        layer: a Linear, or a Conv2d with one group and number padding.
        count: how many; fewer if there are not as many.
        generator: on the CPU.
    """
    if not isinstance(layer, torch.nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_pick(rows.shape[0], count, generator).to(x.device)]
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    vertical, horizontal = layer.padding
    x = torch.nn.functional.pad(x, (horizontal, horizontal, vertical, vertical))
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation)
    ]
    chosen = _pick(x.shape[0] * sizes[0] * sizes[1], count, generator)
    sample, place = chosen // (sizes[0] * sizes[1]), chosen % (sizes[0] * sizes[1])
    top, left = place // sizes[1] * stride[0], place % sizes[1] * stride[1]
    rows = top[:, None] + torch.arange(kernel[0]) * dilation[0]
    columns = left[:, None] + torch.arange(kernel[1]) * dilation[1]
    # Indices on both sides of a slice put the indexed dimensions first: [n, kh, kw, in].
    read = x[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return read.permute(0, 3, 1, 2).reshape(len(chosen), -1)


def _pick(total: int, count: int, generator: torch.Generator) -> Tensor:
    if count >= total:
        return torch.arange(total)
    return torch.randint(total, (count,), generator=generator)
