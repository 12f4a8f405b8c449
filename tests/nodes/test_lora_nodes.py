"""The LoRA nodes as the executor runs them, together with the host's own."""

import json
import os

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.host import lora_models, models


@pytest.fixture
def nodes(comfy_inprocess, host_folders):
    import folder_paths

    from quanttune.host.folders import register_folders

    register_folders()
    # What the host's main does.
    folder_paths.add_model_folder_path(
        "loras", os.path.join(folder_paths.get_output_directory(), "loras"))
    return pack_nodes()


@pytest.fixture
def model(nodes):
    with torch.inference_mode():
        return models.small_model()


def trained(model, **options):
    from quanttune.host.lora_file import export_lora

    with torch.inference_mode():
        return export_lora(lora_models.random_layers(model, **options), model,
                           options.get("clip"))


def text_of(output):
    ui = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
    return json.dumps(ui).replace("\\n", "\n")


def test_saved_it_appears_in_both_load_nodes_and_does_the_same(nodes, model):
    import nodes as stock

    lora = trained(model)
    output = run_node(nodes["QuantTuneSaveLora"], lora=lora, dtype="float32")
    path, = output.args
    name = os.path.basename(path)
    assert "layers in float32" in text_of(output)
    load = nodes["QuantTuneLoadLora"]
    assert name in load.GET_SCHEMA().inputs[1].options
    assert name in stock.LoraLoader.INPUT_TYPES()["required"]["lora_name"][0]
    arguments = models.inputs(model)
    with torch.inference_mode():
        theirs, _ = stock.LoraLoader().load_lora(model, None, name, 0.7, 0.0)
        expected = models.forward(theirs, arguments)
    from_file = run_node(load, model=model, lora_name=name, strength_model=0.7)
    from_socket = run_node(load, model=model, lora_name="(connected LoRA)", lora=lora,
                           strength_model=0.7)
    with torch.inference_mode():
        for output in (from_file, from_socket):
            assert torch.equal(models.forward(output.args[0], arguments), expected)
            assert output.args[1] is None
    report, read = from_file.args[2:]
    assert read.keys() == lora.keys() and all(torch.equal(read[k], lora[k]) for k in lora)
    assert f"'{name}': " in report and "rank 4, alpha 6, strength 0.7" in report
    assert report in text_of(from_file) and "packed integers" not in report


def test_on_integers_with_a_text_encoder_and_in_a_chain(nodes, model):
    with torch.inference_mode():
        quantized, _ = models.quantize(model)
        clip = models.projecting_clip()
    lora = trained(model, clip=clip)
    load = nodes["QuantTuneLoadLora"]
    connected = {"lora_name": "(connected LoRA)", "lora": lora}
    one, one_clip, report, given = run_node(load, model=quantized, clip=clip, strength_clip=0.5,
                                            **connected).args
    assert given is lora
    assert "0.5 on the text encoder" in report and "without rounding" in report
    both, both_clip, *_ = run_node(load, model=one, clip=one_clip, strength_model=0.5,
                                  **connected).args
    key = next(iter(one.patches))
    assert len(one.patches[key]) == 1 and len(both.patches[key]) == 2 and not quantized.patches
    assert both_clip.patcher.patches and not clip.patcher.patches
    assert models.quantized_model(both) is models.quantized_model(quantized)
    with torch.inference_mode():
        arguments = models.inputs(model)
        reference = models.dequantized_copy(quantized)
        layers = lora_models.random_layers(model)
        expected = models.forward(lora_models.with_deltas(reference, layers, 1.5), arguments)
        assert models.relative(models.forward(both, arguments), expected) < 1e-5


def test_strength_zero_leaves_the_model_alone(nodes, model):
    patched, _, report, _ = run_node(nodes["QuantTuneLoadLora"], model=model, lora=trained(model),
                                  lora_name="(connected LoRA)", strength_model=0.0).args
    assert not patched.patches and "strength 0." in report


def test_reports_tell_what_does_not_fit(nodes, model):
    lora = trained(model, rank=40, include=("attn1.to_q",))
    lora["lora_unet_elsewhere.lora_up.weight"] = torch.ones(4, 4)
    lora["lora_unet_elsewhere.lora_down.weight"] = torch.ones(4, 4)
    lora["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(4, 4)
    lora["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 4)
    patched, _, report, _ = run_node(nodes["QuantTuneLoadLora"], model=model, lora=lora,
                                  lora_name="(connected LoRA)").args
    matched = len(patched.patches)
    assert f"{matched} of {matched + 1} layers matched" in report
    assert "lora_unet_elsewhere" in report and "1 layers of the text encoder" in report
    assert "higher than the layer" in report


def test_other_kinds_are_left_to_the_host(nodes, model):
    import comfy.sd

    name = "diffusion_model.middle_block.1.proj_in"
    with torch.inference_mode():
        out, inputs = model.model.state_dict()[f"{name}.weight"].shape[:2]
        lora = {f"{name}.hada_{part}": torch.randn(*shape) * 0.3 for part, shape in
                (("w1_a", (out, 4)), ("w1_b", (4, inputs)), ("w2_a", (out, 4)),
                 ("w2_b", (4, inputs)))}
        stock, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
        arguments = models.inputs(model)
        expected = models.forward(stock, arguments)
    patched, _, report, _ = run_node(nodes["QuantTuneLoadLora"], model=model, lora=lora,
                                  lora_name="(connected LoRA)").args
    assert "1 x loha" in report
    with torch.inference_mode():
        assert torch.equal(models.forward(patched, arguments), expected)


def test_a_damaged_adapter_is_refused_before_sampling(nodes, model):
    from quanttune.quant import QuantTuneError

    layer = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    with pytest.raises(QuantTuneError, match="to_q' .a part of it is missing"):
        run_node(nodes["QuantTuneLoadLora"], model=model, lora_name="(connected LoRA)",
                 lora={f"{layer}.lokr_w1": torch.ones(4, 4)})


def test_nothing_connected_says_what_to_do(nodes, model):
    from quanttune.quant import QuantTuneError

    load = nodes["QuantTuneLoadLora"]
    with pytest.raises(QuantTuneError, match="connect 'LoRA Train'"):
        run_node(load, model=model, lora_name="(connected LoRA)")
    with pytest.raises(QuantTuneError, match="The file 'gone.safetensors' is not there"):
        run_node(load, model=model, lora_name="gone.safetensors")
    with pytest.raises(QuantTuneError, match="strength"):
        run_node(load, model=model, lora_name="(connected LoRA)", lora=trained(model),
                 strength_model=float("nan"))


def test_a_replaced_file_is_loaded_again(nodes, model):
    path, = run_node(nodes["QuantTuneSaveLora"], lora=trained(model)).args
    load, name = nodes["QuantTuneLoadLora"], os.path.basename(path)
    before = load.fingerprint_inputs(lora_name=name)
    assert before == load.fingerprint_inputs(lora_name=name)
    with open(path, "ab") as file:
        file.write(b"x")
    assert before != load.fingerprint_inputs(lora_name=name)
    assert load.fingerprint_inputs(lora_name="(connected LoRA)") == ""


def test_the_hosts_own_lora_model_is_saved(nodes, model):
    """Without metadata, with parameters that autograd knows, under the host's names."""
    name = "diffusion_model.middle_block.1.proj_in"
    out, inputs = model.model.state_dict()[f"{name}.weight"].shape[:2]
    lora = {f"{name}.lora_up.weight": torch.nn.Parameter(torch.ones(out, 2)),
            f"{name}.lora_down.weight": torch.nn.Parameter(torch.ones(2, inputs)),
            f"{name}.alpha": torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)}
    path, = run_node(nodes["QuantTuneSaveLora"], lora=lora, filename_prefix="loras/theirs").args
    patched, _, report, _ = run_node(nodes["QuantTuneLoadLora"], model=model,
                                  lora_name=os.path.basename(path)).args
    assert len(patched.patches) == 1 and "1 of 1 layers matched" in report


@pytest.mark.parametrize("change,message", [
    ({"lora": {}}, "holds no tensors"), ({"lora": 3}, "is not a LoRA"),
    ({"filename_prefix": ""}, "is empty"),
    ({"filename_prefix": "../x"}, "outside the output folder"),
    ({"lora": {"a.lora_up.weight": torch.full((2, 2), float("nan"))}}, "NaN or infinite"),
])
def test_what_cannot_be_saved(change, message, nodes, model):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=message):
        run_node(nodes["QuantTuneSaveLora"], **{"lora": trained(model), **change})


def test_a_full_disk_leaves_nothing_behind(nodes, model, host_folders, monkeypatch):
    import errno

    from quanttune.quant import QuantTuneError, whole_file

    def full(file, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_file, "_write_tensor", full)
    with pytest.raises(QuantTuneError, match="the disk is full"):
        run_node(nodes["QuantTuneSaveLora"], lora=trained(model))
    assert not [p for p in (host_folders / "output").rglob("*") if p.is_file()]


def test_merge_from_the_stock_loader_to_a_file(nodes, model):
    import nodes as stock

    with torch.inference_mode():
        quantized, _ = models.quantize(model)
    path, = run_node(nodes["QuantTuneSaveLora"], lora=trained(model)).args
    with torch.inference_mode():
        patched, = stock.LoraLoaderModelOnly().load_lora_model_only(
            quantized, os.path.basename(path), 1.0)
    output = run_node(nodes["QuantTuneMergeLora"], model=patched, bits="8")
    merged, report = output.args
    assert "rounded to 8 bits" in report and "of the LoRA is in the integers" in report
    assert "Largest: " in report and report in text_of(output)
    saved, = run_node(nodes["QuantTuneSaveQuantizedUNet"], model=merged).args
    loaded = run_node(nodes["QuantTuneLoadQuantizedUNet"],
                      unet_name=os.path.basename(saved)).args[0]
    with torch.inference_mode():
        arguments = models.inputs(model)
        assert torch.equal(models.forward(loaded, arguments), models.forward(merged, arguments))
    same = run_node(nodes["QuantTuneMergeLora"], model=patched, bits="as it is").args[1]
    assert "rounded to 4 bits" in same
