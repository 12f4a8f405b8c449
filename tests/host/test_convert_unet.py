"""Streamed conversion: the same file as from memory, by the same quantizer."""

import shutil
import types

import pytest
import torch
from safetensors.torch import save_file

from quanttune.tests.host import models, unets
from quanttune.tests.host.unets import host_state, told


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def folder(comfy_inprocess, tmp_path):
    return unets.save_pipeline(unets.tiny_unet(), tmp_path / "sd")


def convert(path, out, **options):
    from quanttune.host.convert_unet import convert as run

    return run(path, types.SimpleNamespace(out=out, **options))


def load(path):
    from quanttune.host.build import load_model

    return load_model(str(path), path.name)


@pytest.mark.parametrize("family", list(unets.CONFIGS))
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_file_is_that_of_the_model_in_memory(family, bits, comfy_inprocess, tmp_path):
    from quanttune.host.load_unet import load_float
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec, save_quantized_unet

    unet = unets.tiny_unet(family)
    folder = unets.save_pipeline(unet, tmp_path / "sd")
    said = convert(folder, tmp_path / "a.safetensors", bits=bits)
    assert family in said and f"in {bits} bits" in said
    model, _ = quantize_model(load_float(folder), QuantSpec(bits, range="mse"), name="sd")
    checkpoint = models.quantized_model(model).checkpoint
    save_quantized_unet(tmp_path / "b.safetensors", checkpoint.layers, checkpoint.floats,
                        checkpoint.metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    given = unets.inputs(unet)
    assert torch.equal(unets.ours(load(tmp_path / "a.safetensors"), unet, given),
                       unets.ours(model, unet, given))


def test_options(folder, tmp_path):
    from quanttune.quant import load_quantized_unet

    convert(folder, tmp_path / "a.safetensors", bits=8, symmetric=True, range="minmax",
            keep="first_last", split_shortcuts=False)
    found = load_quantized_unet(tmp_path / "a.safetensors")
    assert "out.2" not in found.layers and "out.2.weight" in found.floats
    assert all(w.symmetric and w.split is None and w.bits == 8 for w in found.layers.values())
    assert found.metadata.provenance["keep"] == "first_last"
    convert(folder, tmp_path / "b.safetensors")
    found = load_quantized_unet(tmp_path / "b.safetensors")
    assert all(w.bits == 4 and not w.symmetric for w in found.layers.values())
    assert any(w.split for w in found.layers.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_keep_their_precision(dtype, folder, tmp_path):
    from quanttune.quant import load_quantized_unet

    save_file({k: v.to(dtype) for k, v in host_state(folder).items()}, tmp_path / "h.safetensors")
    convert(tmp_path / "h.safetensors", tmp_path / "a.safetensors", bits=8)
    floats = load_quantized_unet(tmp_path / "a.safetensors").floats
    assert {v.dtype for v in floats.values()} == {
        torch.float16 if dtype == torch.float8_e4m3fn else dtype}


def test_detection(folder, tmp_path):
    from quanttune.host.convert_unet import detect

    state = host_state(folder)
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.ckpt")
    save_file({"lora": torch.zeros(1)}, tmp_path / "lora.safetensors")
    torch.save({"lora": torch.zeros(1)}, tmp_path / "lora.pt")
    (tmp_path / "half.safetensors").write_bytes(b"")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "ours.safetensors", bits=8)
    found = {p.name for p in tmp_path.iterdir() if detect(p)}
    assert found == {"sd", "a.safetensors", "a.ckpt", "half.safetensors"}
    assert detect(folder / "unet") and detect(str(folder))


class TestRefused:
    def test_nothing_is_left_behind(self, folder, tmp_path):
        state = host_state(folder)
        state["time_embed.0.weight"] = state["time_embed.0.weight"] * float("nan")
        save_file(state, tmp_path / "nan.safetensors")
        out = tmp_path / "out" / "a.safetensors"
        told("NaN or infinite values in 'time_embed.0.weight'", convert,
             tmp_path / "nan.safetensors", out)
        assert list(out.parent.iterdir()) == []

    def test_targets(self, folder, tmp_path):
        from quanttune.host.convert_unet import convert_unet
        from quanttune.quant import QuantSpec

        told("does not end in .safetensors", convert, folder, tmp_path / "a.ckpt")
        path = tmp_path / "a.safetensors"
        save_file(host_state(folder), path)
        before = path.read_bytes()
        told("is a file that is read", convert, path, path)
        other = shutil.copy(path, tmp_path / "b.safetensors")
        told("exists already", convert_unet, path, other, QuantSpec(4), "none", True, False)
        assert path.read_bytes() == before

    def test_a_file_that_shrinks_meanwhile(self, folder, tmp_path):
        from quanttune.host.load_unet import plan_quantization
        from quanttune.host.unet_source import open_unet
        from quanttune.quant import QuantSpec

        path = tmp_path / "a.safetensors"
        save_file(host_state(folder), path)
        plan = plan_quantization(open_unet(path), QuantSpec(4))
        path.write_bytes(path.read_bytes()[:5000])
        told("is cut short", plan.layer, "time_embed.0")

    @pytest.mark.parametrize("options, words", [
        ({"bits": 5}, "bit width is 5"), ({"range": "x"}, "range method is 'x'"),
        ({"keep": "gone*"}, "pattern 'gone\\*' matches no layer"),
        ({"keep": "*"}, "keeps every layer in float")])
    def test_options(self, options, words, folder, tmp_path):
        told(words, lambda: convert(folder, tmp_path / "a.safetensors", **options))
