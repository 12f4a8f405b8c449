"""Stage 4: the diffusion model and its text encoder, trained together on the latents.

Noise prediction on SD1.5's schedule (Ho et al. 2020; Rombach et al. 2022), captions dropped for
classifier-free guidance (Ho & Salimans 2022).
Each timestep's error is weighted by min(SNR^-1/2, 5): between the plain noise loss and the
velocity loss (Hang et al. 2023 discuss the family). Plain noise loss, or min-SNR, gives the noisy
timesteps, where the words decide shape, colour and background, almost no say. The schedule leaves
a little of the picture in its last step (Lin et al. 2023), enough to read a flat background's
colour from; offset noise and a heavier loss on the mean and the coarse blocks of the prediction
make the model take the colours from the words instead.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import parallel, stage_text
from .captions import describe
from .common import SEED, Run
from .config import UNET
from .fast_norm import install
from .shipped import restore_unet
from .stage_data import scene_of
from .text import TextEncoder, Vocabulary

BATCH = 48
DROP = 0.1
UNKNOWN = 0.1
NOISE_OFFSET = 0.1
"""Standard deviation of the constant added to each channel of the noise."""
RATE = 6e-4
"""Peak learning rate."""
STEPS = 1000


def signal_levels() -> torch.Tensor:
    """Cumulative alpha of SD1.5's schedule, fp32 (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def attention(q, k, v, heads, mask=None, **_):
    """Attention of small heads by two batched products; (n, tokens, heads * d) in and out."""
    n, _, width = q.shape
    q, k, v = (t.view(n, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).reshape(n, -1, width)


def draw_weights(model: torch.nn.Module) -> None:
    """Random weights for a host's UNet, the ends of its residual branches at zero."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResBlock):
            torch.nn.init.zeros_(module.out_layers[-1].weight)
        elif type(module).__name__ == "SpatialTransformer":
            torch.nn.init.zeros_(module.proj_out.weight)
    torch.nn.init.zeros_(model.out[-1].weight)


def build_unet() -> torch.nn.Module:
    """The host's UNet with the usual initialisation: zeroed ends of residual branches."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(SEED)
    model = UNetModel(**UNET, device="cpu", operations=comfy.ops.disable_weight_init)
    draw_weights(model)
    return model.train()


def train(
    run: Run, pictures: int, workers: int, shipped: bool = False
) -> tuple[torch.nn.Module, TextEncoder]:
    """Train within the run's budget; returns the UNet and text encoder with averaged weights.

    shipped: start from the shipped files instead of random weights. The text encoder of the stage
    before comes first wherever that has run.
    """
    import comfy.ldm.modules.attention

    latents = torch.from_numpy(np.load(run.work / f"latents-{pictures}.npy"))
    scenes = [scene_of(i) for i in range(pictures)]
    unet, vocabulary = build_unet().to(run.device), Vocabulary()
    text = TextEncoder(len(vocabulary.ids)).to(run.device)
    if shipped:
        restore_unet(unet, text)
    taught = stage_text.finished(run)
    if taught is not None:
        text.load_state_dict(taught.state_dict())
    if run.device.type == "cpu":
        comfy.ldm.modules.attention.optimized_attention = attention
        install(unet)
    levels = signal_levels().to(run.device)
    empty = vocabulary.encode("")

    def rows_of(index: int, rng: np.random.Generator) -> list[int]:
        if rng.random() < DROP:
            return empty
        strange = int(rng.integers(8)) if rng.random() < UNKNOWN else None
        return vocabulary.encode(describe(scenes[index], int(rng.integers(2**31))), strange)

    def loss_of(share, ticket, generator):
        rng = np.random.default_rng((SEED, ticket))
        index = rng.integers(len(latents), size=BATCH)
        rows = torch.tensor([rows_of(int(i), rng) for i in index], device=run.device)
        x0 = latents[index].to(run.device, torch.float32)
        noise = torch.randn(x0.shape, generator=generator, device=run.device)
        shift = torch.randn((BATCH, x0.shape[1], 1, 1), generator=generator, device=run.device)
        noise = noise + NOISE_OFFSET * shift
        spread = (torch.arange(BATCH) + torch.from_numpy(rng.random(BATCH))) / BATCH
        t = (spread * STEPS).long().clamp(max=STEPS - 1).to(run.device)
        level = levels[t].view(-1, 1, 1, 1)
        x = (level.sqrt() * x0 + (1 - level).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(run.device.type, torch.bfloat16):
            out = unet(x, t.float(), context=text(rows)).float()
        difference = out - noise
        error = difference.square().mean((1, 2, 3))
        coarse = F.avg_pool2d(difference, 4)
        low = coarse.square() + 4 * coarse.mean((2, 3), keepdim=True).square()
        snr = level.flatten() / (1 - level.flatten())
        loss = ((error + low.mean((1, 2, 3))) * snr.rsqrt().clamp(max=5.0)).mean()
        return loss, {"loss": loss, "mse": error.mean()}

    parallel.train(run, [unet, text], loss_of, rate=RATE, decay=1e-2, ema=0.998, workers=workers)
    return unet, text
