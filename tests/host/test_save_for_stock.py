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
