"""Stage 5: train the picture classifier, with blur and noise so that it can read generated ones."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import parallel
from .classifier import ATTRIBUTES, Classifier
from .common import SEED, Run
from .generator import Scene, render, sample

BATCH = 64
TEST_FIRST = 10**9
"""Seeds from here on are never trained on."""


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class numbers per attribute."""
    return {
        name: torch.tensor([values.index(getattr(s, name)) for s in scenes])
        for name, values in ATTRIBUTES.items()
    }


def roughen(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur half of the batches a little, shift the colours slightly, add noise."""
    if rng.random() < 0.5:
        small = int(rng.choice([64, 80, 96]))
        x = F.interpolate(x, size=small, mode="area")
        x = F.interpolate(x, size=128, mode="bilinear")
    n = len(x)
    gain = torch.from_numpy(rng.uniform(0.95, 1.05, (n, 3, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)) * rng.uniform(0, 0.03)
    return (x * gain + noise).clamp(0, 1)


def build() -> Classifier:
    """A classifier with seeded random weights."""
    torch.manual_seed(SEED)
    return Classifier()


def train(run: Run, workers: int) -> Classifier:
    """Train within the run's budget, every step on fresh pictures."""
    model = build()
    pool = [sample(SEED + i, held=None) for i in range(6000)]
    pictures = np.stack([render(s) for s in pool])

    def loss_of(share, ticket, generator):
        rng = np.random.default_rng((SEED, ticket))
        index = rng.integers(len(pool), size=BATCH)
        x = torch.from_numpy(pictures[index]).permute(0, 3, 1, 2).float().div_(255)
        x = roughen(x, rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast(run.device.type, torch.bfloat16):
            out = model(x.to(run.device))
        truth = labels([pool[int(i)] for i in index])
        loss = sum(F.cross_entropy(out[k].float(), truth[k].to(run.device)) for k in out)
        right = (out["shape"].argmax(1).cpu() == truth["shape"]).float().mean()
        return loss, {"loss": loss, "shape": right}

    parallel.train(run, [model], loss_of, rate=2e-3, decay=1e-2, ema=0.99, workers=workers)
    calibrate(model, pictures[:1024])
    return model


@torch.no_grad()
def calibrate(model: Classifier, pictures: np.ndarray) -> None:
    """Set the batch norms' running statistics to those of the averaged weights."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for i in range(0, len(pictures), 128):
        model(torch.from_numpy(pictures[i : i + 128]).permute(0, 3, 1, 2).float().div_(255))
    model.eval()


def accuracy(model: Classifier, count: int = 1000) -> dict[str, float]:
    """Share of right answers per attribute on pictures with seeds never trained on."""
    scenes = [sample(TEST_FIRST + i, held=None) for i in range(count)]
    right = dict.fromkeys(ATTRIBUTES, 0)
    for start in range(0, count, 100):
        part = scenes[start : start + 100]
        said = model.read(np.stack([render(s) for s in part]))
        for scene, answer in zip(part, said):
            for name in ATTRIBUTES:
                right[name] += answer[name] == getattr(scene, name)
    return {name: value / count for name, value in right.items()}
