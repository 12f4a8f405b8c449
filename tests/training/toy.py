"""A denoiser of two quantized layers and a few examples, for tests of the trainer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quanttune.quant import conv2d, linear, scale_shape
from quanttune.tests.quant.reference import random_weight
from quanttune.training.config import ScaleTraining
from quanttune.training.data import TrainingSet
from quanttune.training.trainer import ScaleTrainer


class ToyDenoiser:
    """``x / (1 + sigma^2)`` corrected by a convolution and a projected condition."""

    kind, num_timesteps, sigma_data, fingerprint = "eps", 1000, 1.0, "toy"
    device = torch.device("cpu")

    def __init__(self, seed=0):
        self.weights = {"conv": random_weight((4, 4, 3, 3), seed=seed),
                        "cond": random_weight((4, 6), seed=seed + 1)}
        self.shapes = {n: scale_shape(w.shape) for n, w in self.weights.items()}
        self.base_scales = {n: w.scale for n, w in self.weights.items()}
        self.seen = []

    def sigma(self, timesteps):
        return 0.1 + 3 * timesteps / 1000

    def routed(self, timesteps):
        return timesteps.double() / 1000

    def noised(self, clean, noise, sigma):
        return clean + sigma.view(-1, 1, 1, 1) * noise

    def denoise(self, noised, sigma, conditions, scales, checkpointing=False):
        self.seen.append((len(noised), {n: s.rows for n, s in scales.items()}))
        s = sigma.view(-1, 1, 1, 1)
        x = noised / (1 + s**2).sqrt()
        hidden = conv2d(x, self.weights["conv"], scales=scales["conv"], padding=1)
        shift = linear(conditions["c_crossattn"].mean(1), self.weights["cond"],
                       scales=scales["cond"])
        # What the scales should be depends on the timestep, as in a real model.
        gain = 1.5 * torch.cos(s)
        out = torch.tanh(gain * (0.2 * hidden + 0.1 * shift[:, :, None, None]))
        return noised / (1 + s**2) + s / (1 + s**2).sqrt() * out


def toy_set(count=5, prior=0, sizes=((8, 8),), seed=0):
    """``count`` examples and ``prior`` class examples, of the sizes in turn."""
    generator = torch.Generator().manual_seed(seed)
    total = count + prior
    latents = [torch.randn(4, *sizes[i % len(sizes)], generator=generator) for i in range(total)]
    conditions = [{"c_crossattn": torch.randn(1, 3, 6, generator=generator)}
                  for _ in range(total)]
    return TrainingSet(
        latents=tuple(latents), conditions=tuple(conditions),
        prior=tuple(i >= count for i in range(total)),
        captions=tuple(f"caption {i}" for i in range(total)), fingerprint=f"toy-{total}-{seed}")


def settings(**changes):
    """Quick settings that move the scales well."""
    return ScaleTraining(**{"steps": 24, "batch_size": 2, "learning_rate": 2e-2,
                            "warmup_steps": 2, "save_every": 5, "num_experts": 4,
                            "shared_share": 0.25, **changes})


def trainer(folder, denoiser=None, data=None, **changes):
    """A trainer of the toy in ``folder``."""
    data = data or toy_set()
    return ScaleTrainer(denoiser or ToyDenoiser(), data, settings(**changes), folder,
                        empty=empty_of(data))


def empty_of(data):
    """Conditions of an empty caption for each shape of the examples."""
    return {tuple(latent.shape): {"c_crossattn": torch.zeros(1, 3, 6)} for latent in data.latents}


def same_sets(a, b):
    """Whether two scale sets hold the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def evaluate(scale_set, seed=5):
    """Mean loss of the toy with a scale set over fixed draws, to compare trainings by."""
    denoiser, data = ToyDenoiser(), toy_set()
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    with torch.no_grad():
        for t in torch.linspace(5, 995, 40):
            clean, conditions = data.batch(range(5))
            noise = torch.randn(clean.shape, generator=generator)
            sigma = denoiser.sigma(t.expand(5))
            scales = scale_set.expert(int(scale_set.expert_index(float(t))))
            out = denoiser.denoise(denoiser.noised(clean, noise, sigma), sigma, conditions, scales)
            total += float(F.mse_loss(out, clean) / sigma[0] ** 2)
    return total / 40
