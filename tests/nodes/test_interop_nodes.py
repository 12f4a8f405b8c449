"""Nodes that hand models and LoRAs to other programs, run as the executor runs them."""

from pathlib import Path

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.host import models
from quanttune.tests.host.test_lora_export import trained


@pytest.fixture
def nodes(comfy_inprocess, host_folders):
    return pack_nodes()


@pytest.fixture
def model(nodes):
    with torch.inference_mode():
        return models.small_model()


def test_bitsandbytes_and_back(nodes, model):
    output = run_node(nodes["QuantTuneBitsandbytes"], model=model, kind="nf4")
    packed, report = output.args
    assert output.ui["quanttune_badge"][0].startswith("NF4 · ")
    assert "Linear layers in NF4" in report and "stay in float" in report
    with pytest.raises(QuantTuneError, match="'Export Float UNet'"):
        run_node(nodes["QuantTuneSaveQuantizedUNet"], model=packed, filename_prefix="quanttune/x")
    exported = run_node(nodes["QuantTuneExportUNet"], model=packed, dtype="float32")
    merged, path = exported.args
    assert Path(path).is_file() and path.endswith(".safetensors")
    with torch.inference_mode():
        arguments = models.inputs(model)
        assert models.relative(models.forward(merged, arguments),
                               models.forward(packed, arguments)) < 1e-5


def test_save_lora_in_every_format(nodes, model):
    with torch.inference_mode():
        lora = trained(model)
    node, found = nodes["QuantTuneSaveLora"], []
    for form in (None, "ComfyUI / kohya", "diffusers", "peft"):
        given = {} if form is None else {"format": form, "model": model}
        (path,) = run_node(node, lora=lora, filename_prefix="loras/mine", **given).args
        found.append(sorted(p.name for p in Path(path).iterdir()) if Path(path).is_dir()
                     else Path(path).suffix)
    assert found == [".safetensors", ".safetensors", ["pytorch_lora_weights.safetensors"],
                     ["adapter_config.json", "adapter_model.safetensors"]]


def test_scales_on_a_float_model(nodes, model):
    with torch.inference_mode():
        quantized, _ = models.quantize(model)
        scales = models.random_scales(quantized, bits=4, base_name="cat")
        arguments = models.inputs(model)
        base = models.forward(model, arguments)
        routed = run_node(nodes["QuantTuneApplyScales"], model=model, scales=scales)
        assert "close to that" in str(routed.ui)
        assert models.relative(models.forward(routed.args[0], arguments), base) > 1e-3
        assert torch.equal(models.forward(model, arguments), base)


def test_a_quantized_unet_is_loaded_again_when_its_settings_change(nodes, host_folders):
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("quanttune")[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.safetensors").write_bytes(b"")
    state = nodes["QuantTuneLoadQuantizedUNet"].fingerprint_inputs
    before = state(unet_name="a.safetensors")
    assert before == state(unet_name="a.safetensors", bits="4")
    (folder / "config.json").write_text("{}")
    assert before != state(unet_name="a.safetensors")
