"""LoRAs for the tests: random layers, and the same small UNet in diffusers with peft's adapters."""

from __future__ import annotations

import pytest
import torch

EVERYWHERE = ("attn1.to_q", "attn2.to_k", "to_out.0", "ff.net.0.proj", "proj_in", "in_layers.2",
              "skip_connection", "time_embed.0")
PEFT_TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "conv_shortcut"]


def random_layers(model, rank=4, alpha=6.0, seed=5, include=EVERYWHERE, amount=0.2, clip=None,
                  dora=False):
    """A `LoraLayer` for each layer of a float MODEL whose name ends so, by its host name."""
    from quanttune.training.lora_layer import LoraLayer

    generator = torch.Generator().manual_seed(seed)
    shapes = {f"diffusion_model.{name}": module.weight.shape
              for name, module in model.model.diffusion_model.named_modules()
              if name.endswith(include) and hasattr(module, "weight")}
    if clip is not None:
        state = clip.cond_stage_model.state_dict()
        shapes |= {k.removesuffix(".weight"): v.shape for k, v in state.items()
                   if k.endswith(("q_proj.weight", "fc1.weight"))}

    def random(*shape):
        return amount * torch.randn(*shape, generator=generator)

    with torch.inference_mode(False):
        return {name: LoraLayer(
            random(rank, *shape[1:]), random(shape[0], rank, *[1] * (len(shape) - 2)), alpha,
            1 + random(shape[0], *[1] * (len(shape) - 1)) if dora else None)
            for name, shape in shapes.items()}


def with_deltas(model, layers, strength=1.0):
    """A float MODEL in whose weights the LoRA was added by hand."""
    from quanttune.tests.host.models import small_model

    changed = small_model(type(model.model.model_config).__name__)
    state = model.model.state_dict()
    for name, layer in layers.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + strength * layer.delta()
    changed.model.load_state_dict(state)
    return changed


def diffusers_unet(model):
    """The small SD15 MODEL as diffusers' UNet2DConditionModel with the same weights."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    config = model.model.model_config.unet_config
    width = config["model_channels"]
    with torch.inference_mode(False):
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=tuple(width * m for m in config["channel_mult"]),
            layers_per_block=1, cross_attention_dim=config["context_dim"],
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8)
        names = comfy.utils.unet_to_diffusers(config)
        ours = model.model.diffusion_model.state_dict()
        state = {theirs: ours[own].clone() for theirs, own in names.items() if own in ours}
        unet.load_state_dict(state)
    return unet.eval()


def peft_config(rank=4, alpha=6, **options):
    """peft's settings of a LoRA on attention and convolutions."""
    from peft import LoraConfig

    options.setdefault("target_modules", PEFT_TARGETS)
    return LoraConfig(r=rank, lora_alpha=alpha, **options)


def fill(module, seed=3, amount=0.2):
    """Random values for peft's fresh adapters, whose B is 0, and magnitudes off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + amount * noise)
            elif "lora_" in name:
                parameter.copy_(amount * noise)
    return module


def answer(unet, arguments):
    """What diffusers' UNet gives for arguments of the host's."""
    with torch.no_grad():
        return unet(arguments["x"], arguments["timesteps"], arguments["context"]).sample


def exported(model, clip=None, metadata=None, **options):
    """Random layers and the `LoraWeights` made of them."""
    from quanttune.host.lora_file import export_lora

    layers = random_layers(model, clip=clip, **options)
    return layers, export_lora(layers, model, clip, metadata)


def unused(caplog):
    """What the host's log says of tensors that it did not use."""
    return [r.message for r in caplog.records if "not loaded" in r.message.lower()
            or r.levelname == "ERROR"]


def assert_same(found, layers, tolerance=0.0):
    """That imported layers are those that were exported, and that autograd may use them."""
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.allclose(found[name].down, layer.down, atol=tolerance), name
        assert torch.allclose(found[name].up, layer.up, atol=tolerance), name
        assert found[name].alpha == pytest.approx(layer.alpha)
        assert not found[name].down.is_inference()
