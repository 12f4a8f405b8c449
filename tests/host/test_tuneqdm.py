"""TuneQDM's own files in the host: the forward of every expert, bases, nodes, and the way back."""

import copy
import json
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from quanttune.tests.harness.inprocess import run_node
from quanttune.tests.host import models, unets
from quanttune.tests.host.unets import WEIGHTS, told
from quanttune.tests.quant.tuneqdm_files import authors_state, their_weight

EXPERTS = 2
STATE = "tuneqdm_state.pt"


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def trained(folder, family="SD15", seed=0, **options):
    """The folder that a training leaves behind, the state, and the float UNet before it."""
    unet = unets.tiny_unet(family)
    state = authors_state(unet, experts=EXPERTS, seed=seed, **options)
    unets.save_pipeline(unet, folder)
    path = folder / "unet" / WEIGHTS
    norms = {k: v for k, v in load_file(path).items() if f"{k.removesuffix('.weight')}.weight_int"
             not in state["delta_state"]}
    save_file({**norms, **state["delta_state"]}, path)  # their UNet saves itself so
    torch.save(state, folder / STATE)
    return unet, state


def twin(unet, state, expert):
    """diffusers' UNet with the weights that an expert computes with."""
    with torch.inference_mode(False), torch.no_grad():
        other = copy.deepcopy(unet)
        for name in {k.rpartition(".")[0] for k in state["delta_state"] if k.endswith("_int")}:
            other.get_submodule(name).weight.copy_(their_weight(state, name, expert))
    return other


def at(given, timestep):
    """The inputs at one timestep, whose expert both samples use."""
    return given[0], torch.tensor([timestep, timestep]), *given[2:]


def read(path, base=None):
    from quanttune.host.tuneqdm import read_tuneqdm

    return read_tuneqdm(path, base)


def load(path):
    from quanttune.host.build import load_model

    return load_model(str(path), path.name)


def routed(path, scales=None):
    from quanttune.host.routing import apply_scale_set
    from quanttune.host.tuneqdm import read_scales

    model, warnings = apply_scale_set(load(path), read_scales(scales or path), 1.0, "subject")
    assert warnings == []
    return model


def convert(path, out, **options):
    from quanttune.host.convert_tuneqdm import convert as run

    return run(path, types.SimpleNamespace(out=out, **options))


def export(*args):
    from quanttune.host.tuneqdm import export_tuneqdm

    return export_tuneqdm(*args)


@pytest.mark.parametrize("family", list(unets.CONFIGS))
@pytest.mark.parametrize("bits", [8, 4])
def test_the_forward_of_every_expert_is_theirs(family, bits, tmp_path):
    unet, state = trained(tmp_path / "dog", family, bits=bits)
    model = routed(tmp_path / "dog" / STATE)
    given = unets.inputs(unet)
    for expert, timestep in enumerate((250.0, 750.0)):
        expected = unets.theirs(twin(unet, state, expert), at(given, timestep))
        assert models.relative(unets.ours(model, unet, at(given, timestep)), expected) < 1e-5


@pytest.mark.parametrize("family", list(unets.CONFIGS))
def test_there_and_back(family, tmp_path):
    """Zero unequal integers, and scales equal to the rounding of float32."""
    _, state = trained(tmp_path / "dog", family)
    convert(tmp_path / "dog" / STATE, tmp_path / "a.safetensors")
    export(tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "a-scales.safetensors")
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert again["config"] == state["config"]
    assert again["delta_state"].keys() >= state["delta_state"].keys()
    for key, value in state["delta_state"].items():
        found = again["delta_state"][key]
        assert found.shape == value.shape and found.dtype == value.dtype, key
        if key.endswith("_experts"):
            assert torch.allclose(found, value, rtol=3e-7, atol=0), key
        else:
            assert int((found != value).sum()) == 0, key


@pytest.mark.parametrize("family", list(unets.CONFIGS))
def test_ours_there_and_back(family, tmp_path):
    """What is exported needs no base to come back, and is what it was."""
    from quanttune.host.load_unet import load_float
    from quanttune.host.quantize import quantize_model
    from quanttune.host.routing import apply_scale_set
    from quanttune.quant import QuantSpec

    unet = unets.tiny_unet(family)
    folder = unets.save_pipeline(unet, tmp_path / "sd", {"prediction_type": "v_prediction"})
    model, _ = quantize_model(load_float(folder), QuantSpec(4), split_shortcuts=False)
    own = models.quantized_model(model)
    scales = models.random_scales(model, 3, base_fingerprint=own.fingerprint, subject="a dog")
    (tmp_path / "alone").mkdir()
    said = export(own.checkpoint, tmp_path / "alone" / "x.pt", scales)
    assert "3 experts" in said and "another base" not in said
    checkpoint, again, _ = read(tmp_path / "alone" / "x.pt")
    assert again.metadata.base_fingerprint == own.fingerprint and again.metadata.subject == "a dog"
    assert checkpoint.metadata.model_type == "V_PREDICTION"
    given = unets.inputs(unet)
    expected = unets.ours(apply_scale_set(model, scales, 1.0, "")[0], unet, given)
    found = unets.ours(routed(tmp_path / "alone" / "x.pt"), unet, given)
    assert models.relative(found, expected) < 1e-5
    other = models.random_scales(model, 3, base_fingerprint="other")
    assert "trained on another base" in export(own.checkpoint, tmp_path / "y.pt", other)
    assert "1 experts" in export(own.checkpoint, tmp_path / "z.pt")


class TestBase:
    def test_subjects_of_one_float_model_share_a_base(self, tmp_path):
        """Their quantization scales are found again in the float weights."""
        unet, first = trained(tmp_path / "dog", seed=0)
        _, second = trained(tmp_path / "cat", seed=1)
        base = unets.save_pipeline(unet, tmp_path / "base")
        one, dog, lines = read(tmp_path / "dog" / STATE, base)
        other, cat, _ = read(tmp_path / "cat" / STATE, base)
        assert dog.metadata.base_fingerprint == cat.metadata.base_fingerprint
        assert f"{len(one.layers)} of {len(one.layers)} layers" in lines[0]
        assert not all(torch.equal(dog.layers[n].r_out, cat.layers[n].r_out) for n in dog.layers)
        alone = [read(tmp_path / n / STATE)[1].metadata.base_fingerprint for n in ("dog", "cat")]
        assert alone[0] != alone[1]
        convert(tmp_path / "dog" / STATE, tmp_path / "a.safetensors", base=base)
        convert(tmp_path / "cat" / STATE, tmp_path / "b.safetensors", base=base,
                scales=tmp_path / "cat.safetensors")
        assert (tmp_path / "a.safetensors").stat().st_size == (
            tmp_path / "b.safetensors").stat().st_size
        given = at(unets.inputs(unet), 250.0)
        model = routed(tmp_path / "a.safetensors", tmp_path / "cat.safetensors")
        assert models.relative(unets.ours(model, unet, given),
                               unets.theirs(twin(unet, second, 0), given)) < 1e-5
        assert first

    @pytest.mark.parametrize("form", ["folder", "unet", "checkpoint", "their folder"])
    def test_norms_from_whatever_was_given(self, form, tmp_path):
        unet, state = trained(tmp_path / "dog")
        base = unets.save_pipeline(unet, tmp_path / "base")
        if form == "checkpoint":
            save_file({f"model.diffusion_model.{k}": v for k, v in unets.host_state(base).items()},
                      tmp_path / "base.safetensors")
        given = {"folder": base, "unet": base / "unet", "their folder": tmp_path / "dog",
                 "checkpoint": tmp_path / "base.safetensors"}[form]
        alone = shutil.copy(tmp_path / "dog" / STATE, tmp_path / "x.pt")
        convert(alone, tmp_path / "a.safetensors", base=given)
        model = routed(tmp_path / "a.safetensors", tmp_path / "a-scales.safetensors")
        inputs = at(unets.inputs(unet), 750.0)
        assert models.relative(unets.ours(model, unet, inputs),
                               unets.theirs(twin(unet, state, 1), inputs)) < 1e-5

    def test_scales_alone_with_their_float_model(self, tmp_path):
        unet, state = trained(tmp_path / "dog", bits=4)
        own = {k: v for k, v in state["delta_state"].items()
               if not k.endswith(("weight_int", "zero_point"))}
        torch.save({**state, "delta_state": own}, tmp_path / "x.pt")
        for action, arguments in ((read, ()), (load, ()), (routed, (tmp_path / "dog" / STATE,)),
                                  (convert, (tmp_path / "a.safetensors",))):
            message = told("x.pt has no integers for any layer, only scales", action,
                           tmp_path / "x.pt", *arguments)
            assert "convert STATE OUT.safetensors --base MODEL" in message
            assert "'Apply TuneQDM Scales' on OUT" in message
        base = unets.save_pipeline(unet, tmp_path / "base")
        found, scales, _ = read(tmp_path / "x.pt", base)
        whole, expected, _ = read(tmp_path / "dog" / STATE, base)
        assert scales.metadata.base_fingerprint == expected.metadata.base_fingerprint
        assert found.floats.keys() == whole.floats.keys()

    def test_another_model_as_base(self, tmp_path):
        trained(tmp_path / "dog")
        wide = unets.tiny_unet("SD15", block_out_channels=(64, 64))
        told("is not the base of", read, tmp_path / "dog" / STATE,
             unets.save_pipeline(wide, tmp_path / "wide"))
        near = unets.save_pipeline(unets.tiny_unet(seed=9), tmp_path / "near")
        lines = read(tmp_path / "dog" / STATE, near)[2]
        assert "the others take the mean of their experts" in lines[0]
        told("holds something else than the weights", read, tmp_path / "dog" / STATE,
             tmp_path / "dog" / STATE)

    def test_noise_that_comfyui_cannot_sample(self, tmp_path):
        trained(tmp_path / "dog")
        path = tmp_path / "dog" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**unets.SCHEDULER, "beta_schedule": "squaredcos_cap_v2"}))
        told("says beta_schedule = squaredcos_cap_v2, a schedule of the noise", read,
             tmp_path / "dog" / STATE)

    def test_no_base(self, tmp_path):
        trained(tmp_path / "dog")
        alone = shutil.copy(tmp_path / "dog" / STATE, tmp_path / "x.pt")
        assert "there is no 'unet' folder beside it" in told("holds no '", read, alone)

    def test_a_base_that_is_not_whole(self, tmp_path):
        trained(tmp_path / "dog")
        path = tmp_path / "dog" / "unet" / WEIGHTS
        state = load_file(path)
        save_file({k: v for k, v in state.items() if k != "conv_norm_out.weight"}, path)
        told("lacks 'conv_norm_out.weight'", read, tmp_path / "dog" / STATE)
        nan = torch.full_like(state["conv_norm_out.weight"], float("nan"))
        save_file({**state, "conv_norm_out.weight": nan}, path)
        told("NaN or infinite values in 'conv_norm_out.weight'", read, tmp_path / "dog" / STATE)
        path.write_bytes(path.read_bytes()[:-10])
        told("is cut short", read, tmp_path / "dog" / STATE)


class TestHostile:
    def test_states_of_other_networks(self, tmp_path):
        net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        torch.save(authors_state(net), tmp_path / "x.pt")
        told("has a tensor '0.bias' and is of no UNet", read, tmp_path / "x.pt")

    def test_a_layer_is_missing(self, tmp_path):
        _, state = trained(tmp_path / "dog")
        own = {k: v for k, v in state["delta_state"].items() if not k.startswith("conv_out")}
        torch.save({**state, "delta_state": own}, tmp_path / "dog" / STATE)
        told("lacks layers and is of no UNet", read, tmp_path / "dog" / STATE)
        own = {k: v for k, v in state["delta_state"].items()
               if not k.startswith("mid_block.resnets.1.conv1")}
        torch.save({**state, "delta_state": own}, tmp_path / "dog" / STATE)
        told("lacks 'mid_block.resnets.1.conv1|lacks '", read, tmp_path / "dog" / STATE)

    def test_a_bias_of_another_shape(self, tmp_path):
        """What no node would load is not written."""
        _, state = trained(tmp_path / "dog")
        for bias in (torch.ones(()), torch.ones(3)):
            own = {**state["delta_state"], "conv_in.bias": bias}
            torch.save({**state, "delta_state": own}, tmp_path / "dog" / STATE)
            told(r"input_blocks.0.0.bias has the shape \[3?\], not \[32\]", convert,
                 tmp_path / "dog" / STATE, tmp_path / "a.safetensors")
        assert not (tmp_path / "a.safetensors").exists()

    def test_names_that_no_file_has(self, tmp_path):
        trained(tmp_path / "dog")
        state, out, long = tmp_path / "dog" / STATE, tmp_path / "a.safetensors", "x" * 300
        told("the name is too long", convert, state, tmp_path / f"{long}.safetensors")
        for base, why in ((long, "cannot be read|too long"), ("x\0", "null byte")):
            told(why, lambda base=base: convert(state, out, base=base))
        for name in (long, "x" * 235):  # the second leaves no room for what it is called meanwhile
            told("the name is too long", lambda name=name: convert(
                state, out, scales=str(tmp_path / f"{name}.safetensors")))
        assert not out.exists()

    def test_a_note_that_lies(self, tmp_path):
        import json

        trained(tmp_path / "dog")
        path = tmp_path / "dog" / STATE
        state = torch.load(path, weights_only=True)
        for unet in ({"family": "Gone"}, {"unet_config": {"model_channels": 10**9}},
                     {"unet_config": {"model_channels": 32}}, {"model_type": "ODD"},
                     {"latent_format": "odd"}, {"sampling_settings": {"a": 10**12}}):
            metadata = read(path)[0].metadata
            told_ = {"family": metadata.family, "unet_config": dict(metadata.unet_config),
                     "model_type": metadata.model_type, "latent_format": metadata.latent_format,
                     "sampling_settings": {}, **unet}
            torch.save({**state, "quanttune": json.dumps({"bits": {}, "unet": told_}),
                        "quanttune_scales": {}}, tmp_path / "dog" / "x.pt")
            told(".", load, tmp_path / "dog" / "x.pt")

    def test_targets(self, tmp_path):
        trained(tmp_path / "dog")
        told("does not end in .safetensors", convert, tmp_path / "dog" / STATE, tmp_path / "a.pt")
        convert(tmp_path / "dog" / STATE, tmp_path / "a.safetensors")
        told("exists already", lambda: convert(tmp_path / "dog" / STATE, tmp_path / "a.safetensors",
                                               overwrite=False))
        for scales, why in (("a.txt", "target of the scales .* does not end in"),
                            ("b.safetensors", "the target of the UNet")):
            told(why, lambda name=scales: convert(tmp_path / "dog" / STATE,
                                                  tmp_path / "b.safetensors",
                                                  scales=str(tmp_path / name)))
        assert not (tmp_path / "b.safetensors").exists()
        for name in ("b.safetensors", "b.bin", "b.pth"):  # no node lists the latter for scales
            told("does not end in .pt", export, tmp_path / "a.safetensors", tmp_path / name)
        export(tmp_path / "a.safetensors", tmp_path / "b.pt")
        told("exists already", export, tmp_path / "a.safetensors", tmp_path / "b.pt", None, False)

    def test_what_cannot_be_exported(self, tmp_path):
        from quanttune.quant import QuantizedCheckpoint, UNetMetadata

        checkpoint = read_shortcuts(tmp_path)
        told("has scales for two groups of inputs", export, checkpoint, tmp_path / "b.pt")
        flux = QuantizedCheckpoint(UNetMetadata("Flux"), {"img_in": None}, {})
        told("A Flux model has no state of TuneQDM", export, flux, tmp_path / "b.pt")
        checkpoint.metadata.unet_config.pop("transformer_depth")
        told("is damaged", export, checkpoint, tmp_path / "b.pt")
        assert not (tmp_path / "b.pt").exists()


def read_shortcuts(tmp_path):
    """A checkpoint with split shortcuts."""
    from quanttune.host.convert_unet import convert_unet
    from quanttune.quant import QuantSpec, load_quantized_unet

    folder = unets.save_pipeline(unets.tiny_unet(), tmp_path / "sd")
    convert_unet(folder, tmp_path / "s.safetensors", QuantSpec(8))
    return load_quantized_unet(tmp_path / "s.safetensors")


def test_detection(tmp_path):
    from quanttune.host.convert_tuneqdm import detect
    from quanttune.host.convert_unet import detect as detect_unet

    trained(tmp_path / "dog")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    (tmp_path / "half.pt").write_bytes(b"PK")
    found = {p.name for p in (*tmp_path.iterdir(), tmp_path / "dog" / STATE) if detect(p)}
    assert found == {STATE}
    assert not detect_unet(tmp_path / "dog" / STATE)


class TestNodes:
    @pytest.fixture
    def nodes(self, host_folders):
        from quanttune.host.folders import register_folders
        from quanttune.tests.harness.inprocess import pack_nodes

        nodes = pack_nodes()
        register_folders()
        return nodes

    def test_a_pipeline_folder_among_the_quantized_unets(self, nodes, host_folders):
        from quanttune.host import folders

        place = host_folders / "models" / "quanttune" / "dog"
        unet, state = trained(place)
        name = f"dog/{STATE}"
        assert name in folders.unet_files() and name in folders.scale_files()
        model, = run_node(nodes["QuantTuneLoadQuantizedUNet"], unet_name=name).args
        scales, = run_node(nodes["QuantTuneLoadScales"], scale_name=name).args
        apply = nodes["QuantTuneApplyScales"]
        first, = run_node(apply, model=model, scale_name="(connected scales)", strength=1.0,
                          scales=scales).args
        second, = run_node(apply, model=model, scale_name=name, strength=1.0).args
        given = at(unets.inputs(unet), 250.0)
        expected = unets.theirs(twin(unet, state, 0), given)
        for found in (first, second):
            assert models.relative(unets.ours(found, unet, given), expected) < 1e-5

    def test_a_state_among_the_scales(self, nodes, host_folders):
        trained(host_folders / "dog")
        place = host_folders / "models" / "quanttune_scales"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(host_folders / "dog" / STATE, place / "dog.pt")
        scales, = run_node(nodes["QuantTuneLoadScales"], scale_name="dog.pt").args
        assert scales.num_experts == EXPERTS

    def test_a_pickled_file_of_something_else(self, nodes, host_folders):
        place = host_folders / "models" / "quanttune"
        place.mkdir(parents=True, exist_ok=True)
        torch.save({"a": torch.zeros(1)}, place / "a.pt")
        run = nodes["QuantTuneLoadQuantizedUNet"]
        told("not a checkpoint of Q-Diffusion", lambda: run_node(run, unet_name="a.pt"))

    def test_states_that_are_damaged_are_told_as_states(self, nodes, host_folders):
        place = host_folders / "models" / "quanttune"
        place.mkdir(parents=True, exist_ok=True)
        load = nodes["QuantTuneLoadQuantizedUNet"]
        own = {"a.weight_int": torch.zeros(2, 2, dtype=torch.int8)}
        odd = {**own, "a.delta_out_experts": torch.ones(1, 2, 1).to_sparse()}
        for state, what in (({}, "lacks the output scales"), (own, "lacks the output scales"),
                            (odd, "'a.delta_out_experts', which is no plain tensor")):
            torch.save({"delta_state": state}, place / "a.pt")
            told(what, lambda: run_node(load, unet_name="a.pt"))
