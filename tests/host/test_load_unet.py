"""UNets of other programs as MODELs: the forward is diffusers' own, and what is offered."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from quanttune.tests.harness.inprocess import run_node
from quanttune.tests.host import models, unets
from quanttune.tests.host.unets import WEIGHTS, host_state, told


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def place(host_folders):
    """ComfyUI's folder of diffusers."""
    return host_folders / "models" / "diffusers"


@pytest.fixture
def node(comfy_inprocess):
    from quanttune.nodes.diffusers_unet import LoadDiffusersUNet

    return LoadDiffusersUNet


def load(name="x/", precision="float"):
    from quanttune.host.load_unet import load_unet

    return load_unet(name, precision)


@pytest.mark.parametrize("family", list(unets.CONFIGS))
def test_the_forward_is_that_of_diffusers(family, place, host_folders):
    unet = unets.tiny_unet(family)
    unets.save_pipeline(unet, place / "x")
    given = unets.inputs(unet)
    expected = unets.theirs(unet, given)
    model = load()
    assert type(model.model.model_config).__name__ == family
    assert models.relative(unets.ours(model, unet, given), expected) < 1e-5
    checkpoint = host_folders / "models" / "checkpoints" / "a.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in host_state(place / "x").items()},
              checkpoint)
    model = load("a.safetensors")
    # The heads, which nothing says here, are eight in SD1 and of 64 channels in all others.
    assert models.relative(unets.ours(model, unet, given), expected) < 1e-5


@pytest.mark.parametrize("changes", [
    {"in_channels": 9}, {"only_cross_attention": (True, False)}, {"layers_per_block": 2},
    {"upcast_attention": True}, {"mid_block_type": None}], ids=str)
def test_relatives(changes, place):
    unet = unets.tiny_unet("SD15", **changes)
    unets.save_pipeline(unet, place / "x")
    given = unets.inputs(unet)
    assert models.relative(unets.ours(load(), unet, given), unets.theirs(unet, given)) < 1e-5


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
@pytest.mark.parametrize("precision", ["8-bit", "4-bit"])
def test_a_quantized_one_is_what_quantize_unet_makes(family, precision, place):
    from quanttune.host.precision import PRECISIONS
    from quanttune.host.quantize import quantize_model

    unet = unets.tiny_unet(family)
    unets.save_pipeline(unet, place / "x")
    given = unets.inputs(unet)
    direct = load("x/", precision)
    behind, _ = quantize_model(load(), PRECISIONS[precision], name="x/")
    first, second = models.quantized_model(direct), models.quantized_model(behind)
    assert first.fingerprint == second.fingerprint
    assert list(first.checkpoint.layers) == list(second.checkpoint.layers)
    one, other = first.checkpoint.metadata, second.checkpoint.metadata
    assert one == other
    assert models.relative(unets.ours(direct, unet, given), unets.ours(behind, unet, given)) < 1e-5


def test_dynamic_int8(place, integer_products):
    from quanttune.host.int8 import OPTION

    unet = unets.tiny_unet()
    unets.save_pipeline(unet, place / "x")
    given = unets.inputs(unet)
    model = load("x/", "dynamic INT8")
    assert OPTION in model.model_options["transformer_options"]
    assert models.relative(unets.ours(model, unet, given), unets.theirs(unet, given)) < 0.2


def test_the_host_can_load_it_again(place):
    unet = unets.tiny_unet("SD20")
    unets.save_pipeline(unet, place / "x", {"prediction_type": "v_prediction"})
    given = unets.inputs(unet)
    for precision in ("float", "8-bit"):
        model = load("x/", precision)
        factory, args = model.cached_patcher_init[:2]
        again = factory(*args, disable_dynamic=True)
        assert again.model.model_type == model.model.model_type
        assert torch.equal(unets.ours(again, unet, given), unets.ours(model, unet, given))


def test_tensors_that_do_not_fit(place):
    unets.save_pipeline(unets.tiny_unet(), place / "x")
    state = host_state(place / "x")
    path = place / "a.safetensors"

    def load_():
        from quanttune.host.load_unet import load_float, plan_quantization
        from quanttune.host.unet_source import open_unet
        from quanttune.quant import QuantSpec

        try:
            plan_quantization(open_unet(path), QuantSpec(8))
        except Exception as first:
            with pytest.raises(type(first)) as second:
                load_float(path)
            assert str(second.value) == str(first)
            raise

    save_file({k: v for k, v in state.items() if k != "middle_block.1.norm.bias"}, path)
    told("lacks the tensor 'middle_block.1.norm.bias'", load_)
    save_file({**state, "input_blocks.1.0.odd": torch.zeros(1)}, path)
    told("has an unknown tensor 'input_blocks.1.0.odd'", load_)
    save_file({**state, "out.0.bias": torch.zeros(7)}, path)
    told("does not fit its own configuration: out.0.bias", load_)
    save_file({k: v for k, v in state.items() if "transformer_blocks.0.attn2.to_k" not in k}, path)
    told("is not whole or no Stable Diffusion UNet|lacks the tensor", load_)


class TestList:
    def test_what_is_offered(self, place, host_folders):
        from quanttune.host.unet_files import NONE, unet_names

        assert unet_names() == [NONE]
        told("There is no UNet of SD1.x", load, NONE)
        unet = unets.tiny_unet()
        folder = unets.save_pipeline(unet, place / "x")
        shutil.copytree(folder, place / "models--a--b" / "snapshots" / "0f")
        shutil.copytree(folder / "unet", place / "alone")
        half = shutil.copytree(folder, place / "half")
        (half / "unet" / "config.json").unlink()
        upscaler = shutil.copytree(folder, place / "upscaler")
        text = (upscaler / "unet" / "config.json").read_text()
        (upscaler / "unet" / "config.json").write_text(text.replace('"in_channels": 4',
                                                                    '"in_channels": 7'))
        flux = shutil.copytree(folder, place / "flux")
        (flux / "model_index.json").write_text('{"transformer": ["diffusers", "x"]}')
        shutil.rmtree(flux / "unet")
        files = host_folders / "models" / "checkpoints"
        save_file(host_state(folder), files / "b.safetensors")
        save_file({"vae": torch.zeros(1)}, files / "vae.safetensors")
        save_file(host_state(folder), files / "ours.safetensors", metadata={"quanttune": "{}"})
        torch.save({}, files / "c.ckpt")
        (files / "junk.safetensors").write_bytes(b"junk")
        assert unet_names() == ["alone/", "half/", "models--a--b/snapshots/0f/", "x/",
                                "b.safetensors", "c.ckpt"]
        told("unet/config.json is missing", load, "half/")
        told("something else than the weights", load, "c.ckpt")
        told("holds no Stable Diffusion UNet", load, "vae.safetensors")

    @pytest.mark.parametrize("name", ["gone.safetensors", "gone/", "../x/", "/", "", "\0", "x"])
    def test_what_is_gone_is_told_with_the_place_to_put_it(self, name, place):
        unets.save_pipeline(unets.tiny_unet(), place / "x")
        assert "into models/diffusers" in told("is not there", load, name)

    def test_unknown_precision(self):
        told("precision is '5-bit'", load, "x/", "5-bit")


class TestNode:
    def test_it_loads(self, node, place):
        unet = unets.tiny_unet("SDXL")
        unets.save_pipeline(unet, place / "x")
        given = unets.inputs(unet)
        model, = run_node(node, unet="x/").args
        assert models.relative(unets.ours(model, unet, given), unets.theirs(unet, given)) < 1e-5

    def test_names_are_checked_before_the_run(self, node, place):
        unets.save_pipeline(unets.tiny_unet(), place / "x")
        assert node.validate_inputs("x/") is True and node.validate_inputs(None) is True
        assert "is not there" in node.validate_inputs("y/")

    def test_it_runs_again_when_its_files_change(self, node, place):
        folder = unets.save_pipeline(unets.tiny_unet(), place / "x")
        before = node.fingerprint_inputs("x/", "float")
        assert before == node.fingerprint_inputs("x/", "float")
        (folder / "unet" / WEIGHTS).write_bytes(b"")
        assert node.fingerprint_inputs("x/", "float") != before
