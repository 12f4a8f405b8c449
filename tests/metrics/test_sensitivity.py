"""What follows from a sensitivity: groups, the worst layers, plans, files, charts."""

import json
import math

import pytest
import torch

from quanttune.metrics.sensitivity import INT8, Sensitivity
from quanttune.metrics.sensitivity_charts import group_chart, heat_map, plan_chart
from quanttune.quant import QuantTuneError
from quanttune.quant.plan import FLOAT

SHAPES = {"input_blocks.0.0": (32, 4, 3, 3), "a.attn1.to_q": (64, 64), "a.ff.net.2": (64, 128)}


def sensitivity(precisions=("8", "4", INT8), forwards=(3, 0, 1)):
    factor = torch.tensor([1.0, 0.01, 0.1], dtype=torch.float64)
    weight = torch.tensor([{"8": 1e-6, "4": 1e-3, "2": 1e-1, INT8: 1e-5}[p] for p in precisions],
                          dtype=torch.float64)
    bucket = torch.tensor([2.0, math.nan, 1.0], dtype=torch.float64)
    return Sensitivity({n: (n,) for n in SHAPES}, SHAPES, {}, precisions,
                       factor[:, None, None] * weight[:, None] * bucket, forwards)


def test_mean_counts_forwards_and_skips_empty_buckets():
    mean = sensitivity().mean()
    assert float(mean[0, 1]) == pytest.approx(1e-3 * (3 * 2 + 1) / 4)


def test_groups_and_the_worst():
    found = sensitivity()
    assert list(found.by_group()) == ["first and last", "feed-forward",
                                      "self-attention queries and keys"]
    assert [n for n, _ in found.worst("4", 2)] == ["input_blocks.0.0", "a.ff.net.2"]
    assert "input_blocks.0.0" in found.report() and "INT8 products" in found.report()


def test_a_plan_protects_what_is_sensitive_and_keeps_the_size():
    found = sensitivity()
    plan, expected = found.plan(8.0)
    assert found.bits_per_weight(plan) <= 8.0 and 0 < expected < 0.02
    assert plan.bits["input_blocks.0.0"] in (8, FLOAT) and plan.bits["a.attn1.to_q"] == 4
    assert found.plan(16.0)[0].kept() == set(SHAPES)


def test_too_small_a_plan_says_what_is_possible():
    with pytest.raises(QuantTuneError, match=r"\(8, 4\); ask for at least 4\.\d\d"):
        sensitivity().plan(3.0)
    with pytest.raises(QuantTuneError, match="'int8' alone"):
        sensitivity((INT8,)).plan(8.0)


@pytest.mark.parametrize("change", [
    {"units": []}, {"units": {"a": ["nowhere"]}}, {"precisions": ["5"]}, {"forwards": [-1, 2]},
    {"error": [[["x"]]]}, {"error": []}, {"shapes": {}}, {"parts": None},
])
def test_a_damaged_file(change):
    raw = {**json.loads(sensitivity().to_json()), **change}
    with pytest.raises(QuantTuneError, match="x.json is damaged"):
        Sensitivity.from_json(json.dumps(raw), "The file x.json")


def test_through_a_file():
    found = sensitivity()
    again = Sensitivity.from_json(found.to_json())
    assert torch.equal(again.error.nan_to_num(-1), found.error.nan_to_num(-1))
    assert (again.units, again.shapes, again.precisions, again.forwards) == (
        found.units, found.shapes, found.precisions, found.forwards)


def test_charts():
    found = sensitivity()
    for picture in (group_chart(found), heat_map(found, "4"), plan_chart(found.plan(8.0)[0])):
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert len(colours) > 10 and picture.width >= 700


def test_nothing_moves_the_output():
    """A model whose output is constant: all errors are zero, and the charts are drawn."""
    found = sensitivity()
    flat = Sensitivity(found.units, SHAPES, {}, found.precisions, found.error * 0, found.forwards)
    group_chart(flat), heat_map(flat, "8")
    assert set(flat.plan(5.0)[0].bits.values()) == {4}
