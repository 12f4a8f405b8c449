"""Files of peft's and diffusers' own savers do here what they do there."""

import pytest
import torch
from safetensors.torch import save_file

from quanttune.tests.host import lora_models, models
from quanttune.tests.host.lora_models import assert_same


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clip(comfy_inprocess):
    with torch.inference_mode():
        return models.projecting_clip()


def by_diffusers(model, folder, alpha=6, old_names=False, with_settings=True, **options):
    """A file of StableDiffusionPipeline.save_lora_weights, and diffusers' UNet with the LoRA."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    with torch.inference_mode(False):
        unet = lora_models.diffusers_unet(model)
        unet.add_adapter(lora_models.peft_config(alpha=alpha, **options))
        lora_models.fill(unet)
        state = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=convert_state_dict_to_diffusers(state) if old_names else state,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict() if with_settings else None)
    return folder / "pytorch_lora_weights.safetensors", unet


def by_peft(model, folder, **options):
    """A file of PeftModel.save_pretrained, and diffusers' UNet with the LoRA."""
    from peft import get_peft_model

    with torch.inference_mode(False):
        unet = lora_models.fill(get_peft_model(lora_models.diffusers_unet(model),
                                               lora_models.peft_config(**options)))
        unet.save_pretrained(folder)
    return folder / "adapter_model.safetensors", unet


def applied(model, path):
    from quanttune.host.lora_file import read_lora
    from quanttune.host.lora_fit import fit_lora

    fit = fit_lora(read_lora(path), model, None, path.name)
    assert fit.matched == fit.layers and not fit.notes()
    clone = model.clone()
    assert len(clone.add_patches(fit.patches, 1.0)) == len(fit.patches)
    return clone


@pytest.mark.parametrize("saver,options", [
    (by_diffusers, {}), (by_diffusers, {"old_names": True}),
    (by_diffusers, {"alpha": 4, "with_settings": False}),
    (by_diffusers, {"use_rslora": True}),
    (by_diffusers, {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn2.to_k": 16}}),
    (by_peft, {}), (by_peft, {"use_rslora": True, "alpha": 3}), (by_peft, {"use_dora": True}),
    (by_peft, {"rank_pattern": {"conv1": 8}, "alpha_pattern": {"to_q": 1}}),
    (by_peft, {"lora_bias": True, "target_modules": ["to_out.0", "conv1", "proj_in"]}),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_files_of_peft_and_diffusers_do_what_they_do_there(saver, options, tmp_path):
    model = models.small_model()
    path, unet = saver(model, tmp_path, **options)
    arguments = models.inputs(model)
    expected = lora_models.answer(unet, arguments)
    got = models.forward(applied(model, path), arguments)
    print(f"largest difference {(got - expected).abs().max().item():.2e}")
    assert models.relative(got, expected) < 5e-6
    assert models.relative(got, models.forward(model, arguments)) > 1e-2


def test_peft_on_the_hosts_own_module(tmp_path):
    """LDM names behind ``base_model.model.``, and the same behind ``diffusion_model.``."""
    from quanttune.host.lora_file import import_lora, read_lora

    model = models.small_model()
    layers = lora_models.random_layers(model, alpha=4.0)
    for prefix in ("base_model.model.", "base_model.model.diffusion_model.", "diffusion_model.",
                   "base_model.model.unet."):
        tensors = {}
        for name, layer in layers.items():
            key = prefix + name.removeprefix("diffusion_model.")
            tensors[f"{key}.lora_A.default.weight"] = layer.down
            tensors[f"{key}.lora_B.default.weight"] = layer.up
        save_file(tensors, tmp_path / "x.safetensors")
        assert_same(import_lora(read_lora(tmp_path / "x.safetensors"), model), layers)


@pytest.mark.parametrize("middle", ["text_model.", ""])
@pytest.mark.parametrize("prefix", ["text_encoder.", "base_model.model."])
def test_text_encoders_of_diffusers_and_peft(prefix, middle, clip):
    from quanttune.host.lora_file import import_lora

    layers = {name: layer for name, layer in lora_models.random_layers(
        models.small_model(), clip=clip, alpha=4.0).items() if name.startswith("clip_l")}
    tensors = {}
    for name, layer in layers.items():
        key = prefix + middle + name.removeprefix("clip_l.transformer.text_model.")
        tensors |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}
    assert_same(import_lora(tensors, models.small_model(), clip), layers)


@pytest.mark.parametrize("text,message", [("{", "cannot be read"), ("[]", "no JSON object"),
                                          ('{"lora_alpha": "x"}', "an alpha of 'x'"),
                                          ('{"alpha_pattern": [1]}', "an alpha_pattern that is no"),
                                          ('{"lora_alpha": 1%s}' % ("0" * 400), "0…, which is no"),
                                          ('{"lora_alpha": NaN}', "an alpha of nan"),
                                          ('{"lora_alpha": Infinity}', "an alpha of inf")])
def test_damaged_settings_of_peft(text, message, tmp_path):
    from quanttune.host.lora_file import import_lora, read_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    path, _ = by_peft(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(QuantTuneError, match=message):
        import_lora(read_lora(path), model)
