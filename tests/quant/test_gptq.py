"""Rounding with error feedback: better outputs from the same ranges."""

import pytest
import torch
import torch.nn.functional as F

from quanttune.quant import QuantizedWeight, QuantSpec, QuantTuneError
from quanttune.quant.gptq import InputMoments, gptq_quantize, sample_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear():
    layer = torch.nn.Linear(96, 40)
    x = torch.randn(512, 96, generator=generator()).cumsum(1) * 0.2
    return layer, x, lambda w: F.linear(x, w)


def conv():
    layer = torch.nn.Conv2d(24, 40, 3, padding=1)
    x = F.silu(torch.randn(3, 24, 12, 12, generator=generator()).cumsum(1) * 0.3)
    return layer, x, lambda w: F.conv2d(x, w, None, 1, 1)


def moments_of(layer, x, count=10**9):
    moments = InputMoments(layer.weight[0].numel())
    moments.add(sample_rows(x, layer, count, generator()))
    return moments


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("split", [None, 10])
def test_the_output_changes_less_and_the_range_not_at_all(make, bits, split):
    torch.manual_seed(0)
    layer, x, run = make()
    weight, spec = layer.weight.detach(), QuantSpec(bits, range="mse")
    found = gptq_quantize(weight, moments_of(layer, x), spec, split)
    nearest = QuantizedWeight.quantize(weight, spec, split)
    assert torch.equal(found.scale, nearest.scale)
    assert torch.equal(found.zero_point, nearest.zero_point)
    assert found.shape == nearest.shape and found.packed.shape == nearest.packed.shape
    expected = run(weight)
    errors = [float((run(w.dequantize()) - expected).norm()) for w in (found, nearest)]
    assert errors[0] < 0.4 * errors[1]


def test_inputs_that_do_not_correlate_are_rounded_to_nearest():
    weight = torch.randn(16, 32, generator=generator())
    moments = InputMoments(32)
    moments.add(torch.eye(32))
    spec = QuantSpec(4)
    found = gptq_quantize(weight, moments, spec)
    assert torch.equal(found.packed, QuantizedWeight.quantize(weight, spec).packed)


def test_inputs_that_are_always_zero():
    torch.manual_seed(0)
    layer, x, run = linear()
    x[:, ::3] = 0
    found = gptq_quantize(layer.weight, moments_of(layer, x), QuantSpec(4))
    assert found.dequantize().isfinite().all()
    assert found.error(layer.weight) < 0.5


def test_one_sample_is_enough_to_be_finite():
    layer, x, _ = linear()
    found = gptq_quantize(layer.weight, moments_of(layer, x[:1]), QuantSpec(4))
    assert found.dequantize().isfinite().all()
    assert found.error(layer.weight) < 0.5


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1}, {"padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": (1, 3), "padding": (0, 1)},
])
def test_rows_are_what_output_positions_read(options):
    layer = torch.nn.Conv2d(5, 7, **{"kernel_size": 3, **options})
    x = torch.randn(2, 5, 9, 11, generator=generator())
    rows = sample_rows(x, layer, 10**9, generator())
    expected = layer(x).permute(0, 2, 3, 1).reshape(-1, 7)
    got = rows @ layer.weight.detach().flatten(1).t() + layer.bias
    torch.testing.assert_close(got, expected)
    few = sample_rows(x, layer, 6, generator(1))
    assert few.shape == (6, rows.shape[1])
    assert all(any(torch.equal(r, other) for other in rows) for r in few)


def test_rows_of_a_linear():
    layer, x = torch.nn.Linear(6, 3), torch.randn(2, 5, 6, generator=generator())
    assert torch.equal(sample_rows(x, layer, 100, generator()), x.reshape(10, 6))
    assert sample_rows(x, layer, 4, generator()).shape == (4, 6)


def test_refusals():
    layer, x, _ = linear()
    with pytest.raises(QuantTuneError, match="no calibration data"):
        gptq_quantize(layer.weight, InputMoments(96), QuantSpec(4))
    with pytest.raises(QuantTuneError, match="no calibration data"):
        gptq_quantize(layer.weight[:, :50], moments_of(layer, x), QuantSpec(4))
    nan = moments_of(layer, x)
    nan.total[3, 3] = float("nan")
    with pytest.raises(QuantTuneError, match="degenerate"):
        gptq_quantize(layer.weight, nan, QuantSpec(4))
