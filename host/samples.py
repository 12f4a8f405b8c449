"""What a MODEL is run on to calibrate or to teach: prompts, latents, a sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import comfy.sample
import comfy.samplers
import torch

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from .explain import explained


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
        QuantTuneError: no prompt, no latent, latents that are not finite, or an unknown sampler
            or scheduler.
    """

    def __init__(self, latent: dict, positive: Sequence, negative: Sequence, how):
        self.latent, self.how = latent["samples"], how
        if not len(positive):
            raise QuantTuneError("There is no prompt to calibrate with; write some, or connect "
                                 "'positive'.")
        if not self.latent.numel():
            raise QuantTuneError("There is no latent to calibrate with; connect 'Empty Latent "
                                 "Image', or the latents of pictures.")
        if not is_finite(self.latent):
            raise QuantTuneError("The connected latents hold NaN or infinite values; check what "
                                 "makes them.")
        if how.sampler not in comfy.samplers.KSampler.SAMPLERS:
            raise QuantTuneError(f"There is no sampler '{how.sampler}'; choose one of the "
                                 "KSampler's.")
        if how.scheduler not in comfy.samplers.KSampler.SCHEDULERS:
            raise QuantTuneError(f"There is no scheduler '{how.scheduler}'; choose one of the "
                                 "KSampler's.")
        if self.latent.dim() < 4:
            raise QuantTuneError(f"The latents have shape {list(self.latent.shape)}; connect "
                                 "'Empty Latent Image' or 'VAE Encode'.")
        self.positive = [[entry] for entry in positive]
        self.negative = list(negative) or [[torch.zeros_like(positive[0][0]), positive[0][1]]]
        self.generates = not bool(torch.count_nonzero(self.latent))

    def __len__(self):
        return -(-self.how.samples // self.how.steps) if self.generates else self.how.samples

    def run(self, patcher, index: int, callback=None) -> torch.Tensor:
        """Run sample ``index`` and return its latents; the host's interrupt comes through as its
        own exception.

        ``callback`` is the host's: step, estimate of the clean latent, noisy latent, steps. Raises
        QuantTuneError when latents or conditioning do not fit the model.
        """
        with explained(f"The model cannot run on these latents of shape {list(self.latent.shape)} "
                       "and this conditioning ({reason}); connect what was made for this model."):
            return self._run(patcher, index, callback)

    def _run(self, patcher, index: int, callback) -> torch.Tensor:
        how, seed = self.how, self.how.seed + index
        positive = self.positive[index % len(self.positive)]
        if self.generates:
            latent = comfy.sample.fix_empty_latent_channels(patcher, self.latent)
            noise = comfy.sample.prepare_noise(latent, seed)
            return comfy.sample.sample(
                patcher, noise, how.steps, how.cfg, how.sampler, how.scheduler, positive,
                self.negative, latent, seed=seed, disable_pbar=True, callback=callback)
        latent = self.latent[index % len(self.latent)][None]
        noise = comfy.sample.prepare_noise(latent, seed)
        sampling = patcher.get_model_object("model_sampling")
        share = (index + 0.5) / len(self)
        sigma = float(sampling.percent_to_sigma(1 - share))
        return comfy.sample.sample_custom(
            patcher, noise, how.cfg, comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]), positive, self.negative, latent, seed=seed,
            disable_pbar=True, callback=callback)

    def picture(self, index: int) -> int:
        """What sample ``index`` is of: samples of one given latent are of one picture."""
        return index if self.generates else index % len(self.latent)

    @property
    def forwards(self) -> int:
        """Of the model in one sample, guidance counted once."""
        return self.how.steps if self.generates else 1

    @property
    def unused(self) -> str:
        """A sentence if the turn of some prompts does not come, else nothing."""
        prompts = len(self.positive)
        if prompts <= len(self):
            return ""
        return (f"Only {len(self)} of {prompts} prompts were used; samples = "
                f"{prompts * self.forwards} would use all ({self.forwards} steps a picture).")

    def key(self) -> list:
        """What a state has to agree with."""
        return [digest_of([self.latent, self.positive, self.negative]), list(self.latent.shape)]


def digest_of(value) -> str:
    """Of everything in nested sequences and mappings, the values of tensors included."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest, value) -> None:
    """Add everything in nested sequences and mappings to a digest."""
    if isinstance(value, torch.Tensor):
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(repr(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _update(digest, entry)
    else:
        # Of a ControlNet and the like its place in memory: another one is another key.
        digest.update(repr(value).encode())


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
