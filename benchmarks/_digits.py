"""A diffusion model of handwritten digits, quantized, for the ablation: model, pictures, judge.

The pictures are scikit-learn's 1,797 digits of 8 x 8 pixels (UCI "Optical Recognition of
Handwritten Digits"); the model is the DDPM UNet at 32 channels; the judge is a small network
trained to tell the ten digits apart, whose features and classes stand in for Inception's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.benchmarks._ddpm_unet import DDPMUNet
from quanttune.quant import (
    LayerScales,
    QuantizedWeight,
    QuantSpec,
    ScaleSet,
    conv2d,
    fingerprint,
    linear,
    quantizable_layers,
    scale_shapes,
    shortcut_splits,
)
from quanttune.training.data import TrainingSet

SMALL = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,),
         "image_channels": 1}
TIMESTEPS = 1000
JUDGE_STEPS = 1500


def digits() -> tuple[Tensor, Tensor]:
    """Pictures ``[1797, 1, 8, 8]`` float32 in -1..1, and the digit of each."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (torch.from_numpy(found.images).float()[:, None] / 8 - 1,
            torch.from_numpy(found.target).long())


def noise_levels() -> Tensor:
    """Sigma of each timestep of DDPM's linear schedule, ``[1000]``, x being clean + sigma noise."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64), 0)
    return ((1 - kept) / kept).sqrt().float()


class DigitsDenoiser:
    """`training.trainer.Denoiser` over the UNet, float or quantized."""

    kind, num_timesteps, sigma_data = "eps", TIMESTEPS, 1.0
    device = torch.device("cpu")

    def __init__(self, unet: DDPMUNet, bits: int | None = None):
        """Quantize a copy of the UNet's weights in place of its layers; None leaves it float."""
        self.unet, self.sigmas = unet, noise_levels()
        self.layers = quantizable_layers(unet)
        self.weights: dict[str, QuantizedWeight] = {}
        splits = shortcut_splits({n: tuple(m.weight.shape) for n, m in self.layers.items()})
        self.shapes = scale_shapes(unet, splits)
        if bits is not None:
            for name, layer in self.layers.items():
                packed = QuantizedWeight.quantize(layer.weight, QuantSpec(bits), splits.get(name))
                self.weights[name] = packed
                _run_quantized(layer, packed)
            unet.requires_grad_(False)
        self.base_scales = {n: w.scale for n, w in self.weights.items()}
        self.fingerprint = fingerprint(self.weights)

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise levels of timesteps."""
        return self.sigmas[timesteps.long()]

    def routed(self, timesteps: Tensor) -> Tensor:
        """Shares of T."""
        return timesteps.double() / self.num_timesteps

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """``clean + sigma * noise``."""
        return clean + sigma.view(-1, 1, 1, 1) * noise

    def denoise(self, noised, sigma, conditions, scales, checkpointing=False) -> Tensor:
        """Estimate of the clean pictures."""
        for name, layer in self.layers.items():
            layer.active_scales = scales.get(name)
        width = sigma.view(-1, 1, 1, 1)
        timesteps = torch.searchsorted(self.sigmas, sigma * (1 - 1e-6))
        return noised - width * self.unet(noised / (1 + width**2).sqrt(), timesteps)


def _run_quantized(layer: nn.Module, packed: QuantizedWeight) -> None:
    layer.active_scales = None
    if isinstance(layer, nn.Linear):
        layer.forward = lambda x: linear(x, packed, layer.bias, layer.active_scales)
    else:
        layer.forward = lambda x: conv2d(x, packed, layer.bias, layer.stride, layer.padding,
                                         layer.dilation, layer.groups, layer.active_scales)


def training_set() -> TrainingSet:
    """The digits as the trainer takes them."""
    pictures, _ = digits()
    return TrainingSet(tuple(pictures), ({},) * len(pictures), (False,) * len(pictures),
                       ("",) * len(pictures), "digits")


def blended_experts(scale_set: ScaleSet, timestep: float) -> dict[str, LayerScales]:
    """Scales between the two experts whose intervals' middles enclose a timestep."""
    place = timestep * scale_set.num_experts / scale_set.num_timesteps - 0.5
    low = min(max(math.floor(place), 0), scale_set.num_experts - 1)
    high = min(low + 1, scale_set.num_experts - 1)
    share = min(max(place - low, 0.0), 1.0)
    first, second = scale_set.expert(low), scale_set.expert(high)
    return {name: LayerScales(a.r_out.lerp(second[name].r_out, share),
                              None if a.s_in is None else a.s_in.lerp(second[name].s_in, share))
            for name, a in first.items()}


def sample(denoiser: DigitsDenoiser, scale_set: ScaleSet | None, count: int, seed: int,
           steps: int = 50, blended: bool = False) -> Tensor:
    """``count`` pictures by DDIM (eta = 0), ``[count, 1, 8, 8]`` in -1..1.

    scale_set: of the experts, or None for the model as it is.
    blended: mix neighbouring experts instead of switching at the border of their intervals.
    """
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    stops = torch.linspace(TIMESTEPS - 1, 0, steps).round().long().tolist()
    x = x * denoiser.sigmas[stops[0]]
    with torch.no_grad():
        for t, after in zip(stops, [*stops[1:], None]):
            scales = {}
            if scale_set is not None:
                scales = blended_experts(scale_set, t) if blended else scale_set.expert(
                    int(scale_set.expert_index(t)))
            sigma = denoiser.sigmas[t]
            clean = denoiser.denoise(x, sigma.expand(count), {}, scales)
            following = 0.0 if after is None else denoiser.sigmas[after]
            x = clean + (x - clean) * (following / sigma)
    return x.clamp(-1, 1)


class Judge(nn.Module):
    """Tells digits apart; ``forward`` gives features ``[B, 64]`` of pictures in -1..1."""

    num_features = 64
    """Asked for by torchmetrics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(1024, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features."""
        return self.body(pictures)


def trained_judge(path: Path) -> tuple[Judge, float]:
    """The judge and its share of right answers on the last 360 digits, which it never saw."""
    pictures, labels = digits()
    judge = Judge()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
    else:
        torch.manual_seed(0)
        judge = Judge()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(JUDGE_STEPS):
            chosen = torch.randint(0, 1437, (128,), generator=generator)
            noisy = pictures[chosen] + 0.1 * torch.randn(128, 1, 8, 8, generator=generator)
            loss = F.cross_entropy(judge.head(judge(noisy)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save(judge.state_dict(), path)
    judge.eval().requires_grad_(False)
    right = (judge.head(judge(pictures[1437:])).argmax(1) == labels[1437:]).float().mean()
    return judge, float(right)


def trained_unet(path: Path, steps: int) -> DDPMUNet:
    """The float UNet after ``steps`` steps of 128 digits; trained once and kept in ``path``."""
    torch.manual_seed(0)
    unet = DDPMUNet(**SMALL)
    if path.exists():
        unet.load_state_dict(torch.load(path, weights_only=True))
        return unet
    denoiser, (pictures, _) = DigitsDenoiser(unet), digits()
    average = {k: v.clone() for k, v in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        clean = pictures[torch.randint(0, len(pictures), (128,))]
        loss = noise_loss(denoiser, clean, torch.randint(0, TIMESTEPS, (128,)),
                          torch.randn_like(clean))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, value in unet.state_dict().items():
                average[name].lerp_(value, 1 - min(0.995, (step + 1) / (step + 10)))
        if step % 500 == 0:
            print(f"UNet of digits: step {step} of {steps}, loss {float(loss.detach()):.4f}",
                  flush=True)
    unet.load_state_dict(average)
    torch.save(average, path)
    return unet


def noise_loss(denoiser, clean: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14)."""
    sigma = denoiser.sigma(timesteps)
    out = denoiser.denoise(denoiser.noised(clean, noise, sigma), sigma, {}, {})
    return ((out - clean) / sigma.view(-1, 1, 1, 1)).square().mean()
