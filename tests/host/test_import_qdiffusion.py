"""Q-Diffusion checkpoints as MODELs: the forward of their float twins, and all that goes on top."""

import pytest
import torch

from quanttune.tests.host import models

SPLITS = 4
"""Shortcuts of the small SD15 that read two joined feature maps."""


@pytest.fixture(scope="module")
def checkpoint(comfy_inprocess, tmp_path_factory):
    """A file of a small SD1.x with zero points outside of the range, and its tensors."""
    from quanttune.starter.qdiffusion_file import qdiffusion_state

    unet = models.small_model().model.diffusion_model.state_dict()
    state = {k: v.clone() for k, v in qdiffusion_state(unet, 4).items()}
    for key in [k for k in state if k.endswith("weight_quantizer.delta")]:
        layer = key.removesuffix(".weight_quantizer.delta")
        alpha = state[f"{layer}.weight_quantizer.alpha"]
        generator = torch.Generator().manual_seed(len(key))
        state[f"{layer}.weight_quantizer.alpha"] = torch.randn(alpha.shape, generator=generator)
        # All weights of the first channel above 0: its zero point is below 0.
        state[f"{layer}.weight"][0, : alpha.shape[1]] += 12 * state[key][0]
        state[f"{layer}.weight_quantizer.zero_point"][0] -= 12
    path = tmp_path_factory.mktemp("qdiffusion") / "sd_w4a8_ckpt.pth"
    torch.save(state, path)
    return path, state


def loaded(path, bits=None):
    from quanttune.host.build import load_model

    return load_model(str(path), path.name, bits)


def twin(state):
    """The float MODEL of the weights that the file's integers stand for, by the plain recipe."""
    from quanttune.tests.quant.qdiffusion_files import expected_weight

    model = models.small_model()
    own = {}
    for key, value in state.items():
        name = key.removeprefix("model.")
        if "weight_quantizer" in name:
            continue
        layer = name.removesuffix(".weight")
        if f"{key}_quantizer.delta" in state:
            value = expected_weight(state, layer, 4)
        own[name] = value
    model.model.diffusion_model.load_state_dict(own)
    return model


@torch.inference_mode()
def test_the_forward_is_that_of_the_float_twin(checkpoint):
    path, state = checkpoint
    model = loaded(path)
    arguments = models.inputs(model)
    expected = models.forward(twin(state), arguments)
    assert models.relative(models.forward(model, arguments), expected) < 1e-5
    found = models.quantized_model(model).checkpoint
    assert sum(w.split is not None for w in found.layers.values()) == SPLITS
    assert min(float(w.zero_point.min()) for w in found.layers.values()) < 0
    assert {w.bits for w in found.layers.values()} == {4}
    assert found.metadata.family == "SD15" and found.metadata.model_type == "EPS"


@pytest.mark.parametrize("family", ["SD20", "SDXL"])
@torch.inference_mode()
def test_other_families_of_the_same_names(family, tmp_path, comfy_inprocess):
    from quanttune.starter.qdiffusion_file import qdiffusion_state
    from quanttune.tests.quant.qdiffusion_files import expected_weight

    plain = models.small_model(family)
    own = plain.model.diffusion_model.state_dict()
    state = {k: v.clone() for k, v in qdiffusion_state(own, 8).items()}
    torch.save(state, tmp_path / "x.pth")
    model = loaded(tmp_path / "x.pth")
    assert models.quantized_model(model).checkpoint.metadata.family == family
    arguments = models.inputs(model)
    for name in models.quantized_model(model).checkpoint.layers:
        own[f"{name}.weight"] = expected_weight(state, name, 8)
    plain.model.diffusion_model.load_state_dict(own)
    assert models.relative(models.forward(model, arguments),
                           models.forward(plain, arguments)) < 1e-5


@torch.inference_mode()
def test_bits_are_told_in_place_of_those_of_the_file(checkpoint):
    from quanttune.quant import QuantTuneError

    path, _ = checkpoint
    found = models.quantized_model(loaded(path, 3)).checkpoint
    assert {w.bits for w in found.layers.values()} == {3}
    with pytest.raises(QuantTuneError, match="cannot have 8 bits"):
        loaded(path, 8)


@torch.inference_mode()
def test_the_host_can_load_it_a_second_time(checkpoint):
    path, _ = checkpoint
    model = loaded(path, 3)
    factory, arguments = model.cached_patcher_init[:2]
    again = factory(*arguments, disable_dynamic=True)
    own, other = (models.quantized_model(m) for m in (model, again))
    assert own.fingerprint == other.fingerprint and own.name == other.name


@torch.inference_mode()
def test_saving_keeps_every_integer(checkpoint, host_folders):
    from quanttune.host.build import load_model
    from quanttune.host.save import save_model

    path, _ = checkpoint
    model = loaded(path)
    out, _ = save_model(model, "quanttune/imported")
    again = load_model(out, "imported")
    own, new = (models.quantized_model(m) for m in (model, again))
    assert own.fingerprint == new.fingerprint
    for name, weight in own.checkpoint.layers.items():
        for part in ("packed", "scale", "zero_point"):
            other = getattr(new.checkpoint.layers[name], part)
            assert torch.equal(getattr(weight, part), other), name
    arguments = models.inputs(model)
    assert torch.equal(models.forward(model, arguments), models.forward(again, arguments))


@torch.inference_mode()
def test_scales_act_on_split_layers_too(checkpoint):
    from quanttune.host.routing import apply_scale_set, layer_shapes

    path, state = checkpoint
    model = loaded(path)
    shapes = layer_shapes(model.model.diffusion_model)
    skip = "output_blocks.0.0.skip_connection"
    weight = models.quantized_model(model).checkpoint.layers[skip]
    assert shapes[skip] == (2 * weight.shape[0], weight.shape[1])
    scales = models.random_scales(model, num_experts=1)
    scaled, _ = apply_scale_set(model, scales, 1.0)
    arguments = models.inputs(model)
    float_model = twin(state)
    own = float_model.model.diffusion_model.state_dict()
    for name, layer in models.quantized_model(model).checkpoint.layers.items():
        full = layer.dequantize()
        r_out, s_in = scales.layers[name].r_out[0], scales.layers[name].s_in[0]
        parts = r_out.view(layer.parts, -1)
        rest = (1,) * (full.dim() - 2)
        border = layer.split or full.shape[1]
        full[:, :border] *= parts[0].view(-1, 1, *rest)
        if layer.split:
            full[:, border:] *= parts[1].view(-1, 1, *rest)
        own[f"{name}.weight"] = full * s_in.view(1, -1, *rest)
    float_model.model.diffusion_model.load_state_dict(own)
    expected = models.forward(float_model, arguments)
    assert models.relative(models.forward(scaled, arguments), expected) < 1e-4


@torch.inference_mode()
def test_a_stock_lora_acts_on_split_layers_too(checkpoint):
    import comfy.sd

    path, state = checkpoint
    model = loaded(path)
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name in ("output_blocks.0.0.skip_connection", "input_blocks.1.1.proj_in"):
        shape = models.quantized_model(model).checkpoint.layers[name].shape
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(
            shape[0], 4, 1, 1, generator=generator)
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(
            4, *shape[1:], generator=generator) / shape[1] ** 0.5
    arguments = models.inputs(model)
    with_lora = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]
    expected = comfy.sd.load_lora_for_models(twin(state), None, lora, 0.7, 0)[0]
    result = models.forward(with_lora, arguments)
    assert models.relative(result, models.forward(expected, arguments)) < 1e-5
    assert models.relative(result, models.forward(loaded(path), arguments)) > 1e-2


@torch.inference_mode()
def test_integer_products_take_split_layers_too(checkpoint):
    from quanttune.host.dynamic_int8 import dynamic_int8

    path, state = checkpoint
    model = loaded(path)
    arguments = models.inputs(model)
    fast, report = dynamic_int8(model, "all", "float32")
    expected = models.forward(twin(state), arguments)
    assert models.relative(models.forward(fast, arguments), expected) < 0.05


@torch.inference_mode()
def test_the_starters_checkpoint_is_the_shipped_4_bit_model(comfy_inprocess, tmp_path):
    from quanttune.host import folders
    from quanttune.host.build import load_model
    from quanttune.starter.qdiffusion_file import write_qdiffusion_starter

    path = tmp_path / "starter.pth"
    write_qdiffusion_starter(path)
    own = models.quantized_model(loaded(path))
    shipped = load_model(str(folders.STARTER / "quanttune" / "starter-4bit.safetensors"))
    assert own.fingerprint == models.quantized_model(shipped).fingerprint
    assert own.checkpoint.metadata.unet_config["model_channels"] == 64


def test_the_starters_checkpoint_is_listed_and_made_once(comfy_inprocess, host_folders):
    import os

    import folder_paths

    from quanttune.host import folders

    folders.register_folders()
    assert folders.unet_files() == ["starter-4bit.safetensors", folders.MADE]
    path = folders.unet_path(folders.MADE)
    assert os.path.isfile(path) and "temp" in path
    state = folders.file_state(path)
    assert folders.unet_path(folders.MADE) == path and folders.file_state(path) == state
    mine = host_folders / "models" / "quanttune" / folders.MADE
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_bytes(b"mine")
    folder_paths.filename_list_cache.clear()
    assert folders.unet_path(folders.MADE) == str(mine)
    assert folders.unet_files().count(folders.MADE) == 1


def refused(path):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError) as error:
        loaded(path)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@torch.inference_mode()
def test_models_that_comfyui_does_not_have_are_told(comfy_inprocess, tmp_path):
    from quanttune.tests.quant.qdiffusion_files import synthetic

    shapes = {"conv_in": ((8, 3, 3, 3), None), "temb.dense.0": ((16, 8), None)}
    path = tmp_path / "cifar_w4a8_ckpt.pth"
    torch.save(synthetic(4, shapes), path)
    assert "a DDPM of pixels" in refused(path)
    shapes = {"input_blocks.0.0": ((8, 3, 3, 3), None), "middle_block.1.qkv": ((24, 8, 1), None)}
    path = tmp_path / "bedroom_w4a8_ckpt.pth"
    torch.save(synthetic(4, shapes), path)
    assert "without a text encoder" in refused(path)
    # Under names that nobody knows it is no DDPM.
    torch.save({f"qnn.{k}": v for k, v in torch.load(path).items()}, path)
    assert "names of no UNet that is known, such as 'qnn.model." in refused(path)


@torch.inference_mode()
def test_a_checkpoint_that_lacks_a_layer_is_told(checkpoint, tmp_path):
    _, state = checkpoint
    layer = "model.output_blocks.0.0.emb_layers.1."
    path = tmp_path / "lacks.pth"
    torch.save({k: v for k, v in state.items() if not k.startswith(layer)}, path)
    assert "lacks tensor 'output_blocks.0.0.emb_layers.1" in refused(path)


@torch.inference_mode()
def test_an_ordinary_checkpoint_is_told(comfy_inprocess, tmp_path):
    path = tmp_path / "v1-5-pruned.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}}, path)
    assert "not a checkpoint of Q-Diffusion" in refused(path)
