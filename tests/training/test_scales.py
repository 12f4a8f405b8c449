"""Trainable scales: their start, selection by expert, and the set they become."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.training.scales import TrainableScales

SHAPES = {"a": (4, 3), "b": (6, 2)}


def test_they_start_at_one_and_count_right():
    scales = TrainableScales(SHAPES, 3)
    assert scales.num_parameters == 3 * (4 + 3 + 6 + 2)
    for layer in scales.scale_set(1000).layers.values():
        assert (layer.r_out == 1).all() and (layer.s_in == 1).all()
    peqa = TrainableScales(SHAPES, 1, with_s_in=False)
    assert peqa.num_parameters == 10 and not peqa.scale_set(1000).has_s_in


def test_noise_of_the_input_scales_is_seeded():
    """Alg. 1 draws s_in from N(1, 0.01): standard deviation 0.1."""
    wide = {"a": (4, 20_000)}
    one, same, other = (TrainableScales(wide, 2, s_in_noise=0.1, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.s_in[0], same.s_in[0]) and not torch.equal(one.s_in[0], other.s_in[0])
    assert abs(float(one.s_in[1].std()) - 0.1) < 3e-3 and abs(float(one.s_in[1].mean()) - 1) < 3e-3


def test_rows_are_the_samples_experts_and_gradients_reach_only_those():
    scales = TrainableScales(SHAPES, 4)
    with torch.no_grad():
        for i, p in enumerate(scales.r_out):
            p.fill_(i + 1.0)
    mixed = scales.select([2, 0, 2])
    assert mixed["b"].r_out[:, 0].tolist() == [3, 1, 3] and mixed["b"].rows == 3
    alike = scales.select([1, 1])
    assert alike["a"].rows == 1
    (alike["a"].r_out.sum() + alike["b"].s_in.sum()).backward()
    assert [p.grad is None for p in scales.r_out] == [True, False, True, True]
    assert scales.s_in[1].grad.tolist() == [0, 0, 0, 1, 1]


def test_absolute_scales_are_relative_to_the_quantizers():
    """Two parts: s0 [out, 2] goes part by part, as r_out does."""
    s0 = {"a": torch.tensor([[1.0, 10.0], [2.0, 20.0]]), "b": torch.full((6, 1), 0.5)}
    scales = TrainableScales(SHAPES, 1, base_scales=s0)
    assert scales.r_out[0].tolist() == [1, 2, 10, 20] + [0.5] * 6
    assert (scales.select([0])["a"].r_out == 1).all()
    with torch.no_grad():
        scales.r_out[0] += 0.1
    assert torch.allclose(scales.scale_set(1000).layers["a"].r_out[0],
                          torch.tensor([1.1, 1.05, 1.01, 1.005]))


def test_copying_an_expert():
    scales = TrainableScales(SHAPES, 3, s_in_noise=0.1)
    scales.copy_expert(0)
    r, s = scales.flat()
    assert (s == s[:1]).all() and (r == 1).all()


def test_the_set_is_a_copy():
    scales = TrainableScales(SHAPES, 2)
    before = scales.scale_set(1000)
    with torch.no_grad():
        scales.r_out[0] += 1
    assert (before.layers["a"].r_out == 1).all()


def test_no_layers():
    with pytest.raises(QuantTuneError, match="no quantized layer"):
        TrainableScales({}, 1)
