"""Names of layers in files: those of kohya's tools, found by ComfyUI and by diffusers."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.tests.host import lora_models, models
from quanttune.tests.host.lora_models import assert_same, exported, unused


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clip(comfy_inprocess):
    with torch.inference_mode():
        return models.projecting_clip()


@given(st.from_regex(r"(lora_unet|unet|base_model\.model|lora_te1)([._][a-z0-9]{1,6}){1,6}",
                     fullmatch=True).filter(lambda name: "lora" not in name[7:]))
def test_every_spelling_is_taken_apart(name):
    from quanttune.host.lora_keys import layer_and_role

    spellings = {
        "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A",
                 "_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"),
        "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.other.weight", ".lora_B",
               "_lora.up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
        "alpha": (".alpha",), "dora_scale": (".dora_scale",), "lora_B.bias": (".lora_B.bias",),
        "lora_magnitude_vector": (".lora_magnitude_vector", ".lora_magnitude_vector.weight",
                                  ".lora_magnitude_vector.default.weight"),
    }
    for role, endings in spellings.items():
        for ending in endings:
            assert layer_and_role(name + ending) == (name, role), name + ending
    for ending in (".hada_w1_a", ".lokr_w2", ".diff", ".diff_b", ".oft_blocks", ".lora_mid.weight",
                   ".reshape_weight", ".w_norm", ".set_weight"):
        assert layer_and_role(name + ending) == (name, ending)


@pytest.mark.parametrize("family,style", [("SD15", "down_blocks"), ("SD20", "down_blocks"),
                                          ("SDXL", "input_blocks")])
def test_names_are_those_of_kohyas_tools(family, style):
    model = models.small_model(family)
    _, lora = exported(model)
    stems = {key.partition(".")[0] for key in lora}
    assert all(stem.startswith("lora_unet_") for stem in stems)
    assert any(stem.startswith(f"lora_unet_{style}_") for stem in stems)
    other = {"down_blocks", "input_blocks"} - {style}
    assert not any(o in stem for stem in stems for o in other)
    assert {key.partition(".")[2] for key in lora} == {"lora_down.weight", "lora_up.weight",
                                                       "alpha"}


def test_the_name_that_the_readme_of_kohya_has():
    _, lora = exported(models.small_model(), include=("attn1.to_q",))
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in lora


FULL = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
        "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False}
SD15 = {**FULL, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 768,
        "transformer_depth": [1] * 6 + [0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "use_linear_in_transformer": False, "num_heads": 8,
        "adm_in_channels": None}
SDXL = {**FULL, "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "context_dim": 2048,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64,
        "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential"}


@pytest.mark.parametrize("family,config,layers,kohyas", [("SD15", SD15, 282, 192),
                                                         ("SDXL", SDXL, 794, 722)])
def test_full_size_models_have_as_many_modules_as_kohyas_tools_count(family, config, layers,
                                                                     kohyas):
    """Its networks.lora makes 192 modules for SD1.5's UNet and 722 for SDXL's."""
    from types import SimpleNamespace

    import comfy.supported_models

    from quanttune.host.lora_keys import file_names

    built = getattr(comfy.supported_models, family)(dict(config))
    built.set_inference_dtype(torch.float16, None)
    model = SimpleNamespace(model=built.get_model({}, "", device="meta"))
    found = [f"diffusion_model.{name}" for name, m in
             model.model.diffusion_model.named_modules()
             if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    names = set(file_names(found, model).values())
    assert len(names) == len(found) == layers
    assert sum(bool(re.search("transformer_blocks|proj_in|proj_out", n)) for n in names) == kohyas


def test_diffusers_reads_every_layer_of_ours(tmp_path):
    """By its own converter of kohya's files, into its own UNet."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    from quanttune.host.lora_file import save_lora

    model = models.small_model()
    every = tuple(name for name, module in model.model.diffusion_model.named_modules()
                  if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)))
    layers, lora = exported(model, include=every)
    path = save_lora(tmp_path / "x.safetensors", lora)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    assert len(state) == 2 * len(layers) == 2 * len(every)
    with torch.inference_mode(False):
        unet = lora_models.diffusers_unet(model)
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(dict(state), alphas, unet)
    arguments = models.inputs(model)
    expected = models.forward(lora_models.with_deltas(model, layers), arguments)
    assert models.relative(lora_models.answer(unet, arguments), expected) < 5e-6


def test_diffusers_reads_ours_of_an_sdxl(tmp_path):
    """Its converter has a map of its own from a checkpoint's names."""
    from types import SimpleNamespace

    import comfy.utils
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    from quanttune.host.lora_file import save_lora

    model = models.small_model("SDXL")
    layers, lora = exported(model, include=("attn1.to_q", "attn2.to_k", "to_out.0", "ff.net.2",
                                            "proj_in", "in_layers.2", "skip_connection"))
    path = save_lora(tmp_path / "x.safetensors", lora)
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(path), unet_config=SimpleNamespace(layers_per_block=1))
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    found = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"unet\.(.+?)(?:_lora|\.lora)\.down\.weight", key):
            name = match[1].replace(".processor", "")
            own = names.get(f"{name}.weight") or names[f"{name}.0.weight"]
            found[f"diffusion_model.{own.removesuffix('.weight')}"] = tensor
    assert found.keys() == layers.keys()
    assert all(torch.equal(found[name], layer.down) for name, layer in layers.items())


def test_text_encoders_one_and_two(clip, caplog):
    import comfy.sd

    model = models.small_model()
    layers, lora = exported(model, clip)
    assert any(k.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj") for k in lora)
    patched, patched_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    assert not unused(caplog)
    assert len(patched.patches) + len(patched_clip.patcher.patches) == len(layers)
    from quanttune.host.lora_file import import_lora

    assert_same(import_lora(lora, model, clip), layers)


class TwoEncoders:
    """What the host asks of an SDXL CLIP: the names of its weights."""

    def __init__(self):
        layer = "transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
        self.state = {f"clip_l.{layer}": torch.ones(8, 8), f"clip_g.{layer}": torch.ones(8, 8)}
        self.cond_stage_model = self.patcher = self

    def state_dict(self):
        return self.state

    model_state_dict = state_dict


def test_two_encoders_are_numbered():
    from quanttune.host.lora_file import export_lora, import_lora
    from quanttune.training.lora_layer import LoraLayer

    clip, model = TwoEncoders(), models.small_model("SDXL")
    layers = {key.removesuffix(".weight"): LoraLayer(torch.ones(2, 8), torch.ones(8, 2) * i, 1.0)
              for i, key in enumerate(clip.state, 1)}
    lora = export_lora(layers, model, clip)
    stem = "text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    assert {f"lora_te1_{stem}", f"lora_te2_{stem}"} < lora.keys()
    assert_same(import_lora(lora, model, clip), layers)


def test_a_layer_without_a_name_cannot_be_exported():
    from quanttune.host.lora_file import export_lora
    from quanttune.quant import QuantTuneError
    from quanttune.training.lora_layer import LoraLayer

    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(QuantTuneError, match="no name for the layer 'nowhere'"):
        export_lora({"nowhere": layer}, models.small_model())
    with pytest.raises(QuantTuneError, match="no layers"):
        export_lora({}, models.small_model())
