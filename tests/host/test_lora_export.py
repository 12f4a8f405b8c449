"""A LoRA in the formats of diffusers and peft, loaded by their own loaders."""

import json
from pathlib import Path

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.test_export_unet import export, in_diffusers
from quanttune.tests.host.test_lora import with_lora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess, host_folders):
    with torch.inference_mode():
        yield


def trained(model, rank=4, dora=False, alpha=2.0, seed=0, mixed=False):
    """A LORA_MODEL for every Linear and convolution of a MODEL, as a training exports it."""
    from quanttune.host.lora_file import export_lora
    from quanttune.training.lora_layer import LoraLayer

    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for index, (name, layer) in enumerate(model.model.diffusion_model.named_modules()):
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) or layer.weight.dim() == 1:
            continue
        own = rank - index % 2 if mixed else rank
        shape = layer.weight.shape
        ones = [1] * (len(shape) - 2)
        layers[f"diffusion_model.{name}"] = LoraLayer(
            torch.randn(own, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5,
            torch.randn(shape[0], own, *ones, generator=generator) * 0.3, alpha,
            1 + 0.2 * torch.rand(shape[0], 1, *ones, generator=generator) if dora else None)
        if dora:
            layers[f"diffusion_model.{name}"].dora_scale.mul_(
                layer.weight.flatten(1).norm(dim=1).view(-1, 1, *ones))
    return export_lora(layers, model)


def saved(lora, form, model=None, dtype="float32", **options):
    from quanttune.host.lora_export import save_in_format

    path, summary = save_in_format(lora, form, "loras/mine", dtype, model, **options)
    assert path in summary
    return Path(path)


def unet_of(model):
    """The MODEL's UNet in diffusers, outside inference mode, since loaders change it."""
    path = export(model, "diffusers folder", prefix="base")[1]
    with torch.inference_mode(False):
        return diffusers.UNet2DConditionModel.from_pretrained(path, subfolder="unet").eval()


KINDS = [("SD15", {}), ("SD20", {"mixed": True}), ("SDXL", {}), ("SD15", {"dora": True})]


@pytest.mark.parametrize("family,options", KINDS)
def test_diffusers(family, options):
    model = models.small_model(family)
    lora = trained(model, **options)
    arguments = models.inputs(model)
    expected = models.forward(with_lora(model, lora, 1.0), arguments)
    path = saved(lora, "diffusers", model) / "pytorch_lora_weights.safetensors"
    unet = unet_of(model)
    base = in_diffusers(unet, arguments)
    mixin = diffusers.StableDiffusionPipeline
    with torch.inference_mode(False):
        state, alphas, metadata = mixin.lora_state_dict(path, return_lora_metadata=True)
        assert alphas is None
        mixin.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    got = in_diffusers(unet, arguments)
    assert models.relative(got, expected) < 2e-5 and models.relative(base, expected) > 1e-2


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_diffusers_without_the_settings(options):
    from safetensors.torch import load_file

    model = models.small_model()
    lora = trained(model, mixed=True, **options)
    arguments = models.inputs(model)
    expected = models.forward(with_lora(model, lora, 1.0), arguments)
    state = load_file(saved(lora, "diffusers", model) / "pytorch_lora_weights.safetensors")
    unet = unet_of(model)
    with torch.inference_mode(False):
        unet.load_lora_adapter(state, prefix="unet")
    assert models.relative(in_diffusers(unet, arguments), expected) < 2e-5


@pytest.mark.parametrize("family,options", KINDS)
def test_peft(family, options):
    model = models.small_model(family)
    lora = trained(model, **options)
    arguments = models.inputs(model)
    expected = models.forward(with_lora(model, lora, 1.0), arguments)
    folder = saved(lora, "peft", model)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json",
                                                        "adapter_model.safetensors"]
    unet = unet_of(model)
    with torch.inference_mode(False), pytest.warns() as told:
        import warnings

        warnings.warn("one", stacklevel=1)
        loaded = peft.PeftModel.from_pretrained(unet, str(folder)).eval()
    assert not [w for w in told if "missing" in str(w.message).lower()]
    assert models.relative(in_diffusers(loaded.base_model.model, arguments), expected) < 2e-5


@pytest.mark.parametrize("form,name", [("diffusers", "pytorch_lora_weights.safetensors"),
                                       ("peft", "adapter_model.safetensors")])
@pytest.mark.parametrize("options", [
    {}, {"dora": True}, {"rank": 5}])  # more than the last layer has outputs
def test_they_are_read_back(form, name, options):
    from quanttune.host.apply_lora import apply_lora
    from quanttune.host.lora_file import read_lora

    model = models.small_model()
    lora = trained(model, **options)
    arguments = models.inputs(model)
    expected = models.forward(with_lora(model, lora, 1.0), arguments)
    again = read_lora(saved(lora, form, model) / name)
    patched, _, report = apply_lora(model, None, again, 1.0, 1.0)
    assert models.relative(models.forward(patched, arguments), expected) < 2e-5
    assert "have no place" not in report


def test_text_encoders():
    from quanttune.starter.load import FOLDER, load_clip

    clip = load_clip(str(FOLDER / "clip.safetensors"), disable_dynamic=True)
    from quanttune.host.lora_file import LoraWeights

    key = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    weight = clip.patcher.model_state_dict()[f"{key}.weight"]
    generator = torch.Generator().manual_seed(0)
    model = models.small_model()
    lora = LoraWeights(trained(model))
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    lora |= {f"{name}.lora_down.weight": torch.randn(4, weight.shape[1], generator=generator),
             f"{name}.lora_up.weight": torch.randn(weight.shape[0], 4, generator=generator),
             f"{name}.alpha": torch.tensor(2.0)}
    folder = saved(lora, "peft", model, clip=clip)
    assert (folder / "text_encoder" / "adapter_config.json").is_file()
    from safetensors.torch import load_file

    state = load_file(saved(lora, "diffusers", model, clip=clip)
                      / "pytorch_lora_weights.safetensors")
    part = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    delta = state[f"{part}.lora_B.weight"] @ state[f"{part}.lora_A.weight"]
    up, down = (lora[f"{name}.lora_{k}.weight"] for k in ("up", "down"))
    assert models.relative(delta, up @ down * 0.5) < 1e-5
    text = small_text_model(weight.shape[0])
    own = state_in(text)
    with torch.inference_mode(False):
        diffusers.StableDiffusionPipeline.load_lora_into_text_encoder(
            {k: v.clone() for k, v in state.items()}, None, text, prefix="text_encoder")
    changed = [n for n, layer in text.named_modules() if hasattr(layer, "lora_A")]
    assert len(changed) == 1 and changed[0].endswith("layers.0.self_attn.q_proj")
    layer = text.get_submodule(changed[0])
    x = torch.randn(2, weight.shape[1], generator=generator)
    base = own[changed[0].removeprefix("text_model.") + ".weight"]
    exact = x @ (base + delta).T + layer.base_layer.bias
    assert models.relative(layer(x), exact) < 1e-5


def small_text_model(width):
    """transformers' CLIP text model of one layer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.inference_mode(False):
        return CLIPTextModel(CLIPTextConfig(
            hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=100)).eval()


def state_in(text):
    return {k.removeprefix("text_model."): v.clone() for k, v in text.state_dict().items()}


class TestBadInput:
    def test_choices(self):
        from quanttune.quant import QuantTuneError

        model = models.small_model()
        lora = trained(model)
        with pytest.raises(QuantTuneError, match="connect the MODEL"):
            saved(lora, "diffusers")
        with pytest.raises(QuantTuneError, match="format is 'onnx'"):
            saved(lora, "onnx", model)
        with pytest.raises(QuantTuneError, match="dtype is 'int8'"):
            saved(lora, "peft", model, "int8")

    def test_another_model(self):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError):
            saved(trained(models.small_model("SDXL")), "peft", models.small_model("SD15"))

    def test_too_large_for_half(self):
        from quanttune.quant import QuantTuneError

        model = models.small_model()
        lora = trained(model)
        first = next(k for k in lora if k.endswith("lora_up.weight"))
        lora[first] = lora[first] * 4e6
        lora[first.replace("lora_up", "lora_down")] *= 1e-6
        with pytest.raises(QuantTuneError, match="too large for float16"):
            saved(lora, "diffusers", model, "float16")
        assert json.loads((saved(lora, "peft", model) / "adapter_config.json").read_text())[
            "peft_type"] == "LORA"
