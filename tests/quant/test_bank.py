import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import QuantTuneError, ScaleBank, ScaleSet
from quanttune.tests.quant.reference import random_set

SHAPES = {"a": (8, 4), "b": (6, 10), "c": (3, 3)}


def blended(entries, name, timestep, which):
    """``1 + sum_i strength_i * (r_i[expert] - 1)`` for one layer and sample."""
    total = torch.ones(SHAPES[name][0 if which == "r_out" else 1], dtype=torch.float64)
    for scale_set, strength in entries:
        scales = scale_set.layers.get(name)
        rows = None if scales is None else getattr(scales, which)
        if rows is not None:
            total += strength * (rows[scale_set.expert_index(timestep)].double() - 1)
    return total


@given(
    st.lists(
        st.tuples(
            st.integers(1, 5),
            st.sampled_from([1000, 50]),
            st.floats(-2, 3),
            st.booleans(),
            st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.integers(0, 49), min_size=1, max_size=4),
)
def test_blend(specs, timesteps):
    entries = []
    for seed, (experts, total, strength, with_s_in, names) in enumerate(specs):
        shapes = {name: SHAPES[name] for name in names}
        entries.append((random_set(shapes, experts, total, with_s_in, seed), strength))
    resolved = ScaleBank(SHAPES, entries).resolve(torch.tensor(timesteps))
    touched = {name for scale_set, _ in entries for name in scale_set.layers}
    assert set(resolved) == touched
    for name, scales in resolved.items():
        assert scales.rows in (1, len(timesteps))
        for index, timestep in enumerate(timesteps):
            row = min(index, scales.rows - 1)
            expected = blended(entries, name, timestep, "r_out")
            assert torch.allclose(scales.r_out[row].double(), expected, atol=1e-5)
            expected = blended(entries, name, timestep, "s_in")
            if scales.s_in is None:
                assert (expected == 1).all()
            else:
                assert torch.allclose(scales.s_in[row].double(), expected, atol=1e-5)


def test_strength_one_is_exactly_the_set_and_zero_exactly_the_base():
    scale_set = random_set(SHAPES, 4)
    one = ScaleBank(SHAPES, [(scale_set, 1.0)]).resolve(torch.tensor([600.0]))
    zero = ScaleBank(SHAPES, [(scale_set, 0.0)]).resolve(torch.tensor([600.0]))
    for name in SHAPES:
        assert torch.equal(one[name].r_out[0], scale_set.layers[name].r_out[2])
        assert torch.equal(one[name].s_in[0], scale_set.layers[name].s_in[2])
        assert (zero[name].r_out == 1).all() and (zero[name].s_in == 1).all()


def test_same_experts_give_one_row_that_is_kept():
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 4), 1.0)])
    first = bank.resolve(torch.tensor([10.0, 240.0, 100.0]))
    assert first["a"].rows == 1
    assert bank.resolve(torch.tensor([5.0])) is first
    assert bank.resolve(torch.tensor([260.0])) is not first
    assert bank.resolve(torch.tensor([5.0])) is first


def test_mixed_timesteps_equal_single_runs():
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 4), 0.7), (random_set(SHAPES, 3, seed=5), 1.2)])
    steps = torch.tensor([0.0, 999.0, 500.0, 300.0])
    mixed = bank.resolve(steps)
    for index, step in enumerate(steps):
        single = bank.resolve(step.view(1))
        for name in SHAPES:
            assert torch.equal(mixed[name].r_out[index], single[name].r_out[0])
            assert torch.equal(mixed[name].s_in[index], single[name].s_in[0])


def test_scales_are_views_of_flat_tensors():
    resolved = ScaleBank(SHAPES, [(random_set(SHAPES, 2), 1.0)]).resolve(torch.tensor([1]))
    pointers = {s.r_out.untyped_storage().data_ptr() for s in resolved.values()}
    assert len(pointers) == 1


def test_the_cache_is_bounded():
    bank = ScaleBank({"a": (8, 4)}, [(random_set({"a": (8, 4)}, 200), 1.0)])
    for t in range(0, 1000, 5):
        bank.resolve(torch.tensor([t]))
    assert len(bank._cache) <= 32


def test_a_resolved_bank_of_inference_mode_can_be_saved_for_backward():
    with torch.inference_mode():
        bank = ScaleBank(SHAPES, [(random_set(SHAPES, 2), 1.0)])
        resolved = bank.resolve(torch.tensor([1]))
    x = torch.randn(3, 8, requires_grad=True)
    (x * resolved["a"].r_out).sum().backward()
    assert x.grad is not None


def test_no_entries_and_no_samples():
    assert ScaleBank(SHAPES, []).resolve(torch.tensor([1.0])) == {}
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 2), 1.0)])
    assert bank.resolve(torch.tensor([])) == {}
    assert bank.to("cpu") is bank and bank.nbytes == 2 * 4 * (17 + 17)


def test_to_another_device():
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 2), 1.0)])
    moved = bank.to("meta")
    assert moved.device.type == "meta" and bank.device.type == "cpu"


def test_another_count_of_timesteps():
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 4), 1.0)])
    fraction = bank.resolve(torch.tensor([0.6]), num_timesteps=1.0)
    assert torch.equal(fraction["a"].r_out, bank.resolve(torch.tensor([600.0]))["a"].r_out)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "much", None])
def test_wrong_strength(strength):
    with pytest.raises(QuantTuneError, match="strength"):
        ScaleBank(SHAPES, [(random_set(SHAPES, 1), strength)])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (8, 4)}, "layer z"),
        ({"a": (16, 4)}, "16 output scales for layer a, which needs 8"),
        ({"a": (8, 5)}, "5 input scales for layer a, which needs 4"),
    ],
)
def test_a_set_of_another_model(shapes, message):
    with pytest.raises(QuantTuneError, match=message):
        ScaleBank(SHAPES, [(ScaleSet.identity(shapes, 1), 1.0)])
