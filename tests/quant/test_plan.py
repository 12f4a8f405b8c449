"""Mixed precision: the knapsack against trying everything, presets, and what is refused."""

import itertools

import pytest
import torch

from quanttune.quant import QuantizedWeight, QuantSpec, QuantTuneError
from quanttune.quant.plan import (
    FLOAT,
    PRESETS,
    BitPlan,
    Choice,
    by_group,
    choose,
    layer_bytes,
    preset,
)


def problem(seed, units=5):
    generator = torch.Generator().manual_seed(seed)
    choices = {}
    for unit in range(units):
        size = int(torch.randint(50, 500, (), generator=generator))
        scale = float(torch.rand((), generator=generator))
        noise = torch.rand(4, generator=generator).tolist()
        choices[f"u{unit}"] = [
            Choice(bits, size * (bits or 16), 0.0 if bits == FLOAT else
                   scale * 4.0 ** -bits * (0.5 + noise[i]))
            for i, bits in enumerate((2, 4, 8, FLOAT))]
    return choices


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.2, 0.35, 0.6, 1.0])
def test_near_the_best_there_is_and_within_the_budget(seed, share):
    choices = problem(seed)
    budget = share * sum(own[-1].cost for own in choices.values())
    chosen = choose(choices, budget)
    assert sum(c.cost for c in chosen.values()) <= budget
    best = min(sum(c.error for c in combination)
               for combination in itertools.product(*choices.values())
               if sum(c.cost for c in combination) <= budget)
    largest = max(abs(a.error - b.error) for own in choices.values()
                  for a, b in zip(own, own[1:]))
    assert sum(c.error for c in chosen.values()) <= best + largest


def test_all_the_money_buys_float_and_none_is_told():
    choices = problem(0)
    assert all(c.bits == FLOAT for c in choose(choices, 1e9).values())
    with pytest.raises(QuantTuneError, match="below what the cheapest"):
        choose(choices, 10)


def test_a_choice_that_costs_more_and_gains_nothing_is_never_taken():
    choices = {"a": [Choice(4, 10, 1.0), Choice(8, 20, 2.0), Choice(FLOAT, 30, 0.5)]}
    assert choose(choices, 29)["a"].bits == 4 and choose(choices, 30)["a"].bits == FLOAT


@pytest.mark.parametrize("shape,bits", [((8, 16, 3, 3), 4), ((7, 5), 8), ((16, 32), 2)])
def test_bytes_are_those_of_a_packed_weight(shape, bits):
    packed = QuantizedWeight.quantize(torch.randn(shape), QuantSpec(bits))
    assert abs(layer_bytes(shape, bits) - packed.nbytes) <= 1
    assert layer_bytes(shape, FLOAT) == 2 * torch.Size(shape).numel()


def test_presets():
    shapes = {"input_blocks.0.0": (8, 4, 3, 3), "out.2": (4, 8, 3, 3), "attn1.to_q": (8, 8)}
    all_int8, laptop, workstation = (preset(p, shapes) for p in PRESETS)
    assert set(all_int8.bits.values()) == {8} and workstation.kept() == set(shapes)
    assert laptop.kept() == {"attn1.to_q"}
    with pytest.raises(QuantTuneError, match="no plan 'x'"):
        preset("x", shapes)


@pytest.mark.parametrize("bits,match", [({}, "no layer"), ({"a": 5}, "layer a.* 5"),
                                        ({"a": True}, "layer a"), ({"a": "4"}, "layer a")])
def test_impossible_plans(bits, match):
    with pytest.raises(QuantTuneError, match=match):
        BitPlan(bits)


def test_a_plan_for_another_model():
    with pytest.raises(QuantTuneError, match="names layer 'b'"):
        BitPlan({"a": 4, "b": 8}).check_layers({"a"})


def test_counts_by_group():
    assert by_group({"x.attn2.to_k": 4, "y.attn2.to_k": 8, "z.attn2.to_v": 4}) == {
        "cross-attention keys and values": {4: 2, 8: 1}}
