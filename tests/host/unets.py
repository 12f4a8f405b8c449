"""Tiny UNets of each family by diffusers itself, and the forms their weights come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMON = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": 24,
          "sample_size": 16}
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
TEXT_TIME = {"use_linear_projection": True, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 8}
CONFIGS = {
    "SD15": {"block_out_channels": (32, 64), "down_block_types": (CROSS, PLAIN),
             "attention_head_dim": 8},
    "SD20": {"block_out_channels": (64, 128), "down_block_types": (CROSS, PLAIN),
             "attention_head_dim": (1, 2), "use_linear_projection": True},
    "SDXL": {"block_out_channels": (64, 128), "down_block_types": (PLAIN, CROSS),
             "attention_head_dim": (1, 2), "transformer_layers_per_block": (1, 2),
             "projection_class_embeddings_input_dim": 64, **TEXT_TIME},
    "SDXLRefiner": {"block_out_channels": (64, 64, 128, 128),
                    "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
                    "attention_head_dim": (1, 1, 2, 2), "transformer_layers_per_block": 2,
                    "projection_class_embeddings_input_dim": 56, **TEXT_TIME},
}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear",
             "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
             "prediction_type": "epsilon"}


def tiny_unet(family="SD15", seed=0, **changes):
    """A `UNet2DConditionModel` of random weights."""
    from diffusers import UNet2DConditionModel

    config = {**COMMON, **CONFIGS[family], **changes}
    config["up_block_types"] = tuple(
        kind.replace("Down", "Up") for kind in reversed(config["down_block_types"]))
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**config).eval()


def save_pipeline(unet, folder: Path, scheduler=(), **options) -> Path:
    """A diffusers folder around a UNet: what of one matters here."""
    unet.save_pretrained(folder / "unet", **options)
    (folder / "model_index.json").write_text(json.dumps(
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", type(unet).__name__]}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**SCHEDULER, **dict(scheduler)}))
    return folder


def inputs(unet, seed=1):
    """Latent, timesteps, text, and what of an SDXL's size and pooled text goes in."""
    generator = torch.Generator().manual_seed(seed)
    size = unet.config.projection_class_embeddings_input_dim
    added = None
    if size:
        count = 5 if len(unet.config.block_out_channels) == 4 else 6
        added = {"text_embeds": torch.randn(2, size - 8 * count, generator=generator),
                 "time_ids": torch.randint(0, 999, (2, count), generator=generator).float()}
    return (torch.randn(2, unet.config.in_channels, 16, 16, generator=generator),
            torch.tensor([981.0, 21.0]), torch.randn(2, 7, 24, generator=generator), added)


def theirs(unet, given):
    """diffusers' own forward."""
    x, timesteps, text, added = given
    return unet(x, timesteps, text, added_cond_kwargs=added).sample


def ours(model, unet, given):
    """The host's, as its sampler calls it: loaded, with the MODEL's options."""
    import comfy.model_management

    x, timesteps, text, added = given
    more = {}
    if added:
        times = unet.add_time_proj(added["time_ids"].flatten()).reshape(2, -1)
        more["y"] = torch.cat([added["text_embeds"], times], dim=1)
    comfy.model_management.load_models_gpu([model])
    dtype = model.model.get_dtype_inference()
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    more = {k: v.to(dtype) for k, v in more.items()}
    found = model.model.diffusion_model(x.to(dtype), timesteps, text.to(dtype), **more,
                                        transformer_options=options)
    return found.float()


def host_state(path) -> dict[str, torch.Tensor]:
    """All tensors of a source in the host's names."""
    from quanttune.host.unet_source import open_unet

    source = open_unet(path)
    return {key: source.read(key).clone() for key in source.shapes}


def told(match, action, *args):
    """What the user is told: one sentence that matches."""
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=match) as caught:
        action(*args)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500, message
    return message
