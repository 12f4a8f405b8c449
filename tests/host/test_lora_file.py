"""LoRA files: stock ComfyUI reads ours, and ours reads everybody's."""

import json
import re

import pytest
import torch

from quanttune.tests.host import lora_models, models
from quanttune.tests.host.lora_models import assert_same, exported, unused


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_stock_load_lora_applies_a_file_of_ours_as_by_hand(family, tmp_path, caplog):
    import comfy.sd
    import comfy.utils

    from quanttune.host.lora_file import save_lora

    model = models.small_model(family)
    layers, lora = exported(model)
    path = save_lora(tmp_path / "x.safetensors", lora)
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    stock, _ = comfy.sd.load_lora_for_models(model, None, tensors, 0.7, 0.0, metadata)
    assert not unused(caplog)
    assert len(stock.patches) == len(layers)
    arguments = models.inputs(model)
    expected = models.forward(lora_models.with_deltas(model, layers, 0.7), arguments)
    got = models.forward(stock, arguments)
    difference = (got - expected).abs().max().item()
    print(f"{family}: largest difference {difference:.2e} of {expected.abs().max().item():.2f}")
    assert models.relative(got, expected) < 2e-6
    assert models.relative(got, models.forward(model, arguments)) > 1e-2


def test_a_quantized_model_reads_and_writes_the_same(tmp_path):
    from quanttune.host.lora_file import export_lora, import_lora

    model = models.small_model()
    quantized, _ = models.quantize(model)
    layers, lora = exported(model)
    again = export_lora(layers, quantized)
    assert again.keys() == lora.keys() and again.metadata == lora.metadata
    assert_same(import_lora(lora, quantized), layers)


def test_files_keep_every_bit_and_say_what_they_are(tmp_path):
    import hashlib
    import struct

    from quanttune.host.lora_file import read_lora, save_lora

    model = models.small_model()
    layers, lora = exported(model, metadata={"ss_steps": 300, "base": "starter",
                                             "ss_tag_frequency": {"a": 1}})
    path = save_lora(tmp_path / "my subject.safetensors", lora)
    again = read_lora(path)
    assert again.keys() == lora.keys() and all(torch.equal(again[k], lora[k]) for k in lora)
    facts = again.metadata
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "6",
        "ss_base_model_version": "sd_v1", "ss_output_name": "my subject", "ss_steps": "300",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "my subject", "modelspec.implementation": "diffusers"}
    assert expected.items() <= facts.items()
    assert json.loads(facts["ss_tag_frequency"]) == {"a": 1}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", facts["modelspec.date"])
    assert json.loads(facts["quanttune"]) == {"format": "quanttune.lora", "format_version": 1,
                                              "base": "starter"}
    content = path.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    assert facts["sshs_model_hash"] == hashlib.sha256(content[8 + header:]).hexdigest()
    twice = read_lora(save_lora(tmp_path / "again.safetensors", again)).metadata
    assert twice["sshs_model_hash"] == facts["sshs_model_hash"]
    assert json.loads(twice["quanttune"]) == json.loads(facts["quanttune"])


@pytest.mark.parametrize("family,version,architecture", [
    ("SD20", "sd_v2", "stable-diffusion-v2-512/lora"),
    ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")])
def test_other_families_say_so(family, version, architecture):
    _, lora = exported(models.small_model(family))
    assert lora.metadata["ss_base_model_version"] == version
    assert lora.metadata["modelspec.architecture"] == architecture


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_smaller_types(dtype, tolerance, tmp_path):
    from quanttune.host.lora_file import import_lora, read_lora, save_lora

    model = models.small_model()
    layers, lora = exported(model, alpha=22.627417)
    again = read_lora(save_lora(tmp_path / "x.safetensors", lora, dtype))
    assert {v.dtype for k, v in again.items() if not k.endswith("alpha")} == {dtype}
    assert_same(import_lora(again, model), layers, tolerance)


def test_too_large_for_float16(tmp_path):
    from quanttune.host.lora_file import LoraWeights, save_lora
    from quanttune.quant import QuantTuneError

    lora = LoraWeights({"a.lora_up.weight": torch.full((2, 2), 1e5),
                        "a.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(QuantTuneError, match="too large for float16"):
        save_lora(tmp_path / "x.safetensors", lora, torch.float16)
    assert not list(tmp_path.iterdir())
    save_lora(tmp_path / "x.safetensors", lora, torch.bfloat16)


@pytest.mark.parametrize("dora", [False, True])
def test_what_was_exported_comes_back(dora):
    from quanttune.host.lora_file import import_lora

    model = models.small_model("SDXL")
    layers, lora = exported(model, dora=dora)
    found = import_lora(lora, model)
    assert_same(found, layers)
    for name in layers:
        assert (found[name].dora_scale is None) is not dora
        if dora:
            assert torch.equal(found[name].dora_scale, layers[name].dora_scale)
    assert lora.metadata["ss_network_module"] == ("lycoris.kohya" if dora else "networks.lora")


def test_the_hosts_own_training_is_read(caplog):
    """What Train LoRA gives out: the host's names, and differences of norms and biases beside."""
    import comfy.sd
    from comfy_extras.nodes_train import _setup_lora_adapters

    from quanttune.host.lora_file import import_lora
    from quanttune.host.lora_fit import fit_lora

    model = models.small_model()
    with torch.inference_mode(False):
        trained, _ = _setup_lora_adapters(models.small_model().clone(), {}, "LoRA", torch.float32,
                                          3)
    generator = torch.Generator().manual_seed(0)
    lora = {key: value.detach() if key.endswith("alpha") else
            0.1 * torch.randn(value.shape, generator=generator) for key, value in trained.items()}
    stock, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert not unused(caplog)
    fit = fit_lora(lora, model)
    assert fit.matched == fit.layers and not fit.notes()
    ours = model.clone()
    ours.add_patches(fit.patches)
    arguments = models.inputs(model)
    assert torch.equal(models.forward(ours, arguments), models.forward(stock, arguments))
    layers = import_lora(lora, model)
    assert len(layers) == sum(isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
                              for m in model.model.diffusion_model.modules())
    for name, layer in layers.items():
        up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
        assert torch.allclose(layer.delta().flatten(1), up @ down / 3, atol=1e-6)
    assert any("norms and biases, which are left out" in r.message for r in caplog.records)


def test_tucker_form_becomes_a_plain_lora():
    import comfy.lora

    from quanttune.host.lora_file import import_lora

    model = models.small_model()
    key = "diffusion_model.input_blocks.1.0.in_layers.2"
    out, inputs, *kernel = model.model.state_dict()[f"{key}.weight"].shape
    lora = {f"{key}.lora_up.weight": torch.randn(out, 3, 1, 1),
            f"{key}.lora_down.weight": torch.randn(3, inputs, 1, 1),
            f"{key}.lora_mid.weight": torch.randn(3, 3, *kernel),
            f"{key}.alpha": torch.tensor(2.0)}
    adapter = comfy.lora.load_lora(lora, {key: f"{key}.weight"})[f"{key}.weight"]
    zeros = torch.zeros(out, inputs, *kernel)
    expected = adapter.calculate_weight(zeros, key, 1.0, 1.0, None, lambda a: a)
    assert torch.allclose(import_lora(lora, model)[key].delta(), expected, atol=1e-5)
