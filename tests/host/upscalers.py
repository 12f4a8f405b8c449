"""Tiny SD x4 upscalers by diffusers itself, and the configurations of the real one."""

from __future__ import annotations

import json

import pytest
import torch

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SHIPPED = "starter-x4 (shipped)"
WEIGHTS = "diffusion_pytorch_model.safetensors"
UP = tuple(kind.replace("Down", "Up") for kind in reversed(DOWN))
REAL_UNET = {
    "in_channels": 7, "out_channels": 4, "block_out_channels": (256, 512, 512, 1024),
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 1024,
    "down_block_types": DOWN, "up_block_types": UP, "use_linear_projection": True,
    "only_cross_attention": (True, True, True, False), "num_class_embeds": 1000,
    "sample_size": 128,
}
TINY_UNET = {**REAL_UNET, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1,
             "cross_attention_dim": 32, "sample_size": 16}
REAL_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "block_out_channels": (128, 256, 512), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "scaling_factor": 0.08333, "sample_size": 256,
}
TINY_VAE = {**REAL_VAE, "block_out_channels": (32, 64, 64), "sample_size": 32}
REAL_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
             "num_hidden_layers": 23, "hidden_act": "gelu", "vocab_size": 49408,
             "max_position_embeddings": 77}
TINY_TEXT = {**REAL_TEXT, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
             "num_hidden_layers": 3}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}


def tiny_pipeline(seed: int = 0, unet=(), vae=(), text=(), scheduler=()):
    """A `StableDiffusionUpscalePipeline` of random weights, with changes to its parts' configs."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(CLIPTextConfig(**{**TINY_TEXT, **dict(text)}))
        pipeline = StableDiffusionUpscalePipeline(
            vae=AutoencoderKL(**{**TINY_VAE, **dict(vae)}),
            # The host keeps text encoders in half precision.
            text_encoder=encoder.half().float().eval(), tokenizer=None,
            unet=UNet2DConditionModel(**{**TINY_UNET, **dict(unet)}),
            low_res_scheduler=DDPMScheduler(**BETAS),
            scheduler=DDIMScheduler(**{**BETAS, "prediction_type": "v_prediction",
                                       **dict(scheduler)}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet_inputs(context: int = 32, batch: int = 2, size: int = 16, seed: int = 1):
    """Latent with the small picture, timesteps, text and noise levels."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 7, size, size, generator=generator),
            torch.tensor([981.0, 21.0])[:batch],
            torch.randn(batch, 77, context, generator=generator),
            torch.tensor([20, 300])[:batch])


def host_forward(model, inputs):
    """The host's UNet as its sampler calls it: loaded, with the MODEL's options."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    x, timesteps, context, levels = inputs
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    unet = model.model.diffusion_model
    dtype = model.model.get_dtype_inference()
    return unet(x.to(dtype), timesteps, context.to(dtype), y=levels,
                transformer_options=options).float()


def meta_parts():
    """diffusers' and transformers' networks of the real sizes, without their weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return (UNet2DConditionModel(**REAL_UNET), AutoencoderKL(**REAL_VAE),
                CLIPTextModel(CLIPTextConfig(**REAL_TEXT)))


def load(name="x4/", precision="float"):
    """MODEL, CLIP and VAE of a listed upscaler."""
    from quanttune.host.load_upscaler import load_upscaler

    return load_upscaler(name, precision)


def load_unet(folder):
    """The MODEL of a diffusers folder alone, which is faster."""
    from quanttune.host.load_upscaler import load_folder_unet

    return load_folder_unet(str(folder))


def change(path, **settings):
    """Change settings of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def told(match, name="x4/"):
    """What the user is told: one sentence that matches."""
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=match) as caught:
        load(name)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500
    return message


def with_old_names(state):
    """The attention of a VAE as diffusers named it before 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in state.items():
        for new, former in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        renamed[key] = value
    return renamed
