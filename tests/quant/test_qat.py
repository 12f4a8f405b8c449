"""Fake quantization: equal to the true integers, and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from quanttune.quant import QuantizedWeight, QuantSpec, QuantTuneError
from quanttune.quant.int8 import (
    ActivationRanges,
    ConvGeometry,
    Granularity,
    Int8Layer,
    ReferenceBackend,
)
from quanttune.quant.qat import FakeQuantLayer, quantize_activation

CONV = ConvGeometry((3, 3), (1, 1), (1, 1))


def example(conv, bits=4, split=None, symmetric=False):
    generator = torch.Generator().manual_seed(0)
    kernel = () if conv is None else conv.kernel
    weight = torch.randn(20, 32, *kernel, generator=generator)
    x = torch.randn(*((3, 7, 32) if conv is None else (3, 32, 8, 8)), generator=generator)
    packed = QuantizedWeight.quantize(weight, QuantSpec(bits, symmetric), split)
    ranges = torch.tensor([[[-2.5, 2.0]] * packed.parts, [[-1.5, 3.0]] * packed.parts])
    return weight, x, packed, ranges, torch.randn(20, generator=generator)


def integers(packed, conv, ranges, buckets):
    layer = Int8Layer(packed, conv, ReferenceBackend(), Granularity.TENSOR)
    if ranges is not None:
        layer.static = ActivationRanges({"a": ranges}).select(buckets)["a"]
    return layer


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def alike(a, b):
    """Equal but for float sums. A value on the border of two codes may fall to either side of it,
    which is another one on another processor.
    """
    off = (a - b).detach().abs()
    return float(off.median()) < 1e-6 * float(b.detach().abs().max()) and relative(a, b) < 2e-3


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("split", [None, 12])
@pytest.mark.parametrize("bits,symmetric", [(8, True), (8, False), (4, False), (3, False),
                                            (2, False)])
@pytest.mark.parametrize("trains", [True, False], ids=["weights", "scales"])
@pytest.mark.parametrize("buckets", [(0,), (1, 1), (0, 1)])
def test_it_computes_what_the_integers_do(conv, split, bits, symmetric, trains, buckets):
    weight, x, packed, ranges, bias = example(conv, bits, split, symmetric)
    layer = FakeQuantLayer(packed, conv, ranges, weight if trains else None)
    layer.buckets = buckets
    expected = integers(packed, conv, ranges, buckets)(x, bias)
    assert alike(layer(x, bias), expected)


def test_without_ranges_it_takes_those_of_the_moment():
    weight, x, packed, _, bias = example(None)
    layer = FakeQuantLayer(packed, None, None, weight)
    assert alike(layer(x, bias), integers(packed, None, None, ())(x, bias))
    exported, ranges = layer.export()
    assert ranges is None and torch.equal(exported.packed, packed.packed)


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("split", [None, 12])
@pytest.mark.parametrize("trains", [True, False], ids=["weights", "scales"])
def test_training_brings_the_output_nearer_and_exports_true_integers(conv, split, trains):
    weight, x, packed, ranges, bias = example(conv, 3, split)
    layer = FakeQuantLayer(packed, conv, ranges, weight if trains else None)
    target = F.linear(x, weight, bias) if conv is None else F.conv2d(x, weight, bias, 1, 1)
    before = relative(layer(x, bias), target)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-2, weight_decay=0)
    for _ in range(120):
        optimizer.zero_grad()
        (layer(x, bias) - target).square().mean().backward()
        optimizer.step()
    after = relative(layer(x, bias), target)
    assert after < (0.8 if trains else 0.97) * before
    exported, learnt = layer.export()
    assert learnt.shape == ranges.shape and not torch.equal(learnt, ranges)
    again = integers(exported, conv, learnt, (0,))(x, bias)
    assert alike(again, layer(x, bias))
    assert torch.equal(exported.packed, packed.packed) is not trains
    assert torch.equal(learnt[1], ranges[1]), "a bucket that was not met stays"


def test_gradients_of_the_ends_are_those_of_the_finite_difference():
    x = torch.linspace(-3, 3, 4001, dtype=torch.float32)
    grad = torch.cos(x)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    (quantize_activation(x, low, high) * grad).sum().backward()

    def value(a, b):
        # Many steps: rounding averages out, and what is left is the clipping.
        return float((x.clamp(a, b) * grad).sum())

    for got, difference in (
            (low.grad, (value(-0.99, 1.5) - value(-1.01, 1.5)) / 0.02),
            (high.grad, (value(-1.0, 1.51) - value(-1.0, 1.49)) / 0.02)):
        assert abs(float(got) - difference) < 0.02 * abs(difference) + 1


def test_gradients_pass_straight_through_inside_and_stop_outside():
    x = torch.tensor([-5.0, -0.5, 0.0, 0.7, 5.0], requires_grad=True)
    quantize_activation(x, torch.tensor(-1.0), torch.tensor(1.0)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_a_weight_that_is_clipped_stops_learning():
    weight, x, packed, ranges, _ = example(None, 4)
    layer = FakeQuantLayer(packed, None, ranges, weight * 10)
    layer(x).sum().backward()
    low, high = layer._limits(0)
    outside = (layer.steps < low - 0.5) | (layer.steps > high + 0.5)
    assert bool(outside.any()) and float(layer.steps.grad[outside].abs().max()) == 0
    assert float(layer.steps.grad[~outside].abs().max()) > 0


def test_steps_and_ranges_cannot_turn_around():
    weight, x, packed, ranges, _ = example(None)
    layer = FakeQuantLayer(packed, None, ranges, weight)
    with torch.no_grad():
        layer.r_out.fill_(-3)
        layer.ends.fill_(-3)
    exported, learnt = layer.export()
    assert bool((exported.scale > 0).all())
    ActivationRanges({"a": learnt})


def test_another_models_weight_is_refused():
    weight, _, packed, ranges, _ = example(None)
    with pytest.raises(QuantTuneError, match="does not belong"):
        FakeQuantLayer(packed, None, ranges, weight[:, :4])
