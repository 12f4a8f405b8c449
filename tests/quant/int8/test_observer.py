"""Ranges from histograms, against what the values themselves say."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.quant.int8 import RangeEstimator, RangeObserver, quantize_tensor
from quanttune.quant.int8.activation import tensor_qparams
from quanttune.quant.int8.observer import BINS, SAMPLED


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(*tensors):
    observer = RangeObserver()
    for tensor in tensors:
        observer.observe(tensor)
    return observer


def error(x, ends):
    """Squared error of quantizing ``x`` to a range."""
    qparams = tensor_qparams(*map(torch.tensor, ends))
    return float((quantize_tensor(x, None, qparams).dequantize() - x).square().sum())


def test_minmax_holds_everything_and_zero():
    tensors = [draw(0, 3, 50), draw(1, 1000) * 7 + 3, draw(2, 5, 5, 5)]
    everything = torch.cat([t.flatten() for t in tensors])
    low, high = observed(*tensors).range(RangeEstimator.MINMAX)
    assert (low, high) == (float(everything.min()), float(everything.max()))
    assert observed(torch.tensor([2.0, 3.0])).range(RangeEstimator.MINMAX) == (0.0, 3.0)
    assert observed(torch.tensor([-2.0, -3.0])).range(RangeEstimator.MINMAX) == (-3.0, 0.0)


@pytest.mark.parametrize("shape", [(1, 256, 1280), (1, 1024, 960), (2, 500, 1536)])
def test_no_channel_is_skipped_in_a_large_tensor(shape):
    x = draw(0, *shape)
    x[..., 7] *= 40
    low, high = observed(x).range(RangeEstimator.MSE)
    assert low < -40 and high > 40, "the channel of large values counts"


def test_growing_loses_nothing_and_the_order_does_not_matter():
    tensors = [draw(i, 500) * 10.0**i for i in (-3, 0, 2)]
    up, down = observed(*tensors), observed(*tensors[::-1])
    assert up.width == down.width and torch.equal(up.counts, down.counts)
    assert int(up.counts.sum()) == 1500
    centers = (torch.arange(BINS) + 0.5 - BINS // 2) * up.width
    everything = torch.cat(tensors)
    below = int((everything < 0).sum())
    assert int(up.counts[centers < 0].sum()) == below, "pairs of bins never straddle 0"


def test_a_large_tensor_is_sampled_but_its_ends_are_exact():
    x = draw(0, SAMPLED * 3 + 17)
    x[12345] = 50.0
    observer = observed(x)
    assert SAMPLED // 2 < int(observer.counts.sum()) <= SAMPLED
    assert observer.range(RangeEstimator.MINMAX)[1] == 50.0
    assert observer.range(RangeEstimator.PERCENTILE, 99.9)[1] < 4


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_values(percentile):
    x = torch.nn.functional.silu(draw(0, 60000) * 2)
    low, high = observed(x).range(RangeEstimator.PERCENTILE, percentile)
    share = (1 - percentile / 100) / 2
    wanted = torch.quantile(x.double(), torch.tensor([share, 1 - share], dtype=torch.float64))
    width = observed(x).width
    assert abs(low - float(wanted[0])) <= width and abs(high - float(wanted[1])) <= width


@pytest.mark.parametrize("outlier", [0.0, 30.0, 200.0])
def test_the_least_error_is_least(outlier):
    x = draw(0, 40000)
    if outlier:
        x[::8000] = outlier
    observer = observed(x)
    found = error(x, observer.range(RangeEstimator.MSE))
    others = [error(x, observer.range(e, 99.9)) for e in
              (RangeEstimator.MINMAX, RangeEstimator.PERCENTILE, RangeEstimator.ENTROPY)]
    ends = observer.range(RangeEstimator.MINMAX)
    others += [error(x, (a * ends[0], b * ends[1]))
               for a in (0.3, 0.6, 0.8, 0.95) for b in (0.05, 0.3, 0.6, 0.8, 0.95)]
    assert found <= 1.02 * min(others)


def test_the_entropy_clips_outliers():
    x = draw(0, 50000)
    x[0], x[1] = 40.0, -40.0
    low, high = observed(x).range(RangeEstimator.ENTROPY)
    assert -40 < low < -2 and 2 < high < 40


@pytest.mark.parametrize("estimator", list(RangeEstimator))
def test_degenerate_inputs(estimator):
    assert RangeObserver().range(estimator) == (0.0, 0.0)
    assert observed(torch.zeros(9), torch.empty(0)).range(estimator) == (0.0, 0.0)
    low, high = observed(torch.full((100,), 5.0)).range(estimator)
    assert low == 0 and 0 < high <= 5
    low, high = observed(torch.tensor([1e-30, -1e-30])).range(estimator)
    assert -1.1e-30 < low <= 0 <= high < 1.1e-30


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    x = draw(0, 100)
    x[50] = value
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        RangeObserver().observe(x)


def test_a_restored_observer_goes_on():
    observer = observed(draw(0, 1000))
    copy = RangeObserver.restore(observer.state())
    for one in (observer, copy):
        one.observe(draw(1, 1000) * 9)
    assert copy.range(RangeEstimator.MSE) == observer.range(RangeEstimator.MSE)
    assert torch.equal(copy.counts, observer.counts)


def test_half_precision_is_observed_in_full():
    x = draw(0, 1000).to(torch.bfloat16)
    assert observed(x).range(RangeEstimator.MINMAX) == (float(x.min()), float(x.max()))
