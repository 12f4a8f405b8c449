"""The authors' state and ours: both ways without a changed integer, and hostile files."""

import copy
import json

import pytest
import torch
from torch import nn

from quanttune.quant import QuantTuneError
from quanttune.quant.tuneqdm_convert import (
    find_base,
    from_state,
    mean_scale,
    quantize_as_authors,
    to_state,
)
from quanttune.quant.tuneqdm_state import is_state, read_state
from quanttune.tests.quant.tuneqdm_files import authors_state, signed, their_weight


class Net(nn.Module):
    """Two layers of each kind, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(7, 5)
        self.plain = nn.Linear(5, 9, bias=False)
        self.conv = nn.Conv2d(3, 6, 3)
        self.one = nn.Conv2d(6, 4, 1)
        self.norm = nn.GroupNorm(2, 6)


NAMES = {"fc": "a.0", "plain": "a.1", "conv": "b.op", "one": "b.one"}
TENSORS = {f"{ours}.{end}": f"{name}.{end}" for name, ours in NAMES.items()
           for end in ("weight", "bias")} | {"n.weight": "norm.weight", "n.bias": "norm.bias"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuneqdm_state.pt"


def written(path, state):
    torch.save(state, path)
    return read_state(path)


def refused(path, state, match):
    torch.save(state, path)
    with pytest.raises(QuantTuneError, match=match) as caught:
        from_state(read_state(path), NAMES)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500, message


def floats():
    net = Net()
    back = {theirs: ours for ours, theirs in TENSORS.items()}
    return {back[k]: v for k, v in net.state_dict().items() if back[k] and (
        k.endswith("bias") or k.startswith("norm"))}


def ours_weight(layers, scales, name, expert):
    own = scales.layers[name]
    r_out, s_in = own.r_out[expert].reshape(-1, 1), own.s_in[expert]
    return layers[name].dequantize(r_out=r_out, s_in=s_in)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 6, 5, 1])
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_weight_of_every_expert_is_theirs(bits, experts, symmetric, path):
    if bits == 1 and symmetric:
        return  # their scale divides by 0 there
    state = authors_state(Net(), bits, experts, symmetric)
    layers, scales = from_state(written(path, state), NAMES)
    assert scales.num_experts == experts and scales.num_timesteps == 1000
    assert set(scales.layers) == set(layers) == set(NAMES.values())
    for name, ours in NAMES.items():
        wanted = {1: 2, 5: 8, 6: 8}.get(bits, bits)
        assert layers[ours].bits == wanted and layers[ours].symmetric == symmetric
        for expert in range(experts):
            expected = their_weight(state, name, expert)
            assert torch.allclose(ours_weight(layers, scales, ours, expert), expected,
                                  rtol=1e-6, atol=expected.abs().max().item() * 1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2, 6])
def test_there_and_back(bits, path):
    state = authors_state(Net(), bits, 3)
    layers, scales = from_state(written(path, state), NAMES)
    again = to_state(layers, floats(), scales, TENSORS)
    assert again["config"] == state["config"]
    for key, value in state["delta_state"].items():
        found = again["delta_state"][key]
        assert found.shape == value.shape and found.dtype == value.dtype, key
        if key.endswith(("weight_int", "zero_point", "bias")):
            assert torch.equal(found, value), key
        else:
            assert torch.allclose(found, value, rtol=3e-7, atol=0), key


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_ours_there_and_back(bits, path):
    """A file of this program gives everything back: integers, scales, s0 and whose they are."""
    from quanttune.quant import (
        LayerScales,
        QuantizedWeight,
        QuantSpec,
        ScaleMetadata,
        ScaleSet,
        fingerprint,
    )

    net, generator = Net(), torch.Generator().manual_seed(3)
    layers = {ours: QuantizedWeight.quantize(net.get_submodule(name).weight, QuantSpec(bits))
              for name, ours in NAMES.items()}
    given = {n: LayerScales(1 + 0.1 * torch.randn(2, w.shape[0], generator=generator),
                            1 + 0.1 * torch.randn(2, w.shape[1], generator=generator))
             for n, w in layers.items()}
    told = ScaleMetadata(base_fingerprint=fingerprint(layers), base_name="b", subject="a dog",
                         steps=7, seed=3, bits=bits, extra={"loss": 0.5})
    state = to_state(layers, floats(), ScaleSet(given, 2, 100, told), TENSORS, {"unet": {"x": 1}})
    found = written(path, state)
    assert found.ours["unet"] == {"x": 1} and "norm.weight" in found.floats
    again, scales = from_state(found, NAMES)
    assert fingerprint(again) == fingerprint(layers)
    assert scales.num_timesteps == 100 and scales.metadata.extra["loss"] == 0.5
    assert (scales.metadata.subject, scales.metadata.steps, scales.metadata.seed) == ("a dog", 7, 3)
    for name, own in given.items():
        assert torch.allclose(scales.layers[name].r_out, own.r_out, rtol=3e-7, atol=0)
        assert torch.equal(scales.layers[name].s_in, own.s_in)


@pytest.mark.parametrize("inputs", ["none", "some"])
def test_sets_of_fewer_scales_come_back_as_they_are(inputs, path):
    """Their code wants both scales in every layer: what was not there is ones, and noted."""
    from quanttune.quant import LayerScales, QuantizedWeight, QuantSpec, ScaleSet

    net, generator = Net(), torch.Generator().manual_seed(3)
    layers = {ours: QuantizedWeight.quantize(net.get_submodule(name).weight, QuantSpec(4))
              for name, ours in NAMES.items()}
    given = {n: LayerScales(1 + 0.1 * torch.randn(2, layers[n].shape[0], generator=generator))
             for n in ("a.0", "b.op")}
    if inputs == "some":
        given["b.op"] = LayerScales(given["b.op"].r_out, torch.ones(2, 3))
    state = to_state(layers, floats(), ScaleSet(given, 2, 1000), TENSORS)
    assert sum(key.endswith("delta_in_experts") for key in state["delta_state"]) == len(layers)
    _, scales = from_state(written(path, state), NAMES)
    assert scales.layers.keys() == given.keys()
    for name, own in given.items():
        found = scales.layers[name]
        assert torch.allclose(found.r_out, own.r_out, rtol=3e-7, atol=0)
        assert (found.s_in is None) == (own.s_in is None), name
        assert own.s_in is None or torch.equal(found.s_in, own.s_in)
    # What was trained since then counts, whatever the note says.
    state["delta_state"]["fc.delta_in_experts"] *= 1.5
    state["delta_state"]["one.delta_out_experts"] *= 1.5
    _, scales = from_state(written(path, state), NAMES)
    assert scales.layers.keys() == {*given, "b.one"}
    assert bool((scales.layers["a.0"].s_in == 1.5).all())


def test_mixed_widths_come_back(path):
    from quanttune.quant import QuantizedWeight, QuantSpec

    net = Net()
    layers = {ours: QuantizedWeight.quantize(net.get_submodule(name).weight, QuantSpec(bits))
              for (name, ours), bits in zip(NAMES.items(), (8, 4, 3, 2))}
    state = to_state(layers, floats(), None, TENSORS)
    assert state["config"]["n_bits"] == 8 and state["config"]["num_experts"] == 1
    again, scales = from_state(written(path, state), NAMES)
    assert {n: w.bits for n, w in again.items()} == {n: w.bits for n, w in layers.items()}
    assert all(torch.equal(again[n].packed, w.packed) for n, w in layers.items())
    assert all(bool((s.r_out == 1).all()) for s in scales.layers.values())
    for key in ("quanttune", "quanttune_scales"):  # as the authors' own code would save it again
        state.pop(key)
    plain, _ = from_state(written(path, state), NAMES)
    for name, weight in layers.items():
        assert torch.allclose(plain[name].dequantize(), weight.dequantize(), rtol=1e-6)


def test_zero_points_outside_of_the_range_are_kept(path):
    net = Net()
    with torch.no_grad():
        net.fc.weight.add_(3)  # no weight near 0: the zero point lies far below
    state = authors_state(net, 4, 1)
    layers, _ = from_state(written(path, state), NAMES)
    assert float(layers["a.0"].zero_point.min()) < -8
    again = to_state(layers, floats(), None, TENSORS)
    assert torch.equal(again["delta_state"]["fc.zero_point"], state["delta_state"]["fc.zero_point"])


def test_scales_that_training_carried_through_zero(path):
    state = authors_state(Net(), 8, 2)
    out = state["delta_state"]["fc.delta_out_experts"]
    out[0, 0], out[1, 1], out[:, 2] = -out[0, 0], 0, 0
    layers, scales = from_state(written(path, state), NAMES)
    assert bool((layers["a.0"].scale > 0).all())
    for expert in (0, 1):
        assert torch.allclose(ours_weight(layers, scales, "a.0", expert),
                              their_weight(state, "fc", expert), rtol=1e-6, atol=1e-7)


def test_mean_scale():
    assert torch.equal(mean_scale(torch.tensor([[1.0, -3.0, 0.0], [2.0, 3.0, 0.0]])),
                       torch.tensor([1.5, 3.0, 1.0]))
    same = torch.rand(1, 50) * 1e-3
    assert torch.equal(mean_scale(same.expand(3, 50)), same[0])


class TestPieces:
    """What files of other ages and settings lack."""

    def test_no_config(self, path):
        state = authors_state(Net(), 4, 2)
        whole = from_state(written(path, state), NAMES)[0]
        for less in ({"delta_state": state["delta_state"]}, state["delta_state"],
                     {"delta_state": state["delta_state"], "config": None},
                     {"delta_state": state["delta_state"], "config": {"n_bits": 4}}):
            found = written(path, less)
            layers, scales = from_state(found, NAMES)
            assert (scales.num_experts, scales.num_timesteps, found.width) == (2, 1000, 4)
            assert all(torch.equal(layers[n].packed, w.packed) for n, w in whole.items())

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "unet._orig_mod."])
    def test_saved_from_inside_a_wrapper(self, prefix, path):
        found = written(path, authors_state(Net(), prefix=prefix))
        assert set(found.layers) == set(NAMES)

    def test_no_input_scales(self, path):
        state = authors_state(Net(), 8, 2)
        for key in [k for k in state["delta_state"] if k.endswith("delta_in_experts")]:
            del state["delta_state"][key]
        layers, scales = from_state(written(path, state), NAMES)
        assert not scales.has_s_in
        again = to_state(layers, floats(), scales, TENSORS)
        assert again["config"]["train_delta_in"] is False
        assert bool((again["delta_state"]["fc.delta_in_experts"] == 1).all())

    def test_symmetric_without_zero_points(self, path):
        state = authors_state(Net(), 8, 1, symmetric=True)
        whole = from_state(written(path, state), NAMES)[0]
        for key in [k for k in state["delta_state"] if k.endswith("zero_point")]:
            del state["delta_state"][key]
        layers, _ = from_state(written(path, state), NAMES)
        assert torch.equal(layers["b.op"].zero_point, whole["b.op"].zero_point)

    def test_scales_without_experts(self, path):
        state = authors_state(Net(), 8, 1)
        own = {k.removesuffix("_experts"): v[0] if k.endswith("_experts") else v
               for k, v in state["delta_state"].items()}
        layers, scales = from_state(written(path, {"delta_state": own}), NAMES)
        assert torch.allclose(ours_weight(layers, scales, "b.op", 0),
                              their_weight(state, "conv", 0), rtol=1e-6, atol=1e-7)

    def test_halves(self, path):
        state = authors_state(Net(), 8, 2)
        own = {k: v.half() if v.is_floating_point() else v
               for k, v in state["delta_state"].items()}
        assert written(path, {"delta_state": own}).layers["fc"].s_out.dtype == torch.float32


def test_a_state_of_no_experts(path):
    state = authors_state(Net(), 8, 2)
    for key, value in state["delta_state"].items():
        if key.endswith("_experts"):
            state["delta_state"][key] = value[:0]
    refused(path, {**state, "config": {**state["config"], "num_experts": 0}}, "says 0 experts")


class TestBase:
    """The float model that the training began with."""

    @pytest.mark.parametrize("bits", [8, 4, 2])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_their_quantizer(self, bits, symmetric):
        weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
        for found, expected in zip(quantize_as_authors(weight, bits, symmetric),
                                   signed(weight, bits, symmetric)):
            assert torch.equal(found, expected)

    def test_its_scales_are_found_again(self, path):
        net = Net()
        state = written(path, authors_state(net, 4, 3))
        layer = find_base(state.layers["conv"], net.conv.weight, False, 4)
        assert torch.equal(layer.s0, signed(net.conv.weight.detach(), 4)[2])
        assert layer.integers is state.layers["conv"].integers
        other = find_base(state.layers["conv"], net.conv.weight * 1.3 + 0.01, False, 4)
        assert other.s0 is None

    def test_integers_of_a_file_of_scales_alone(self, path):
        net = Net()
        state = authors_state(net, 4, 2)
        own = {k: v for k, v in state["delta_state"].items()
               if not k.endswith(("weight_int", "zero_point"))}
        refused(path, {**state, "delta_state": own}, "has no integers for any layer, only")
        some = {k: v for k, v in state["delta_state"].items() if k != "fc.weight_int"}
        refused(path, {**state, "delta_state": some}, "has no integers for the layer 'fc', only")
        layer = find_base(written(path, {**state, "delta_state": own}).layers["fc"],
                          net.fc.weight, False, 4)
        assert torch.equal(layer.integers, state["delta_state"]["fc.weight_int"])


class TestHostile:
    @pytest.mark.parametrize("change, match", [
        ({"fc.weight_int": torch.zeros(5, 7)}, "no integer weight"),
        ({"fc.weight_int": torch.zeros(5, dtype=torch.int8)}, "no integer weight"),
        ({"fc.weight_int": torch.zeros(0, 7, dtype=torch.int8)}, "no integer weight"),
        ({"fc.weight_int": torch.zeros(5, 8, dtype=torch.int8)}, "delta_in_experts has the shape"),
        ({"fc.weight_int": torch.full((5, 7), 999)}, "says 8 bits and the layer fc has integers"),
        ({"fc.zero_point": torch.zeros(4, 1)}, "zero_point has the shape"),
        ({"fc.zero_point": torch.full((5, 1), 0.5)}, "is not whole numbers"),
        ({"fc.zero_point": torch.full((5, 1), float("nan"))}, "is not whole numbers"),
        ({"fc.zero_point": None}, "has no zero_point"),
        ({"fc.delta_out_experts": None}, "has no delta_out_experts"),
        ({"fc.delta_out_experts": torch.ones(2, 6, 1)}, "delta_out_experts has the shape"),
        ({"fc.delta_out_experts": torch.ones(2)}, "delta_out_experts has the shape"),
        ({"fc.delta_out_experts": torch.ones(3, 5, 1)}, "says 2 experts and has scales of 2, 3"),
        ({"fc.delta_out_experts": torch.full((2, 5, 1), float("inf"))}, "is not finite"),
        ({"fc.delta_out_experts": torch.ones(2, 5, 1, dtype=torch.int32)}, "no float"),
        ({"fc.delta_in_experts": torch.ones(2, 1, 7, 2)}, "delta_in_experts has the shape"),
        ({"fc.bias": torch.full((5,), float("nan"))}, "fc.bias is not finite"),
        ({"fc.bias": torch.zeros(5, dtype=torch.int8)}, "fc.bias is not finite, or no float"),
        ({"fc.bias": 3}, "holds something else than tensors"),
        ({3: torch.zeros(1)}, "holds something else than tensors"),
        ({"x" * 5000: torch.full((1,), float("nan"))}, "is not finite"),
    ])
    def test_tensors(self, change, match, path):
        state = authors_state(Net(), 8, 2)
        own = {k: v for k, v in {**state["delta_state"], **change}.items() if v is not None}
        refused(path, {**state, "delta_state": own}, match)

    @pytest.mark.parametrize("change, match", [
        ({"n_bits": 4}, "says 4 bits and the layer fc has integers from -128"),
        ({"n_bits": 0}, "n_bits are 0"), ({"n_bits": 16}, "n_bits are 16"),
        ({"n_bits": "8"}, "n_bits are 8"), ({"n_bits": True}, "n_bits are True"),
        ({"num_experts": 3}, "says 3 experts and has scales of 2"),
        ({"num_experts": [2]}, "experts and has scales"),
        ({"total_denoising_steps": 0}, "total_denoising_steps are 0"),
        ({"total_denoising_steps": 10**12}, "total_denoising_steps are 1000000000000"),
        ({3: 4}, "no mapping of settings")])
    def test_config(self, change, match, path):
        state = authors_state(Net(), 8, 2)
        refused(path, {**state, "config": {**state["config"], **change}}, match)

    @pytest.mark.parametrize("found", [[], {}, {"fc.weight": torch.zeros(2)}, 3])
    def test_something_else(self, found, path):
        refused(path, found, "is no state of TuneQDM")
        assert not is_state(found)

    @pytest.mark.parametrize("found, match", [
        ({"delta_state": 3}, "holds something else than tensors"),
        ({"delta_state": {}}, "lacks the output scales"),
        ({"fc.weight_int": torch.zeros(2, 2, dtype=torch.int8)}, "lacks the output scales"),
        ({"delta_state": {"fc.delta_in_experts": torch.ones(1, 1, 2)}}, "lacks the output scales"),
    ])
    def test_a_state_without_its_scales_is_one(self, found, match, path):
        assert is_state(found)
        refused(path, found, match)

    @pytest.mark.parametrize("piece", ["delta_out_experts", "delta_in_experts"])
    @pytest.mark.parametrize("change, match", [
        (lambda t: t.to(torch.complex64), "no float"), (lambda t: t.bool(), "no float"),
        (lambda t: t.int(), "no float"), (lambda t: t / 0, "not finite"),
        (lambda t: t * torch.nan, "not finite"), (lambda t: t.double() * 1e300, "not finite"),
        (lambda t: t * 1e30, "which no model has")])
    def test_scales_of_no_model(self, piece, change, match, path):
        state = authors_state(Net(), 8, 2)
        key = f"fc.{piece}"
        state["delta_state"][key] = change(state["delta_state"][key])
        refused(path, state, f"{key} .*{match}")

    @pytest.mark.parametrize("value, match", [
        (torch.full((5, 1), 1e30), "has a value of 1e.30, which no model has"),
        (torch.full((5, 1), 1e300, dtype=torch.float64), "not whole numbers"),
        (torch.ones(5, 1, dtype=torch.bool), "torch.bool, no numbers"),
        (torch.ones(5, 1, dtype=torch.complex64), "torch.complex64, no numbers"),
        (torch.full((5, 1), 1.25), "not whole numbers")])
    def test_zero_points_of_no_model(self, value, match, path):
        state = authors_state(Net(), 8, 2)
        state["delta_state"]["fc.zero_point"] = value
        refused(path, state, match)

    def test_zero_points_of_a_channel_whose_weights_are_all_alike(self, path):
        """Their quantizer gives it a step of 1e-8."""
        net = Net()
        net.fc.weight.data[0] = 0.75
        state = authors_state(net, 8, 2, amount=0.0)
        assert state["delta_state"]["fc.zero_point"].abs().max() > 5e7
        layers, scales = from_state(written(path, state), NAMES)
        found = ours_weight(layers, scales, "a.0", 1)
        assert torch.allclose(found[0], net.fc.weight[0], rtol=1e-6)

    @pytest.mark.parametrize("key", ["fc.weight_int", "fc.zero_point", "fc.delta_out_experts",
                                     "fc.delta_in_experts", "fc.bias"])
    @pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: t.to("meta"),
                                        lambda t: t.to(torch.uint16)])
    def test_tensors_of_odd_kinds(self, key, change, path):
        state = authors_state(Net(), 8, 2)
        state["delta_state"][key] = change(state["delta_state"][key])
        if key == "fc.zero_point" and change(torch.ones(1)).dtype == torch.uint16:
            match = "no numbers"
        else:
            match = "no integer weight|no float|is no plain tensor"
        refused(path, state, match)

    def test_code(self, path):
        refused(path, {"delta_state": {"fc.delta_out_experts": print}}, "holds more than weights")

    @pytest.mark.parametrize("damage", [b"", b"junk" * 9, None])
    def test_half_a_file(self, damage, path):
        torch.save(authors_state(Net()), path)
        path.write_bytes(path.read_bytes()[:-500] if damage is None else damage)
        with pytest.raises(QuantTuneError, match="is damaged or holds more than weights") as caught:
            read_state(path)
        assert "\n" not in str(caught.value)

    def test_no_file(self, path):
        with pytest.raises(QuantTuneError, match="does not exist"):
            read_state(path)

    @pytest.mark.parametrize("note", ["", "[]", "3", "[" * 9999, '{"bits": {"fc": "x"}}',
                                      '{"bits": {}, "scales": {"odd": 1}}',
                                      '{"bits": {}, "scales": {"steps": "x"}}', 7, None])
    def test_a_note_of_ours_that_is_none(self, note, path):
        state = {**authors_state(Net(), 8, 2), "quanttune": note, "quanttune_scales": {}}
        assert from_state(written(path, state), NAMES)[1].metadata.subject == ""

    @pytest.mark.parametrize("scale", [torch.zeros(2, 5), torch.ones(2, 4), torch.ones(5), 3,
                                       torch.ones(2, 5).half(), torch.ones(3, 5),
                                       torch.full((2, 5), float("nan"))])
    def test_scales_of_ours_that_are_none(self, scale, path):
        state = {**authors_state(Net(), 8, 2), "quanttune": '{"bits": {}}',
                 "quanttune_scales": {"fc": scale}}
        assert written(path, state).layers["fc"].s0 is None

    def test_bits_of_ours_that_do_not_hold_the_integers(self, path):
        for bits in (2, 99):
            state = {**authors_state(Net(), 8, 2), "quanttune_scales": {},
                     "quanttune": json.dumps({"bits": {"fc": bits}})}
            refused(path, state, "the layer fc has integers from")

    def test_layers_that_are_not_in_the_map(self, path):
        found = written(path, authors_state(Net(), 8, 2))
        with pytest.raises(QuantTuneError, match="has a layer 'one' that the UNet has not"):
            from_state(found, {k: v for k, v in NAMES.items() if k != "one"})


class TestWhatTheirFormCannotHold:
    @pytest.fixture
    def ours(self, path):
        return from_state(written(path, authors_state(Net(), 8, 2)), NAMES)

    def refused(self, match, *args):
        with pytest.raises(QuantTuneError, match=match) as caught:
            to_state(*args)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    def test_two_groups_of_inputs(self, ours):
        from quanttune.quant import QuantizedWeight, QuantSpec

        split = QuantizedWeight.quantize(torch.randn(4, 6, 1, 1), QuantSpec(8), split=2)
        self.refused("'b.one' has scales for two groups", {**ours[0], "b.one": split}, floats(),
                     None, TENSORS)

    def test_layers_in_float(self, ours):
        layers = {n: w for n, w in ours[0].items() if n != "b.one"}
        self.refused("'b.one' is kept in float", layers,
                     {**floats(), "b.one.weight": torch.zeros(4, 6, 1, 1)}, None, TENSORS)

    def test_scales_of_another_model(self, ours):
        layers, scales = ours
        self.refused("which the quantized model has not",
                     {n: w for n, w in layers.items() if n != "b.one"}, floats(), scales, TENSORS)
        other = copy.copy(scales.layers)
        scales.layers["b.one"] = scales.layers["b.op"]
        self.refused("do not fit its weight", layers, floats(), scales, TENSORS)
        assert other

    def test_names_without_a_counterpart(self, ours):
        self.refused("'x.bias' has no name in diffusers", ours[0],
                     {**floats(), "x.bias": torch.zeros(1)}, None, TENSORS)
