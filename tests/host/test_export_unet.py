"""A MODEL of any kind as a float UNet: for the host's own loader, for diffusers, as a MODEL."""

import json
import os

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_around_kinds import bnb_layer, gguf, hosts_own, replaced
from quanttune.tests.host.test_lora import lora_file, with_lora
from quanttune.tests.host.test_routing import apply
from quanttune.tests.host.test_save_for_stock import DETECTABLE


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess, host_folders):
    with torch.inference_mode():
        yield


def export(model, form="no file", dtype="float32", **options):
    from quanttune.host.export_unet import export_unet

    return export_unet(model, form, dtype, **options)


def one_expert(quantized, **options):
    return models.random_scales(quantized, num_experts=1, **options)


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_the_model_is_merged_and_ordinary(family):
    import comfy.ops

    quantized, _ = quantize(models.small_model(family))
    scaled = apply(quantized, one_expert(quantized))
    patched = with_lora(scaled, lora_file(quantized))
    arguments = models.inputs(quantized)
    expected = models.forward(patched, arguments)
    merged, path, summary = export(patched)
    assert path == "" and "No file" in summary and "scales are in the weights" in summary
    assert models.relative(models.forward(merged, arguments), expected) < 1e-5
    assert isinstance(merged.model.diffusion_model.out[2], comfy.ops.disable_weight_init.Conv2d)
    assert models.quantized_model(merged) is None and not merged.patches
    assert models.relative(models.forward(patched, arguments), expected) < 1e-6
    again, _ = quantize(merged, 8)
    assert models.relative(models.forward(again, arguments), expected) < 0.2


def test_every_kind_of_base():
    quantized, _ = quantize(models.small_model())
    floats = models.dequantized_copy(quantized)
    scales, arguments = one_expert(quantized), models.inputs(quantized)
    kinds = [(floats, floats), hosts_own(floats, "int8_tensorwise", False),
             hosts_own(floats, "nvfp4", True), gguf(floats),
             *(replaced(floats, bnb_layer(kind)) for kind in ("nf4", "int8"))]
    for changed, twin in kinds:
        expected = models.forward(apply(twin, scales), arguments)
        merged = export(apply(changed, scales))[0]
        assert models.relative(models.forward(merged, arguments), expected) < 1e-5


def test_a_chosen_interval():
    from quanttune.quant import QuantTuneError

    quantized, _ = quantize(models.small_model())
    scaled = apply(quantized, models.random_scales(quantized, num_experts=4), 0.7)
    for interval, timestep in ((1, 100.0), (3, 600.0), (4, 999.0)):
        arguments = models.inputs(quantized, (timestep, timestep))
        merged = export(scaled, interval=interval)[0]
        assert models.relative(models.forward(merged, arguments),
                               models.forward(scaled, arguments)) < 1e-5
    with pytest.raises(QuantTuneError, match=r"have 4 experts.*set interval to 1 .* to 4"):
        export(scaled)
    with pytest.raises(QuantTuneError, match="interval is 5"):
        export(scaled, interval=5)
    other = apply(scaled, models.random_scales(quantized, num_experts=3))
    with pytest.raises(QuantTuneError, match="3 and 4 experts"):
        export(other, interval=1)


def test_loaded_and_patched_models_give_the_same():
    floats = models.small_model()
    patched = with_lora(floats, lora_file(floats))
    before = export(patched)[0].model.diffusion_model.state_dict()
    arguments = models.inputs(floats)
    expected = models.forward(patched, arguments)  # bakes the LoRA into the weights
    after, _, _ = export(patched)
    for name, value in after.model.diffusion_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert models.relative(models.forward(after, arguments), expected) < 1e-5


def test_layers_of_bitsandbytes_that_have_run():
    from quanttune.quant import QuantTuneError

    floats = models.small_model()
    arguments = models.inputs(floats)
    changed, twin = replaced(floats, bnb_layer("int8"))
    models.forward(changed, arguments)
    expected = models.forward(twin, arguments)
    assert models.relative(models.forward(export(changed)[0], arguments), expected) < 1e-5
    # In evaluation mode some processors have 4 bits in another order from the first forward on.
    changed, _ = replaced(floats, bnb_layer("nf4"))
    weight = changed.model.diffusion_model.time_embed[0].weight
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QuantTuneError, match=r"'time_embed.0.weight' is kept in a form .*uint8"):
        export(changed)


def test_gguf_layers_keep_the_patches_they_carry():
    quantized, _ = quantize(models.small_model())
    changed, twin = gguf(models.dequantized_copy(quantized))
    arguments = models.inputs(quantized)
    base = models.forward(changed, arguments)
    weight = changed.model.diffusion_model.time_embed[0].weight
    diff = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    # As its loader gives a loaded model's weights the patches of the MODEL.
    weight.patches = [([(1.0, ("diff", (diff,)), 1.0, None, None)], "time_embed.0.weight")]
    patched = models.forward(changed, arguments)
    assert models.relative(patched, base) > 1e-3
    merged = export(changed)[0]
    assert models.relative(models.forward(merged, arguments), models.forward(twin, arguments)
                           ) < 1e-5
    assert torch.equal(models.forward(changed, arguments), patched)


def test_a_bypass_lora_is_refused():
    from quanttune.quant import QuantTuneError

    floats = models.small_model()
    with pytest.raises(QuantTuneError, match="bypass LoRA"):
        export(with_lora(floats, lora_file(floats), bypass=True))


def test_values_too_large_for_half():
    from quanttune.quant import QuantTuneError

    floats = models.small_model()
    floats.model.diffusion_model.out[2].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(QuantTuneError, match=r"'out.2.weight'.*choose bfloat16 or float32"):
        export(floats, dtype="float16")
    export(floats, dtype="bfloat16")
    for value in (float("nan"), float("inf")):
        floats.model.diffusion_model.out[2].weight[0, 0, 0, 0] = value
        with pytest.raises(QuantTuneError, match=r"'out.2.weight' holds NaN or infinite"):
            export(floats)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_the_hosts_own_loader_reads_the_file(monkeypatch, dtype, tolerance, host_folders):
    import comfy.sd

    monkeypatch.setitem(models.FAMILIES, "SD15", {**models.FAMILIES["SD15"], **DETECTABLE})
    quantized, _ = quantize(models.small_model())
    scaled = apply(quantized, one_expert(quantized))
    arguments = models.inputs(quantized)
    expected = models.forward(scaled, arguments)
    _, path, summary = export(scaled, "ComfyUI file", dtype, prefix="diffusion_models/merged")
    assert path.startswith(str(host_folders / "output" / "diffusion_models")) and path in summary
    options = {} if dtype == "float32" else {"dtype": torch.bfloat16}
    loaded = comfy.sd.load_diffusion_model(path, options)
    loaded.set_model_compute_dtype(torch.float32)
    assert models.relative(models.forward(loaded, arguments), expected) < tolerance


def test_stock_nodes_save_the_model(host_folders):
    import safetensors.torch
    from comfy_extras.nodes_model_merging import ModelSave

    quantized, _ = quantize(models.small_model())
    merged = export(apply(quantized, one_expert(quantized)))[0]
    node = ModelSave()
    node.output_dir = str(host_folders / "output")
    node.save(merged, "stock")
    (path,) = (host_folders / "output").glob("stock*.safetensors")
    state = safetensors.torch.load_file(path)
    for name, value in merged.model.diffusion_model.state_dict().items():
        assert torch.equal(state[f"model.diffusion_model.{name}"], value)


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_diffusers_loads_the_folder(family):
    diffusers = pytest.importorskip("diffusers")
    quantized, _ = quantize(models.small_model(family))
    scaled = apply(quantized, one_expert(quantized))
    arguments = models.inputs(quantized)
    _, path, _ = export(scaled, "diffusers folder", prefix="merged")
    unet, told = diffusers.UNet2DConditionModel.from_pretrained(
        path, subfolder="unet", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert models.relative(in_diffusers(unet, arguments), models.forward(scaled, arguments)) < 1e-5


def in_diffusers(unet, arguments):
    """The host's arguments in diffusers' UNet; of SDXL's, what both make of sizes is taken over."""
    more = {}
    if "y" in arguments:
        # 256 sizes each of 6 would be made to waves; a zero and as many channels as are left do.
        unet.add_time_proj = torch.nn.Identity()
        more = {"added_cond_kwargs": {"text_embeds": arguments["y"][:, :-6],
                                      "time_ids": arguments["y"][:, -6:]}}
    return unet(arguments["x"], arguments["timesteps"], arguments["context"], **more).sample


def test_nothing_is_left_of_a_folder_that_fails(host_folders, monkeypatch):
    import quanttune.host.export_unet as module

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_safetensors", full)
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="disk is full"):
        export(models.small_model(), "diffusers folder", prefix="merged")
    assert not list((host_folders / "output").rglob("*"))


def test_a_folder_that_cannot_be_filled_is_told_by_its_own_name(host_folders):
    from quanttune.host.export_unet import written_folder
    from quanttune.quant import QuantTuneError

    path = host_folders / "output" / "merged_00001_"
    with pytest.raises(QuantTuneError, match=r"file \S+merged_00001_/unet/w\.safetensors is full"):
        with written_folder(path) as folder:
            raise QuantTuneError(f"The file {folder / 'unet' / 'w.safetensors'} is full.")
    assert not list((host_folders / "output").iterdir())


def test_what_a_killed_export_left_is_deleted_after_a_day(host_folders):
    from quanttune.host.export_unet import written_folder

    output = host_folders / "output"
    names = {"merged_00001_.123.tmp": False, "merged_00007_.9.tmp": True, "merged_00001_": False,
             "other_00001_.1.tmp": False, "merged_00001_.x.tmp": False, "merged.1.tmp": False}
    for name, is_new in names.items():
        (output / name / "unet").mkdir(parents=True)
        if not is_new:
            os.utime(output / name, (1e9, 1e9))
    (output / "merged_00002_.5.tmp").symlink_to(output / "merged_00001_")
    with written_folder(output / "merged_00008_"):
        pass
    left = {p.name for p in output.iterdir()}
    assert left == names.keys() - {"merged_00001_.123.tmp"} | {"merged_00008_",
                                                                "merged_00002_.5.tmp"}


def test_what_comfyui_cannot_be_told(monkeypatch):
    import comfy.model_base
    import comfy.model_detection
    import comfy.supported_models

    from quanttune.host.load_unet import load_float
    from quanttune.quant import QuantTuneError

    large = models.small_model("SDXL")
    large.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    path = export(large, "ComfyUI file")[1]
    assert load_float(path).model.model_type.name == "V_PREDICTION"
    model = models.small_model()
    model.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet",
                        lambda weights, prefix: comfy.supported_models.SD15(
                            dict(model.model.model_config.unet_config)))
    with pytest.raises(QuantTuneError, match=r"V_PREDICTION model.*; choose the diffusers folder"):
        export(model, "ComfyUI file")


def test_what_diffusers_cannot_be_told():
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    model.model.model_config.unet_config["transformer_depth_middle"] = 3
    with pytest.raises(QuantTuneError, match="other depths than its encoder"):
        export(model, "diffusers folder")
    model.model.model_config.unet_config.pop("num_res_blocks")
    with pytest.raises(QuantTuneError, match="choose the ComfyUI format"):
        export(model, "diffusers folder")
    for options in ({"form": "gguf"}, {"dtype": "int8"}):
        with pytest.raises(QuantTuneError, match="has to be one of"):
            export(model, **options)


def test_the_files_say_what_they_are():
    import comfy.model_base

    model = models.small_model()
    model.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    _, path, summary = export(model, "diffusers folder", prefix="merged")
    from pathlib import Path

    assert "V_PREDICTION" in summary
    config = json.loads((Path(path) / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel" and config["cross_attention_dim"] == 24
