"""The small upscaler's architecture: the numbers that its file and the host must agree on.

The family is that of Stable Diffusion's x4 upscaler: a UNet that sees a noisy latent of four
channels beside the small picture's three, both of the same height and width, knows how much noise
was laid on the small picture by a class label, and predicts the velocity; an autoencoder whose
latents have a quarter of the picture's side.
"""

from __future__ import annotations

from pathlib import Path

FACTOR = 4
"""How many times larger the upscaled picture's sides are, and pixels a latent is wide."""

FILE = Path(__file__).resolve().parent / "upscale" / "starter-x4.safetensors"
"""The shipped file: UNet and autoencoder in one."""

UNET = {
    "image_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1, 1],
    "channel_mult": [1, 1, 1, 1],
    "transformer_depth": [0, 0, 1, 1],
    "transformer_depth_output": [0, 0, 0, 0, 0, 1, 0, 1],
    "transformer_depth_middle": 1,
    "disable_self_attentions": [True, True, True, False],
    "num_classes": 1000,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_scale_shift_norm": True,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 128,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
"""Keyword arguments of the host's UNetModel. Its group norms have 32 groups, so 32 channels would
be one a group, which forgets every channel's mean, and with it the colours. Unlike the full-size
upscaler's its timestep scales channels as well as shifting them: so small a network otherwise
cannot shut the noisy latent out where the small picture knows better."""

_HALF = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 512,
    "in_channels": 3,
    "out_ch": 3,
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
VAE = {
    "embed_dim": 4,
    "ddconfig": {**_HALF, "ch": 32, "ch_mult": [1, 2, 2]},
    "decoder_ddconfig": {**_HALF, "ch": 64, "ch_mult": [1, 1, 1], "num_res_blocks": 0},
}
"""Keyword arguments of the host's AutoencoderKL."""

SCALE_FACTOR = 0.08333
"""The host's latent format of x4 upscalers multiplies latents by this; the autoencoder's last
1 x 1 convolution divides by it, so that the UNet sees latents of unit variance."""

LATENT_RGB = [
    [0.2136, 0.2127, 0.2128],
    [0.1734, 0.0002, -0.1739],
    [0.0562, -0.1137, 0.0570],
    [-0.0056, -0.0010, -0.0006],
]
LATENT_RGB_BIAS = [0.2617, 0.1425, 0.1008]
"""The colour in -1..1 that a place's latent (as the diffusion model sees it) shows is latent x
factors + bias: what live previews are made by. `upscaler_preview.py` fits them."""

LINEAR_START, LINEAR_END, STEPS = 1e-4, 2e-2, 1000
"""Square roots of the noise variances run evenly between those of the first two."""

MAX_LEVEL = 350
"""Highest noise level of the small picture; the host's `noise_augmentation` 1.0."""

DELICATE = "out.2, output_blocks.7.*"
"""Layers that 8 and 4 bits leave in float: what the small picture says passes there as the
difference of two channels, and rounding either shifts its colours."""

SETTINGS = {
    "steps": 4, "cfg": 1.0, "sampler": "euler_ancestral", "scheduler": "karras", "noise_level": 0,
}  # fmt: skip
"""What suits the shipped weights. More steps draw more detail, and more of it wrong."""
