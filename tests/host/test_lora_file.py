"""LoRA files: stock ComfyUI reads ours, and ours reads everybody's."""

import json
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from quanttune.tests.host import lora_models, models


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


def exported(model, clip=None, metadata=None, **options):
    from quanttune.host.lora_file import export_lora

    layers = lora_models.random_layers(model, clip=clip, **options)
    return layers, export_lora(layers, model, clip, metadata)


def unused(caplog):
    return [r.message for r in caplog.records if "not loaded" in r.message.lower()
            or r.levelname == "ERROR"]


def assert_same(found, layers, tolerance=0.0):
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.allclose(found[name].down, layer.down, atol=tolerance), name
        assert torch.allclose(found[name].up, layer.up, atol=tolerance), name
        assert found[name].alpha == pytest.approx(layer.alpha)
        assert not found[name].down.is_inference()


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


def test_a_quantized_model_reads_and_writes_the_same(tmp_path):
    from quanttune.host.lora_file import export_lora, import_lora

    model = models.small_model()
    quantized, _ = models.quantize(model)
    layers, lora = exported(model)
    again = export_lora(layers, quantized)
    assert again.keys() == lora.keys() and again.metadata == lora.metadata
    assert_same(import_lora(lora, quantized), layers)


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
], ids=str)
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


def broken(lora, **changes):
    return {k: v for k, v in {**lora, **changes}.items() if v is not None}


@pytest.mark.parametrize("case", ["nan", "inf", "half", "halves", "alpha", "shape", "other",
                                  "few", "empty", "no lora", "rank", "loha", "reshape"])
def test_bad_loras_in_one_sentence(case):
    from quanttune.host.lora_file import import_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    _, lora = exported(model, include=("attn1.to_q", "attn2.to_k"))
    first = next(iter(lora)).partition(".")[0]
    down, up = f"{first}.lora_down.weight", f"{first}.lora_up.weight"
    others = {f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{half}.weight": torch.ones(4, 4)
              for i in range(len(lora)) for half in ("up", "down")}
    cases = {
        "nan": (broken(lora, **{up: torch.full_like(lora[up], float("nan"))}),
                f"NaN or infinite values in '{up}'"),
        "inf": (broken(lora, **{down: torch.full_like(lora[down], float("inf"))}),
                f"NaN or infinite values in '{down}'"),
        "half": (broken(lora, **{down: None}), f"the up half of the layer '{first}' without"),
        "halves": (broken(lora, **{down: torch.ones(7, 32)}), "do not belong together"),
        "alpha": (broken(lora, **{f"{first}.alpha": torch.ones(2)}), "2 values for the one number"),
        "shape": (broken(lora, **{down: torch.ones(4, 77)}), "32 x 77 values and the layer has 32"),
        "other": (others, r"fits none of its \d+ layers to this SD15 model, such as "
                          "'lora_unet_double_blocks_0_img_attn_qkv', it seems to be for Flux"),
        "few": ({**lora, **others}, r"fits only \d+ of its \d+ layers"),
        "empty": ({}, "holds no tensors"),
        "no lora": (torch.ones(3), "is not a LoRA"),
        "rank": (broken(lora, **{down: torch.ones(40, 32), up: torch.ones(32, 40)}),
                 "rank is 40, but .* no more than 32"),
        "loha": ({f"{first}.hada_{part}": torch.ones(32, 4) if part.endswith("a")
                  else torch.ones(4, 32) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
                 "holds a loha adapter"),
        "reshape": (broken(lora, **{f"{first}.reshape_weight": torch.tensor([32, 32])}),
                    "changes the shape"),
    }
    bad, message = cases[case]
    with pytest.raises(QuantTuneError, match=message) as caught:
        import_lora(bad, model, name="x.safetensors")
    text = str(caught.value)
    assert "x.safetensors" in text and text.endswith(".") and "\n" not in text and ";" in text


@pytest.mark.parametrize("width,models_of_it", [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL")])
def test_the_family_is_told_from_the_text_encoders_width(width, models_of_it):
    from quanttune.host.lora_fit import family

    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    lora = {f"{name}.lora_down.weight": torch.ones(4, width),
            f"{name}.lora_up.weight": torch.ones(320, 4)}
    assert family(lora) == models_of_it


def test_most_layers_match(caplog):
    from quanttune.host.lora_file import import_lora

    model = models.small_model()
    layers, lora = exported(model)
    lora["lora_unet_elsewhere.lora_up.weight"] = torch.ones(4, 4)
    lora["lora_unet_elsewhere.lora_down.weight"] = torch.ones(4, 4)
    assert_same(import_lora(lora, model), layers)
    assert any("1 parts of" in r.message and "lora_unet_elsewhere" in r.message
               for r in caplog.records)


def test_without_a_clip_its_layers_are_left_out(clip, caplog):
    from quanttune.host.lora_file import import_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    layers, lora = exported(model, clip)
    own = {n: layer for n, layer in layers.items() if n.startswith("diffusion_model.")}
    assert_same(import_lora(lora, model), own)
    assert any("connect a CLIP" in r.message for r in caplog.records)
    only = {k: v for k, v in lora.items() if k.startswith("lora_te")}
    with pytest.raises(QuantTuneError, match="text encoder only .* no CLIP is connected"):
        import_lora(only, model)


@pytest.mark.parametrize("content,message", [
    (b"", "is empty"), (pickle.dumps({"a": 1}), "pickled checkpoint"), (b"PK\x03\x04" + b"\0" * 40,
                                                                       "pickled checkpoint"),
    (b"hello, this is no LoRA", "not a safetensors file"), (None, "does not exist")])
def test_bad_files(content, message, tmp_path):
    from quanttune.host.lora_file import read_lora
    from quanttune.quant import QuantTuneError

    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QuantTuneError, match=message):
        read_lora(path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_files(keep, tmp_path):
    from quanttune.host.lora_file import read_lora, save_lora
    from quanttune.quant import QuantTuneError

    path = save_lora(tmp_path / "x.safetensors", exported(models.small_model())[1])
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * keep)])
    with pytest.raises(QuantTuneError, match="cut short"):
        read_lora(path)


@pytest.mark.parametrize("text,message", [("{", "cannot be read"), ("[]", "no JSON object"),
                                          ('{"lora_alpha": "x"}', "an alpha of 'x'")])
def test_damaged_settings_of_peft(text, message, tmp_path):
    from quanttune.host.lora_file import import_lora, read_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    path, _ = by_peft(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(QuantTuneError, match=message):
        import_lora(read_lora(path), model)


def test_a_layer_without_a_name_cannot_be_exported():
    from quanttune.host.lora_file import export_lora
    from quanttune.quant import QuantTuneError
    from quanttune.training.lora_layer import LoraLayer

    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(QuantTuneError, match="no name for the layer 'nowhere'"):
        export_lora({"nowhere": layer}, models.small_model())
    with pytest.raises(QuantTuneError, match="no layers"):
        export_lora({}, models.small_model())


def test_a_part_without_a_place_is_told():
    from quanttune.host.lora_fit import fit_lora

    model = models.small_model()
    _, lora = exported(model, include=("attn1.to_q",))
    first = next(iter(lora)).partition(".")[0]
    fit = fit_lora({**lora, f"{first}.diff_b": torch.ones(32)}, model)
    assert fit.matched == fit.layers and "to_q.bias" in fit.notes()[0]
    assert len(model.clone().add_patches(fit.patches)) == len(fit.patches)
