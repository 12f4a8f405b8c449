"""peft's adapters in place: what they compute, what they leave, what they refuse."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.training.lora_toy import ToyNet, settings
from quanttune.training.adapters import adapters
from quanttune.training.lora_layer import LoraLayer

CPU = torch.device("cpu")
NAMES = ["in_layers.0", "attn1.to_q", "out.0"]
KINDS = {"LoRA": {}, "alpha": {"alpha": 7.0}, "rsLoRA": {"rslora": True, "alpha": 3.0},
         "DoRA": {"dora": True}, "DoRA, alpha": {"dora": True, "alpha": 2.0}}


def run(net, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 3, 6, generator=generator)
    return net(x.to(dtype), context.to(dtype))


def merged(net, layers):
    """The net with ``W + alpha / rank * up @ down`` in the weights, DoRA as the host has it."""
    result = ToyNet()
    for name, layer in layers.items():
        weight = result.get_submodule(name).weight
        delta = (layer.up.flatten(1) @ layer.down.flatten(1)).view_as(weight)
        new = weight + layer.alpha / layer.rank * delta
        if layer.dora_scale is not None:
            norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (new.dim() - 1))
            new = layer.dora_scale * new / norm
        weight.data.copy_(new)
    return result


def shaken(own):
    """Adapters that are no longer at their start."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in own.parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("kind", list(KINDS))
def test_they_begin_as_the_model_and_compute_what_is_exported(kind):
    net, before = ToyNet(), run(ToyNet())
    with adapters(net, NAMES, settings(**KINDS[kind]), CPU) as own:
        assert torch.allclose(run(net), before, atol=1e-6)
        shaken(own)
        layers, trained = own.export(), run(net)
        assert not torch.allclose(trained, before, atol=1e-2)
        assert all(p.requires_grad and p.dtype == torch.float32 for p in own.parameters)
    assert torch.allclose(run(merged(net, layers)), trained, atol=1e-5)
    assert torch.equal(run(net), before), "and are gone in the end"
    assert list(dict(net.named_modules())) == list(dict(ToyNet().named_modules()))
    assert "peft_config" not in vars(net)


def test_every_matrix_learns():
    net = ToyNet()
    with adapters(net, NAMES, settings(dora=True), CPU) as own:
        shaken(own)
        run(net).square().mean().backward()
        assert len(own.parameters) == 9
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters)
        assert all(p.grad is None for n, p in net.named_parameters() if "base_layer" in n)


def test_half_precision_activations_meet_float32_matrices():
    net = ToyNet().to(torch.bfloat16)
    with adapters(net, NAMES, settings(), CPU) as own:
        out = run(net, torch.bfloat16)
        out.float().square().mean().backward()
        assert out.dtype == torch.bfloat16
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in own.parameters)


def test_dora_with_dropout_asks_the_layer_and_computes_what_peft_does():
    from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer

    net = ToyNet()
    for bias in (net.in_layers[0].bias, net.out[0].bias, net.attn1["to_q"].bias):
        assert bias.abs().sum() > 0
    with adapters(net, NAMES, settings(dora=True, dropout=0.5), CPU) as own:
        shaken(own)
        asked = []
        for layer in own.layers.values():
            layer.get_base_layer().register_forward_hook(lambda m, *_: asked.append(m))
        torch.manual_seed(0)
        ours, calls = run(net), len(asked)
        for layer in own.layers.values():
            [magnitude] = layer.lora_magnitude_vector.values()
            conv = isinstance(layer.get_base_layer(), torch.nn.Conv2d)
            magnitude.__class__ = DoraConv2dLayer if conv else DoraLinearLayer
        torch.manual_seed(0)
        assert torch.allclose(ours, run(net), atol=1e-5)
        assert calls == 6 and len(asked) == 9, "peft multiplies by the weight itself"


def test_the_seed_and_the_name_decide_the_start():
    with adapters(ToyNet(), NAMES, settings(), CPU) as a:
        first = a.export()
    torch.rand(7)
    with adapters(ToyNet(), NAMES[::-1], settings(), CPU) as b:
        again = b.export()
    with adapters(ToyNet(), NAMES, settings(seed=1), CPU) as c:
        other = c.export()
    for name in NAMES:
        assert torch.equal(first[name].down, again[name].down)
        assert not torch.equal(first[name].down, other[name].down)
        assert not first[name].up.any()


def test_small_layers_take_what_they_can_at_the_same_scaling():
    with adapters(ToyNet(), NAMES, settings(rank=6, alpha=12.0), CPU) as own:
        layers = own.export()
        assert own.smaller == ["out.0"]
    assert {n: v.rank for n, v in layers.items()} == {
        "in_layers.0": 6, "attn1.to_q": 6, "out.0": 4}
    assert all(v.alpha / v.rank == 2 for v in layers.values())


def test_a_rank_larger_than_every_layer_is_refused():
    with pytest.raises(QuantTuneError, match="rank 9 is larger than every layer.*at most 8"):
        with adapters(ToyNet(), NAMES, settings(rank=9), CPU):
            pass


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_goes_on_from_what_was_exported(kind):
    net = ToyNet()
    with adapters(net, NAMES, settings(**KINDS[kind]), CPU) as own:
        shaken(own)
        layers, trained = own.export(), run(net)
    changed = {**KINDS[kind], "alpha": 5.0}
    with adapters(net, NAMES, settings(**changed), CPU) as own:
        own.load(layers)
        assert torch.allclose(run(net), trained, atol=1e-5), "whatever alpha is now"


@pytest.mark.parametrize("change,match", [
    (lambda v: {n: v[n] for n in NAMES[:2]}, "not on the layer 'out.0'"),
    (lambda v: {**v, "else": v["out.0"]}, "also on the layer 'else'"),
    (lambda v: {**v, "out.0": LoraLayer(v["out.0"].down[:2], v["out.0"].up[:, :2], 2.0)},
     "rank 2, but 4 is set"),
    (lambda v: {**v, "out.0": LoraLayer(v["out.0"].down, v["out.0"].up, 4.0,
                                        torch.ones(4, 1, 1, 1))}, "has DoRA's magnitudes"),
])
def test_a_start_that_does_not_fit(change, match):
    with adapters(ToyNet(), NAMES, settings(), CPU) as own:
        layers = own.export()
    with adapters(ToyNet(), NAMES, settings(), CPU) as own:
        with pytest.raises(QuantTuneError, match=match) as caught:
            own.load(change(layers), "cat.safetensors")
        assert "cat.safetensors" in str(caught.value)


def test_an_error_inside_comes_through_and_leaves_nothing():
    net = ToyNet()
    with pytest.raises(ValueError, match="mine"):
        with adapters(net, NAMES, settings(), CPU):
            raise ValueError("mine")
    assert type(net.out[0]) is torch.nn.Conv2d
