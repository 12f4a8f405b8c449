import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import LayerScales, QuantTuneError, ScaleSet, expert_index

SHAPES = {"a": (8, 4), "b": (6, 10)}


@given(st.integers(1, 40), st.integers(1, 2000), st.data())
def test_expert_of_whole_timesteps(experts, timesteps, data):
    t = data.draw(st.integers(0, timesteps - 1))
    expected = t * experts // timesteps
    assert expert_index(t, experts, timesteps) == expected
    assert expert_index(float(t), experts, timesteps) == expected
    assert int(expert_index(torch.tensor(t), experts, timesteps)) == expected
    assert int(expert_index(torch.tensor(float(t)), experts, timesteps)) == expected


def test_intervals_are_equal():
    index = expert_index(torch.arange(1000), 4)
    assert index.dtype == torch.int64
    assert torch.bincount(index).tolist() == [250] * 4


def test_out_of_range_timesteps_are_clamped():
    steps = [-5, 1000, 5000.5, 999.999, math.inf, -math.inf]
    assert [expert_index(t, 4) for t in steps] == [0, 3, 3, 3, 3, 0]
    assert expert_index(torch.tensor(steps), 4).tolist() == [0, 3, 3, 3, 3, 0]
    assert expert_index(math.nan, 4) == 0 and int(expert_index(torch.tensor(math.nan), 4)) == 0


def test_fractions():
    assert expert_index(0.75, 4, 1) == 3
    assert expert_index(torch.tensor([0.0, 0.2499, 0.25, 1.0]), 4, 1).tolist() == [0, 0, 1, 3]


def test_identity():
    scale_set = ScaleSet.identity(SHAPES, 3)
    assert scale_set.num_parameters == 3 * (8 + 4 + 6 + 10) and scale_set.has_s_in
    assert scale_set.nbytes == 4 * scale_set.num_parameters
    assert all((t == 1).all() for t in scale_set.tensors())
    assert scale_set.expert_index(999) == 2


def test_peqa():
    scale_set = ScaleSet.identity(SHAPES, 1, with_s_in=False)
    assert scale_set.num_parameters == 14 and not scale_set.has_s_in


def test_expert_rows():
    scale_set = ScaleSet.identity(SHAPES, 3)
    scale_set.layers["a"].r_out[2] = 5
    assert (scale_set.expert(2)["a"].r_out == 5).all()
    assert tuple(scale_set.expert(2)["b"].s_in.shape) == (1, 10)


def test_on_the_meta_device():
    assert ScaleSet.identity(SHAPES, 2, device="meta").num_parameters == 56


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
def test_wrong_counts(count):
    with pytest.raises(QuantTuneError, match="experts"):
        ScaleSet.identity(SHAPES, count)
    with pytest.raises(QuantTuneError, match="timesteps"):
        ScaleSet.identity(SHAPES, 1, count)


@pytest.mark.parametrize(
    ("r_out", "s_in", "message"),
    [
        (torch.ones(2, 4), None, "shape"),
        (torch.ones(4), None, "shape"),
        (torch.ones(1, 0), None, "shape"),
        (torch.ones(1, 4), torch.ones(2, 4), "s_in have shape"),
        (torch.tensor([[1.0, math.nan]]), None, "NaN"),
        (torch.ones(1, 4), torch.tensor([[math.inf]]), "s_in hold NaN or infinite"),
        (torch.ones(1, 4, dtype=torch.int64), None, "float"),
    ],
)
def test_wrong_tensors(r_out, s_in, message):
    with pytest.raises(QuantTuneError, match=message) as caught:
        ScaleSet({"layer": LayerScales(r_out, s_in)}, 1)
    assert "layer." in str(caught.value)
