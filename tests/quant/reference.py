"""Slow, obvious forms of what `quanttune.quant` computes, and makers of small examples."""

import torch

from quanttune.quant import LayerScales, LowRank, QuantizedWeight, QuantSpec, ScaleSet, scale_shape


def relative(actual, expected):
    """Relative Frobenius error in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def materialise(qweight, r_out=None, s_in=None):
    """Eq. 5 as written, in float64: ``r_out * (scale * (q - z) + up @ down) * s_in``.

    ``r_out`` is ``[P * out]`` part by part, ``s_in`` is ``[in]`` over all groups.
    """
    shape = qweight.shape
    q = qweight.codes().double().view(shape)
    weight = torch.empty(shape, dtype=torch.float64)
    borders = [0, shape[1]] if qweight.split is None else [0, qweight.split, shape[1]]
    column = (-1,) + (1,) * (len(shape) - 1)
    for part, (start, stop) in enumerate(zip(borders, borders[1:])):
        scale = qweight.scale[:, part].double()
        zero = qweight.zero_point[:, part].double()
        values = (q[:, start:stop] - zero.view(column)) * scale.view(column)
        if qweight.low_rank is not None:
            term = qweight.low_rank.up.double() @ qweight.low_rank.down.double()
            values += term.view(shape)[:, start:stop]
        if r_out is not None:
            values *= r_out.double().view(len(borders) - 1, -1)[part].view(column)
        weight[:, start:stop] = values
    if s_in is not None:
        groups = s_in.numel() // shape[1]
        rows = shape[0] // groups
        for group in range(groups):
            part = s_in.double()[group * shape[1] : (group + 1) * shape[1]]
            weight[group * rows : (group + 1) * rows] *= part.view((1, -1) + (1,) * len(shape[2:]))
    return weight


def random_weight(shape, bits=4, split=None, symmetric=False, seed=0, rank=0):
    """A quantized normal weight, with a low-rank term of half its size if ``rank`` is not 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    qweight = QuantizedWeight.quantize(weight, QuantSpec(bits, symmetric), split)
    if rank:
        up = torch.randn(shape[0], rank, generator=generator)
        down = torch.randn(rank, weight[0].numel(), generator=generator)
        qweight.low_rank = LowRank.join([(up, down, 0.5 / rank**0.5)])
    return qweight


def random_scales(qweight, rows, groups=1, with_s_in=True, seed=1):
    """Scales around 1 for a layer, ``rows`` of them."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = scale_shape(qweight.shape, qweight.split, groups)
    r_out = 1 + 0.2 * torch.randn(rows, outputs, generator=generator)
    s_in = 1 + 0.2 * torch.randn(rows, inputs, generator=generator)
    return LayerScales(r_out, s_in if with_s_in else None)


def random_set(shapes, experts, timesteps=1000, with_s_in=True, seed=2):
    """A scale set with values around 1."""
    generator = torch.Generator().manual_seed(seed)

    def values(count):
        return 1 + 0.2 * torch.randn(experts, count, generator=generator)

    layers = {
        name: LayerScales(values(outputs), values(inputs) if with_s_in else None)
        for name, (outputs, inputs) in shapes.items()
    }
    return ScaleSet(layers, experts, timesteps)
