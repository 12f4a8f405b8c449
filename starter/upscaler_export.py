"""The small upscaler's file: fp16 safetensors under the names of the host's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import upscaler_unet, upscaler_vae
from .stage_export import write
from .upscaler_config import FILE, SCALE_FACTOR, UNET, VAE
from .upscaler_data import Pictures

TOLERANCE = 2e-3
"""How far the host's form may be from the trained one, in units of the output's spread."""


def state_of(work: Path, pictures: Pictures) -> dict[str, torch.Tensor]:
    """UNet and autoencoder of a work folder as one state dict.

    Raises RuntimeError when either computes something else in the host's form.
    """
    vae, unet = upscaler_vae.finished(work), upscaler_unet.finished(work)
    encoded = upscaler_vae.latents(work, pictures, vae)
    mean, std = encoded["mean"], encoded["std"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, 4, 16, 16), generator=generator)
    small = torch.rand((2, 3, 16, 16), generator=generator)
    rest = {
        "timesteps": torch.tensor([40.0, 700.0]),
        "y": torch.tensor([0, 200]),
        "context": torch.randn((2, 32, UNET["context_dim"]), generator=generator),
    }
    with torch.inference_mode():
        shift, scale = (torch.from_numpy(v).view(-1, 1, 1) for v in (mean, std))
        decoded = vae.decoder(noise * scale + shift)
        predicted = unet(torch.cat([noise, small], 1), **rest)
    upscaler_vae.for_the_host(vae, mean, std)
    upscaler_unet.for_the_host(unet)
    with torch.inference_mode():
        pairs = {
            "autoencoder": (decoded, vae.decode(noise / SCALE_FACTOR)),
            "diffusion model": (predicted, unet(torch.cat([noise, small], 1), **rest)),
        }
    for name, (wanted, got) in pairs.items():
        far = float((wanted - got).abs().max() / wanted.std())
        if far > TOLERANCE:
            raise RuntimeError(f"in the host's form the {name} differs by {far:.3g}")
    state = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    return state | {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}


def export(work: Path, pictures: Pictures, path: Path = FILE) -> None:
    """Write the file from the stages' averaged weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(
        state_of(work, pictures),
        path,
        unet_config=json.dumps(UNET),
        vae_config=json.dumps(VAE),
        scale_factor=str(SCALE_FACTOR),
    )
