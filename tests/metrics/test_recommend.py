"""What is recommended follows from the numbers."""

import math

import torch

from quanttune.metrics.cost import Cost, CostReport
from quanttune.metrics.pareto import Point
from quanttune.metrics.recommend import recommend, recommend_layers, recommend_timing
from quanttune.metrics.sensitivity import Sensitivity

MIB = 2**20
FLOAT = Point("float", 200 * MIB, 16, 1.0, 0.0, quantized=False)
FAST = Point("float, bfloat16", 200 * MIB, 16, 0.8, 0.009, quantized=False)
EIGHT = Point("8 bits", 100 * MIB, 8, 1.2, 0.01)
FOUR = Point("4 bits", 50 * MIB, 4, 1.4, 0.12)
PLAN = Point("plan 4", 50 * MIB, 4, 1.4, 0.028)
INT8 = Point("INT8 products", 100 * MIB, 8, 0.7, 0.05)


def test_the_smallest_and_the_fastest():
    found = recommend([FLOAT, EIGHT, FOUR, PLAN, INT8])
    assert found[0].startswith("**Smallest with at most 3% error: plan 4**, 50.0 MiB of weights, "
                               "25% of float16, 2.8% error")
    assert found[1].startswith("**Smallest with at most 10% error: plan 4**")
    assert found[2].startswith("**Fastest with at most 10% error: INT8 products**, 0.70 x")
    assert found[3].startswith("Nothing quantized with at most 3% error is faster than float") and (
        "(1.00 x the time of float) here; the nearest is 8 bits at 1.20 x." in found[3])
    assert found[4] == ("Mixed precision pays: plan 4 has 2.8% error, 4 bits of about the same "
                        "size 12.0%.")
    assert found[5].startswith("Never worth it here: 4 bits. ") and len(found) == 6


def test_integers_are_not_praised_for_what_another_precision_gains():
    found = recommend([FLOAT, FAST, INT8])
    assert "Without any integers, float, bfloat16 takes 0.80 x the time of float already: INT8 " \
           "products takes 0.87 x of that." in found
    assert not any("at most 3% error: float" in s for s in found), "it is not quantized"
    slower = recommend([FLOAT, FAST, Point("INT8 products", 100 * MIB, 8, 0.9, 0.02)])
    assert not any("fastest" in s or "Fastest" in s for s in slower)
    assert any("is faster than float, bfloat16 (0.80 x the time of float) here; the nearest is "
               "INT8 products at 0.90 x." in s for s in slower)


def test_that_nothing_is_faster_is_told_once():
    found = recommend([FLOAT, EIGHT, Point("plan 4", 50 * MIB, 4, 1.4, 0.05)])
    assert [s for s in found if "faster" in s] == [
        "Nothing quantized with at most 10% error is faster than float (1.00 x the time of float) "
        "here; the nearest is 8 bits at 1.20 x."]
    assert sum(s.startswith("**Smallest") for s in found) == 2


def test_a_looser_limit_that_changes_nothing_is_not_told():
    found = recommend([FLOAT, EIGHT])
    assert not any("Smallest with at most 10%" in s for s in found) and "8 bits" in found[0]


def test_nothing_is_good_enough():
    found = recommend([FLOAT, FOUR])
    assert found[0] == ("Nothing quantized stays within 3% of the float model's output; the "
                        "closest, 4 bits, has 12.0%.")
    assert not any("Smallest" in s for s in found)


def test_broken_ones_are_named_and_never_recommended():
    broken = Point("2 bits", 1, 2, 0.1, math.nan)
    found = recommend([FLOAT, EIGHT, broken])
    assert found[-1].startswith("Unusable: 2 bits")
    assert not any("2 bits" in s for s in found[:-1])
    assert recommend([FLOAT, broken])[-1].startswith("Unusable")


def test_plans_that_gain_nothing_and_plans_of_other_sizes():
    same = Point("plan 4", 50 * MIB, 4, 1.4, 0.119)
    assert any("gains nothing" in s for s in recommend([FLOAT, FOUR, same]))
    tiny = Point("plan 8", 100 * MIB, 8, 1.4, 0.001)
    assert any("pays: plan 4 has" in s for s in recommend([FLOAT, EIGHT, FOUR, PLAN, tiny])), (
        "what takes most error away counts, not the largest ratio")
    other = Point("plan 6", 75 * MIB, 6, 1.4, 0.001)
    assert not any("Mixed" in s for s in recommend([FLOAT, FOUR, other]))
    assert recommend([FLOAT]) == ["Nothing was quantized, so that nothing follows."]


def sensitivity(rows, forwards=(2, 2)):
    names = [f"layer_{i}" for i in range(len(rows))]
    error = torch.tensor(rows, dtype=torch.float64)[:, None, None] * torch.tensor([9.0, 1.0])
    return Sensitivity({n: (n,) for n in names}, dict.fromkeys(names, (4, 4)), {}, ("4",), error,
                       forwards)


def test_few_layers_that_make_most_of_the_error_are_named():
    layers, times = recommend_layers(sensitivity([0.01] * 20 + [1.0, 2.0]))
    assert "62% of all the error comes from 1 of 22 layers: `layer_21`." in layers
    assert times.startswith("Timesteps from 0 to 0.5") and "react 3.0 times" in times


def test_even_errors_name_no_layer_and_empty_intervals_are_left_out():
    assert not any("error comes from" in s for s in recommend_layers(sensitivity([1.0] * 22)))
    assert len(recommend_layers(sensitivity([1.0] * 22, (4, 0)))) == 0
    assert recommend_layers(sensitivity([0.0] * 4)) == []


def test_a_machine_that_does_not_keep_still():
    still = Cost("float", (1.0, 1.0, 1.01, 1.0), 1.0, 1, 1)
    busy = Cost("8 bits", (1.0, 2.0, 1.0, 2.0), 1.0, 1, 1)
    assert recommend_timing(CostReport((still,), 1, 20, "")) == []
    assert "8 bits spread by 67%" in recommend_timing(CostReport((still, busy), 1, 20, ""))[0]
