"""From a timestep to a layer's output: bank and layers together against eq. 5 materialised."""

import pytest
import torch
import torch.nn.functional as F

from quanttune.quant import LayerScales, ScaleBank, ScaleSet, conv2d, linear, scale_shape
from quanttune.tests.quant.reference import materialise, random_set, random_weight, relative

LAYERS = {
    "conv": random_weight((12, 6, 3, 3), 4),
    "skip": random_weight((10, 12, 1, 1), 3, split=7),
    "proj": random_weight((8, 10), 2, symmetric=True),
}
BIASES = {"conv": torch.randn(12), "skip": torch.randn(10), "proj": torch.randn(8)}
SHAPES = {name: scale_shape(q.shape, q.split) for name, q in LAYERS.items()}
X = torch.randn(4, 6, 7, 7)
TIMESTEPS = torch.tensor([999.0, 0.0, 250.0, 500.0])


def forward(x, scales):
    x = conv2d(x, LAYERS["conv"], BIASES["conv"], padding=1, scales=scales.get("conv"))
    x = conv2d(x, LAYERS["skip"], BIASES["skip"], scales=scales.get("skip"))
    return linear(x.mean((2, 3)), LAYERS["proj"], BIASES["proj"], scales.get("proj"))


def materialised(x, scales):
    """The same with a float weight per layer, for one sample's (r_out, s_in) by layer."""
    weights = {name: materialise(q, *scales.get(name, (None, None))) for name, q in LAYERS.items()}
    biases = {name: bias.double() for name, bias in BIASES.items()}
    x = F.conv2d(x.double(), weights["conv"], biases["conv"], padding=1)
    x = F.conv2d(x, weights["skip"], biases["skip"])
    return F.linear(x.mean((2, 3)), weights["proj"], biases["proj"])


def blend(entries, timestep):
    """``1 + sum_i strength_i * (scale_i - 1)`` of each layer, as (r_out, s_in)."""
    result = {}
    for name, (outputs, inputs) in SHAPES.items():
        r_out, s_in = torch.ones(outputs).double(), torch.ones(inputs).double()
        for scale_set, strength in entries:
            expert = scale_set.expert_index(timestep)
            if name in scale_set.layers:
                scales = scale_set.layers[name]
                r_out += strength * (scales.r_out[expert].double() - 1)
                if scales.s_in is not None:
                    s_in += strength * (scales.s_in[expert].double() - 1)
        result[name] = (r_out, s_in)
    return result


ENTRIES = {
    "one expert": [(random_set(SHAPES, 1), 1.0)],
    "four experts": [(random_set(SHAPES, 4), 1.0)],
    "peqa": [(random_set(SHAPES, 1, with_s_in=False), 1.0)],
    "half strength": [(random_set(SHAPES, 4), 0.5)],
    "beyond": [(random_set(SHAPES, 4), 1.7)],
    "negative": [(random_set(SHAPES, 4), -0.4)],
    "two sets": [(random_set(SHAPES, 4), 0.6), (random_set(SHAPES, 3, seed=9), 0.3)],
    "set and peqa": [(random_set(SHAPES, 2), 0.6), (random_set(SHAPES, 5, 1000, False, 8), 1)],
    "some layers": [(random_set({"skip": SHAPES["skip"]}, 4), 1.0)],
}


@pytest.mark.parametrize("case", ENTRIES)
def test_each_expert_equals_eq_5(case):
    bank = ScaleBank(SHAPES, ENTRIES[case])
    for timestep in (0, 249, 250, 400, 750, 999):
        actual = forward(X, bank.resolve(torch.full((4,), float(timestep))))
        expected = materialised(X, blend(ENTRIES[case], timestep))
        assert relative(actual, expected) < 1e-5


@pytest.mark.parametrize("case", ENTRIES)
def test_mixed_timesteps_equal_single_runs(case):
    bank = ScaleBank(SHAPES, ENTRIES[case])
    mixed = forward(X, bank.resolve(TIMESTEPS))
    for index, timestep in enumerate(TIMESTEPS):
        one = slice(index, index + 1)
        single = forward(X[one], bank.resolve(timestep.view(1)))
        assert relative(mixed[one], single) < 1e-5


def test_strength_zero_is_the_base_exactly():
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 4), 0.0)])
    base = forward(X, {})
    assert torch.equal(forward(X, bank.resolve(torch.tensor([5.0]))), base)
    assert relative(forward(X, bank.resolve(TIMESTEPS)), base) < 1e-6


def test_an_untrained_set_is_the_base_exactly():
    bank = ScaleBank(SHAPES, [(ScaleSet.identity(SHAPES, 3), 1.0)])
    assert torch.equal(forward(X, bank.resolve(torch.tensor([700.0]))), forward(X, {}))


def test_training_one_expert_leaves_the_others_alone():
    scale_set = ScaleSet.identity(SHAPES, 4)
    parameters = [t.requires_grad_() for t in scale_set.tensors()]
    experts = scale_set.expert_index(TIMESTEPS)
    scales = {
        name: LayerScales(s.r_out[experts], s.s_in[experts]) for name, s in scale_set.layers.items()
    }
    forward(X, scales)[1].square().sum().backward()
    for parameter in parameters:
        norms = parameter.grad.norm(dim=1)
        assert norms[0] > 0 and (norms[1:] == 0).all()


def test_switching_experts_allocates_nothing_of_weight_size():
    """The integers stay as they are; only two flat rows are made for the whole model."""
    bank = ScaleBank(SHAPES, [(random_set(SHAPES, 4), 1.0)])
    packed = {name: q.packed.data_ptr() for name, q in LAYERS.items()}
    for timestep in (0.0, 300.0, 600.0, 900.0):
        scales = bank.resolve(torch.tensor([timestep]))
        storage = {s.r_out.untyped_storage().nbytes() for s in scales.values()}
        assert storage == {4 * sum(outputs for outputs, _ in SHAPES.values())}
    assert packed == {name: q.packed.data_ptr() for name, q in LAYERS.items()}
