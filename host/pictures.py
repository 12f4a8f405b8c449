"""Pictures for prompts through the host's own text encoder, sampler and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How validation and class pictures are sampled.

    Attributes:
        width, height: in pixels.
        steps, cfg, sampler, scheduler: as in the host's KSampler.
        seed: of the first picture's noise; the next ones count on.
    """

    width: int
    height: int
    steps: int = 20
    cfg: float = 5.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"
    seed: int = 0


def sample_pictures(patcher, clip, vae, prompts: Sequence[str],
                    settings: SamplingSettings) -> torch.Tensor:
    """One picture a prompt: ``[n, H, W, 3]`` float32 in 0..1 on the CPU.

    Picture ``i`` starts from the noise of ``seed + i``, so it does not depend on the others. An
    interrupt of the host comes through as its own exception.
    """
    pictures = []
    with torch.inference_mode():
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        for index, prompt in enumerate(prompts):
            positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            latent = empty_latent(patcher, vae, settings.width, settings.height)
            seed = settings.seed + index
            noise = comfy.sample.prepare_noise(latent, seed)
            latent = comfy.sample.sample(
                patcher, noise, settings.steps, settings.cfg, settings.sampler,
                settings.scheduler, positive, negative, latent, seed=seed, disable_pbar=True)
            picture = vae.decode(latent)
            pictures.append(picture.reshape(-1, *picture.shape[-3:])[:1].float().cpu())
    return torch.cat(pictures)


def empty_latent(patcher, vae, width: int, height: int) -> torch.Tensor:
    """The zero latent of a picture size, in the shape the model expects."""
    ratio = vae.spacial_compression_encode()
    channels = patcher.get_model_object("latent_format").latent_channels
    latent = torch.zeros(1, channels, height // ratio, width // ratio)
    return comfy.sample.fix_empty_latent_channels(patcher, latent)
