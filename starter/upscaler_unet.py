"""The small upscaler's diffusion model: velocity prediction beside a noisy small picture.

As in Stable Diffusion's x4 upscaler (Rombach et al. 2022) the small picture is three more input
channels at the latents' size, and how much noise was laid on it (Ho et al. 2021, "Cascaded
Diffusion Models") is a class label. The velocity (Salimans & Ho 2022) is v = a e - s x for latents
x, noise e and a noisy latent a x + s e.

An error of v counts like one of x times SNR + 1, so the plain loss spends itself on the last,
almost noiseless timesteps. Here that factor stops at `MOST` (Hang et al. 2023, "Min-SNR", cut the
same end), and unlike with Min-SNR it never falls below one: at the noisy timesteps, too, the small
picture tells what to draw.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from . import parallel
from .common import SEED, Run
from .upscaler_config import LINEAR_END, LINEAR_START, MAX_LEVEL, STEPS, UNET
from .upscaler_data import Pictures, cut, places
from .upscaler_fold import UNET_SCALE, soften
from .upscaler_start import read_off, start

PLAN = ((0.8, 32, 12), (1.0, 64, 3))
"""(up to this random number, side of the squares in latents, squares a step)."""
MOST = 6.0
USUAL = 30
"""Half of the noise levels of the small picture are drawn up to this one, where errors also weigh
most: what heavier noise hides cannot be known, and would outweigh all that can."""
DROP = 0.1
"""Share of squares without their sentence."""
MADE = 0.35
"""Share whose small picture went through the starter's autoencoder."""


def signal_levels() -> torch.Tensor:
    """Cumulative alpha of the schedule, fp32 (1000,); the small picture's noise uses the same."""
    line = torch.linspace(LINEAR_START**0.5, LINEAR_END**0.5, STEPS, dtype=torch.float64)
    return (1 - line**2).cumprod(0).float()


class LevelEmbedding(torch.nn.Module):
    """What stands for the host's table of noise levels while training: a small network of the
    level, so that levels a short training never drew come out between those it did."""

    def __init__(self, width: int):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, width), torch.nn.SiLU(), torch.nn.Linear(width, width)
        )

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        """(batch, width) of integer levels (batch,); above `MAX_LEVEL` all are alike."""
        from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

        return self.net(timestep_embedding(level.clamp(max=MAX_LEVEL), 64))

    @torch.no_grad()
    def table(self) -> torch.Tensor:
        """The host's table: (UNET["num_classes"], width)."""
        return self(torch.arange(UNET["num_classes"]))


def build() -> torch.nn.Module:
    """The host's UNet as it is trained, with seeded weights: soft norms, zeroed branch ends."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

    from .stage_unet import draw_weights

    torch.manual_seed(SEED)
    model = UNetModel(**UNET, device="cpu", operations=comfy.ops.disable_weight_init)
    model.label_emb = LevelEmbedding(model.label_emb.embedding_dim)
    draw_weights(model)
    for module in model.modules():
        if isinstance(module, ResBlock):
            torch.nn.init.zeros_(module.emb_layers[-1].weight)
    torch.nn.init.zeros_(model.label_emb.net[-1].weight)
    torch.nn.init.zeros_(model.label_emb.net[-1].bias)
    return soften(model, UNET_SCALE).train()


def train(run: Run, pictures: Pictures, latents: np.ndarray, workers: int) -> torch.nn.Module:
    """Train within the run's budget; returns the UNet with averaged weights.

    latents: float16 (n, 4, WINDOW, WINDOW), one for each window.
    """
    import comfy.ldm.modules.attention

    from .stage_unet import attention

    unet, detail = build(), pictures.detail()
    start(unet, read_off(latents[:200], pictures.clean[:200]), signal_levels())
    unet.to(run.device)
    if run.device.type == "cpu":
        comfy.ldm.modules.attention.optimized_attention = attention
    signal = signal_levels().to(run.device)

    def noised(x, level, generator):
        """x with noise at an integer level each, and that noise."""
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        share = signal[level].view(-1, 1, 1, 1)
        return share.sqrt() * x + (1 - share).sqrt() * noise, noise

    def loss_of(share, ticket, generator):
        rng = np.random.default_rng((SEED, ticket))
        draw = rng.random()
        side, batch = next((s, b) for end, s, b in PLAN if draw <= end)
        index = rng.integers(len(detail), size=batch)
        y, x = places(detail, index, side, rng)
        clean, made = (cut(data, index, y, x, side) for data in (pictures.clean, pictures.made))
        use = torch.from_numpy(rng.random((batch, 1, 1, 1)) < MADE)
        small = torch.where(use, made, clean).to(run.device)
        any_level = rng.random(batch) ** 3 * (MAX_LEVEL + 1)
        usual = rng.random(batch) * (USUAL + 1)
        level = np.where(rng.random(batch) < 0.5, usual, any_level).astype(np.int64)
        level = torch.from_numpy(level).to(run.device)
        # As in the host, level 0 is no noise at all.
        small = torch.where(level.view(-1, 1, 1, 1) > 0, noised(small, level, generator)[0], small)
        x0 = np.stack([latents[i, :, a : a + side, b : b + side] for i, a, b in zip(index, y, x)])
        x0 = torch.from_numpy(x0).to(run.device, torch.float32)
        told = pictures.context[index, rng.integers(pictures.context.shape[1], size=batch)].copy()
        told[rng.random(batch) < DROP] = pictures.empty
        context = torch.from_numpy(told).to(run.device, torch.float32)
        spread = (torch.arange(batch) + torch.from_numpy(rng.random(batch))) / batch
        t = (spread * STEPS).long().clamp(max=STEPS - 1).to(run.device)
        xt, noise = noised(x0, t, generator)
        clear = signal[t]
        a, s = (part.sqrt().view(-1, 1, 1, 1) for part in (clear, 1 - clear))
        both = torch.cat([xt, small], 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(run.device.type, torch.bfloat16):
            out = unet(both, t.float(), context=context, y=level).float()
        error = (out - (a * noise - s * x0)).square().mean((1, 2, 3))
        counts = (MOST * (1 - clear)).clamp(max=1.0)  # SNR + 1 = 1 / (1 - clear)
        counts = counts * (1 - signal[USUAL]) / (1 - signal[USUAL] + 1 - signal[level])
        return (error * counts).mean(), {"v": error.mean(), "x": (error * (1 - clear)).mean()}

    parallel.train(run, [unet], loss_of, rate=3e-4, decay=1e-2, ema=0.998, workers=workers)
    return unet


def finished(work: Path) -> torch.nn.Module:
    """The UNet that the `unet` stage left in the work folder, as it was trained."""
    model = build()
    state = torch.load(Path(work) / "upscaler-unet.ckpt", weights_only=True, map_location="cpu")
    parallel.bind_average([model], state)
    return model.eval()


@torch.no_grad()
def for_the_host(model: torch.nn.Module) -> torch.nn.Module:
    """The trained UNet as the host computes it, in place: ordinary norms, a table of levels."""
    from .upscaler_fold import fold

    table = model.label_emb.table()
    model.label_emb = torch.nn.Embedding.from_pretrained(table)
    return fold(model, UNET_SCALE)
