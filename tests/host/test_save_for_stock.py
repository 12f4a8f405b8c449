"""Files for ComfyUI without the pack: its own loader runs them, in a process that knows no pack."""

import json
import subprocess
import sys

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_lora import lora_file, with_lora

STOCK = """
import sys, torch
import comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu = True
import comfy.model_management, comfy.sd
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    model = comfy.sd.load_diffusion_model(sys.argv[1])
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    output = unet(**inputs, transformer_options={})
    kinds = {n: m.weight.dtype if not hasattr(m.weight, "_qdata") else m.weight._qdata.dtype
             for n, m in unet.named_modules() if getattr(m, "weight", None) is not None
             and m.weight.dim() > 1}
assert not [m for m in sys.modules if "quanttune" in m]
torch.save({"output": output.clone(), "int8": [n for n, k in kinds.items() if k == torch.int8],
            "float": [n for n, k in kinds.items() if k != torch.int8]}, sys.argv[3])
"""
DETECTABLE = {"model_channels": 320, "context_dim": 768, "channel_mult": [1],
              "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1],
              "transformer_depth_middle": 1}


@pytest.fixture
def source(comfy_inprocess, monkeypatch):
    """The smallest model that the stock detector takes for an SD1.5."""
    monkeypatch.setitem(models.FAMILIES, "SD15", {**models.FAMILIES["SD15"], **DETECTABLE})
    with torch.inference_mode():
        return models.small_model()


def saved(model, prefix="stock"):
    from quanttune.host.save import save_for_stock

    with torch.inference_mode():
        return save_for_stock(model, prefix)


def test_stock_comfyui_runs_it_without_the_pack(source, host_folders, tmp_path, comfy_inprocess):
    with torch.inference_mode():
        quantized, _ = quantize_symmetric(source)
        arguments = models.inputs(quantized)
        expected = models.forward(quantized, arguments)
    path, summary = saved(quantized)
    assert "rounded once more" not in summary and "convolutions in float16" in summary
    torch.save({k: v.clone() for k, v in arguments.items()}, tmp_path / "in.pt")
    import comfy

    host = next(iter(comfy.__path__)).rpartition("comfy")[0]
    subprocess.run([sys.executable, "-c", STOCK, path, tmp_path / "in.pt", tmp_path / "out.pt"],
                   check=True, cwd=host, env={"PYTHONPATH": host, "PATH": ""})
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    error = (found["output"] - expected).norm() / expected.norm()
    assert error < 0.04
    checkpoint = models.quantized_model(quantized).checkpoint
    linear = {n for n, w in checkpoint.layers.items() if len(w.shape) == 2}
    assert set(found["int8"]) == linear and len(linear) > 20
    assert any("in_layers" in n for n in found["float"])


def test_what_a_model_predicts_is_marked_or_refused(comfy_inprocess, host_folders, monkeypatch):
    """The detector knows no SDXL as small as this one: it is given the configuration."""
    import comfy.model_base
    import comfy.model_detection
    import comfy.supported_models

    from quanttune.host.save import STOCK_PREFIX, mark_prediction
    from quanttune.quant import QuantTuneError

    model = models.small_model("SDXL").model
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet",
                        lambda weights, prefix: comfy.supported_models.SDXL(
                            dict(model.model_config.unet_config)))
    tensors = {f"{STOCK_PREFIX}out.2.bias": torch.zeros(4)}
    mark_prediction(model, tensors)
    assert len(tensors) == 1, "what it takes for granted needs no mark"
    model.model_type = comfy.model_base.ModelType.V_PREDICTION
    mark_prediction(model, tensors)
    assert set(tensors) == {f"{STOCK_PREFIX}{name}" for name in ("out.2.bias", "v_pred")}
    model.model_type = comfy.model_base.ModelType.EDM
    with pytest.raises(QuantTuneError, match="EDM.*use 'Save Quantized UNet'"):
        mark_prediction(model, {f"{STOCK_PREFIX}out.2.bias": torch.zeros(4)})


def test_a_size_that_comfyui_does_not_know_is_marked_where_a_mark_says_it(comfy_inprocess):
    import comfy.model_base

    from quanttune.host.save import STOCK_PREFIX, mark_prediction

    for family, marks in (("SDXL", {"v_pred"}), ("SD15", set())):
        model = models.small_model(family).model
        model.model_type = comfy.model_base.ModelType.V_PREDICTION
        tensors = {f"{STOCK_PREFIX}out.2.bias": torch.zeros(4)}
        mark_prediction(model, tensors)
        assert set(tensors) == {f"{STOCK_PREFIX}{name}" for name in {"out.2.bias", *marks}}


def test_what_float16_cannot_hold_is_written_in_bfloat16():
    from quanttune.host.save import _half

    assert _half(torch.tensor([1.0, 2.0])).dtype == torch.float16
    large = _half(torch.tensor([1e5, 1.0]))
    assert large.dtype == torch.bfloat16 and bool(large.isfinite().all())


def quantize_symmetric(model):
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec

    return quantize_model(model, QuantSpec(8, symmetric=True))


def test_symmetric_8_bit_layers_are_written_as_they_are(source, host_folders):
    from safetensors import safe_open

    with torch.inference_mode():
        quantized, _ = quantize_symmetric(source)
    path, _ = saved(quantized)
    with safe_open(path, "pt") as file:
        for name, weight in models.quantized_model(quantized).checkpoint.layers.items():
            key = f"model.diffusion_model.{name}"
            stored = file.get_tensor(f"{key}.weight")
            if len(weight.shape) == 2:
                scale = file.get_tensor(f"{key}.weight_scale")
                assert torch.equal(stored.float() * scale, weight.dequantize())
                conf = bytes(file.get_tensor(f"{key}.comfy_quant").tolist())
                assert json.loads(conf) == {"format": "int8_tensorwise"}
            else:
                assert stored.dtype == torch.float16


@pytest.mark.parametrize("bits", [4, 8])
def test_others_are_rounded_again_and_it_says_so(bits, comfy_inprocess, host_folders):
    with torch.inference_mode():
        quantized, _ = quantize(models.small_model(), bits)
    _, summary = saved(quantized)
    assert "rounded once more (error 0." in summary


def test_what_it_refuses(comfy_inprocess, host_folders):
    from quanttune.quant import QuantTuneError

    with torch.inference_mode():
        source = models.small_model()
        quantized, _ = quantize(source, 8)
        only_convolutions, _ = quantize(source, 8, keep={
            n for n, w in models.quantized_model(quantized).checkpoint.layers.items()
            if len(w.shape) == 2})
    for model, message in ((source, "not quantized"), (only_convolutions, "no quantized Linear"),
                           (with_lora(quantized, lora_file(source)), "LoRA or merge")):
        with pytest.raises(QuantTuneError, match=message):
            saved(model)
    assert not list(host_folders.rglob("*.safetensors")), "nothing half-written stays"


def rewritten(path, change):
    """The file with its tensors after ``change(tensors)``."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    changed = f"{path[:-12]}-changed.safetensors"
    save_file(tensors, changed)
    return changed


def test_we_read_it_back_exactly(source, host_folders):
    from quanttune.host.build import load_model

    with torch.inference_mode():
        quantized, _ = quantize_symmetric(source)
        path, _ = saved(quantized)
        loaded = load_model(path)
        before = models.quantized_model(quantized).checkpoint.layers
        after = models.quantized_model(loaded).checkpoint.layers
        assert after.keys() == {n for n, w in before.items() if len(w.shape) == 2}
        assert all(torch.equal(w.codes(), before[n].codes()) and
                   torch.equal(w.scale, before[n].scale) for n, w in after.items())
        arguments = models.inputs(quantized)
        expected = models.forward(quantized, arguments)
        assert models.relative(models.forward(loaded, arguments), expected) < 5e-3
        again, summary = saved(loaded, "again")
    assert "rounded once more" not in summary


def test_one_scale_for_all_channels_and_no_metadata(source, host_folders):
    from quanttune.host.build import load_model

    with torch.inference_mode():
        path, _ = saved(quantize_symmetric(source)[0])

        def one_scale(tensors):
            for key in [k for k in tensors if k.endswith("weight_scale")]:
                tensors[key] = torch.tensor(0.01)

        loaded = load_model(rewritten(path, one_scale))
        layers = models.quantized_model(loaded).checkpoint.layers
        assert all((w.scale == 0.01).all() for w in layers.values())


KEY = "model.diffusion_model.time_embed.0"
FLOAT = "model.diffusion_model.out.2.weight"


@pytest.mark.parametrize("change,message", [
    (lambda t: t.update({f"{KEY}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}), "unreadable"),
    (lambda t: t.update({f"{KEY}.comfy_quant": mark({"format": "nvfp4"})}), "nvfp4"),
    (lambda t: t.update({f"{KEY}.comfy_quant":
                         mark({"format": "int8_tensorwise", "convrot": True})}), "rotation"),
    (lambda t: t.update({f"{KEY}.comfy_quant": mark([1])}), "unreadable"),
    (lambda t: t.pop(f"{KEY}.weight_scale"), "without a scale"),
    (lambda t: t.update({f"{KEY}.weight_scale": torch.ones(3)}), "wrong size"),
    (lambda t: t[f"{KEY}.weight_scale"].fill_(float("nan")), "not finite"),
    (lambda t: t.pop(f"{KEY}.weight"), "without int8"),
    (lambda t: t.update({f"{KEY}.weight": t[f"{KEY}.weight"].float()}), "without int8"),
    (lambda t: t.update({FLOAT: t[FLOAT].to(torch.int8)}), "without saying"),
    (lambda t: [t.pop(k) for k in list(t) if "input_blocks" in k], "no model|lacks"),
])
def test_damaged_stock_files_are_refused(change, message, source, host_folders):
    from quanttune.host.build import load_model
    from quanttune.quant import QuantTuneError

    with torch.inference_mode():
        path, _ = saved(quantize_symmetric(source)[0])
        with pytest.raises(QuantTuneError, match=message):
            load_model(rewritten(path, change))


def mark(facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
