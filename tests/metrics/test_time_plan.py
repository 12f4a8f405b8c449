"""The knapsack on times against trying everything, what is never chosen, and what is refused."""

import itertools

import pytest
import torch

from quanttune.metrics.layer_times import LayerTimes
from quanttune.metrics.sensitivity import INT8, Sensitivity
from quanttune.metrics.time_plan import time_plan
from quanttune.quant import QuantTuneError
from quanttune.quant.plan import FLOAT


def problem(seed, count=8, units=None):
    """Layers of random times, most of them faster in integers, and errors."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"l{i}" for i in range(count)]
    floats = torch.rand(count, generator=generator) + 0.1
    factor = torch.rand(count, generator=generator) * 1.1 + 0.2
    factor[0] = 1.5
    integers = {n: float(f * k) for n, f, k in zip(names, floats, factor)}
    integers["l1"] = None
    shapes = dict.fromkeys(names, (8, 8))
    times = LayerTimes(shapes, dict(zip(names, floats.tolist())), integers,
                       float(floats.sum()) + 2.0)
    units = units or {n: (n,) for n in names}
    errors = torch.rand(len(units), 1, 1, generator=generator, dtype=torch.float64) ** 3
    return Sensitivity(units, shapes, {}, (INT8,), errors, (1,)), times


def chosen(plan):
    assert set(plan.bits.values()) <= {8, FLOAT}
    return {n for n, bits in plan.bits.items() if bits == 8}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("place", [0.0, 0.1, 0.4, 0.8])
def test_near_the_best_there_is_and_within_the_time(seed, place):
    sensitivity, times = problem(seed)
    least = times.share(times.fastest())
    share = least + place * (1 - least)
    plan, expected = time_plan(sensitivity, times, share)
    assert times.share({n for n, bits in plan.bits.items() if bits}) <= share + 1e-9
    errors = dict(zip(sensitivity.units, sensitivity.mean()[:, 0].tolist()))
    assert expected ** 2 == pytest.approx(sum(errors[n] for n in chosen(plan)))
    best = min(sum(errors[n] for n in some)
               for size in range(len(errors) + 1)
               for some in itertools.combinations(errors, size)
               if times.share(some) <= share + 1e-12)
    assert best - 1e-12 <= expected ** 2 <= best + max(errors.values())


@pytest.mark.parametrize("seed", range(8))
def test_what_is_slower_in_integers_stays_in_float(seed):
    sensitivity, times = problem(seed)
    fastest, _ = time_plan(sensitivity, times, times.share(times.fastest()))
    assert chosen(fastest) == times.fastest() and not chosen(fastest) & {"l0", "l1"}


def test_all_the_time_there_is_keeps_everything_in_float():
    sensitivity, times = problem(0)
    plan, expected = time_plan(sensitivity, times, 1.0)
    assert not chosen(plan) and expected == 0


def test_units_of_several_layers_leave_their_slow_ones_in_float():
    units = {"first": ("l0", "l1", "l2"), "second": ("l3", "l4"), "third": ("l5", "l6", "l7")}
    sensitivity, times = problem(3, units=units)
    plan, _ = time_plan(sensitivity, times, times.share(times.fastest()))
    assert chosen(plan) == times.fastest()
    least = times.share(times.fastest())
    some = chosen(time_plan(sensitivity, times, (1 + least) / 2)[0])
    for layers in units.values():
        faster = set(layers) & times.fastest()
        assert some & faster in (set(), faster)


def test_too_little_time_names_the_least_and_that_can_be_had():
    sensitivity, times = problem(1)
    with pytest.raises(QuantTuneError, match=r"ask for at least (\d\.\d\d)\.$") as caught:
        time_plan(sensitivity, times, 0.1)
    assert "\n" not in str(caught.value)
    least = float(str(caught.value)[-5:-1])
    assert least == times.least()
    assert least - 0.01 < times.share(times.fastest()) <= least
    assert chosen(time_plan(sensitivity, times, least)[0])


def test_where_integers_gain_nothing_it_says_so():
    sensitivity, times = problem(1)
    slow = LayerTimes(times.shapes, times.floats, times.floats, times.step)
    assert slow.least() == 1.0
    with pytest.raises(QuantTuneError, match="None of the 8 layers was measured to be faster"):
        time_plan(sensitivity, slow, 0.9)
    assert not chosen(time_plan(sensitivity, slow, 1.0)[0])


def test_refusals():
    sensitivity, times = problem(0)
    with pytest.raises(QuantTuneError, match="switch on 'int8'"):
        time_plan(Sensitivity(sensitivity.units, sensitivity.shapes, {}, ("8",),
                              sensitivity.error, (1,)), times, 0.8)
    with pytest.raises(QuantTuneError, match="models of other layers"):
        time_plan(sensitivity, problem(0, 7)[1], 0.8)
    for share in (0.0, -1.0, float("nan")):
        with pytest.raises(QuantTuneError, match="has to be above 0"):
            time_plan(sensitivity, times, share)
