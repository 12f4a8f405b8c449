"""What a MODEL is run on to calibrate or to teach: prompts, latents, a sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import comfy.sample
import comfy.samplers
import torch

from ..quant import QuantTuneError


class Samples:
    """What the model is run on: pictures denoised from noise, or given latents with noise.

    Zero latents are a size to generate at: each sample is a whole denoising, as the user will run
    it. Others are noised to timesteps that cover the schedule evenly, one forward each.

    Args:
        latent: the host's LATENT.
        positive: CONDITIONING; each entry is a prompt of its own, used in turn.
        negative: CONDITIONING, or empty.
        how: `calibrate.Calibration`: samples, steps, cfg, sampler, scheduler, seed.

    Raises:
        QuantTuneError: no prompt, no latent, or latents that are not finite.
    """

    def __init__(self, latent: dict, positive: Sequence, negative: Sequence, how):
        self.latent, self.how = latent["samples"], how
        if not len(positive):
            raise QuantTuneError("There is no prompt to calibrate with; write some, or connect "
                                 "'positive'.")
        if not self.latent.numel():
            raise QuantTuneError("There is no latent to calibrate with; connect 'Empty Latent "
                                 "Image', or the latents of pictures.")
        if not bool(torch.isfinite(self.latent).all()):
            raise QuantTuneError("The connected latents hold NaN or infinite values; check what "
                                 "makes them.")
        self.positive = [[entry] for entry in positive]
        self.negative = list(negative) or [[torch.zeros_like(positive[0][0]), positive[0][1]]]
        self.generates = not bool(torch.count_nonzero(self.latent))

    def __len__(self):
        return -(-self.how.samples // self.how.steps) if self.generates else self.how.samples

    def run(self, patcher, index: int, callback=None) -> None:
        """Run sample ``index``; the host's interrupt comes through as its own exception.

        ``callback`` is the host's: step, estimate of the clean latent, noisy latent, steps.
        """
        how, seed = self.how, self.how.seed + index
        positive = self.positive[index % len(self.positive)]
        if self.generates:
            latent = comfy.sample.fix_empty_latent_channels(patcher, self.latent)
            noise = comfy.sample.prepare_noise(latent, seed)
            comfy.sample.sample(patcher, noise, how.steps, how.cfg, how.sampler, how.scheduler,
                                positive, self.negative, latent, seed=seed, disable_pbar=True,
                                callback=callback)
            return
        latent = self.latent[index % len(self.latent)][None]
        noise = comfy.sample.prepare_noise(latent, seed)
        sampling = patcher.get_model_object("model_sampling")
        share = (index + 0.5) / len(self)
        sigma = float(sampling.percent_to_sigma(1 - share))
        comfy.sample.sample_custom(
            patcher, noise, how.cfg, comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]), positive, self.negative, latent, seed=seed,
            disable_pbar=True, callback=callback)

    @property
    def forwards(self) -> int:
        """Of the model in one sample, guidance counted once."""
        return self.how.steps if self.generates else 1

    def key(self) -> list:
        """What a state has to agree with."""
        digest = hashlib.sha256(self.latent.contiguous().float().cpu().numpy().tobytes())
        for entries in (*self.positive, self.negative):
            for entry in entries:
                digest.update(entry[0].float().cpu().numpy().tobytes())
        return [digest.hexdigest(), list(self.latent.shape)]


def conditioning_of(clip, prompts: str, positive, negative) -> tuple[list, list]:
    """CONDITIONING of the lines of ``prompts`` and of what is connected, and the negative one.

    Raises QuantTuneError for lines without a CLIP to read them.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if lines and clip is None:
        raise QuantTuneError("The prompts need a CLIP to read them; connect the one of your model, "
                             "or clear them and connect 'positive'.")

    def read(line):
        return clip.encode_from_tokens_scheduled(clip.tokenize(line))

    found = [entry for line in lines for entry in read(line)] + list(positive or [])
    return found, list(negative or (read("") if clip is not None else []))
