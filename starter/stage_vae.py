"""Stage 2: the picture autoencoder, in the shape of the host's TAESD, and the latents.

Tiny AutoEncoder for Stable Diffusion: Bohan, github.com/madebyollin/taesd. Trained here from
scratch on the starter's own pictures: L1 + L2 + image gradients, a penalty that keeps every latent
channel at mean 0 and variance 1 (what the diffusion model wants), and noise on the latents, so
that neighbouring latents decode alike.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from . import parallel
from .common import SEED, Run
from .generator import clutter
from .shipped import restore_vae

PLAN = ((0.5, 32, 32), (1.0, 64, 12))
"""(until this share of the budget, crop side in pixels, batch)."""
CLUTTERED = 1500
"""Pictures of several overlapping objects, so that finer things than the captions' survive too."""
LATENT_SCALE = 0.18215
"""The host's SD1.5 latent format multiplies by this; the VAE's `vae_scale` undoes it."""


COLOUR_AXES = ((1.7, 1.7, 1.7), (2.9, 0.0, -2.9), (1.9, -3.8, 1.9))
"""Rows: lightness, red minus blue, magenta minus green, scaled to about unit variance."""


def build() -> torch.nn.Module:
    """A TAESD of the host whose random start already passes 8x8 mean colours through.

    Channels 0..2 of the encoder carry the colours down by 2x2 means to the first three latents;
    channels 0..5 of the decoder carry their positive and negative parts up. All else is random.
    """
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(SEED)
    model = TAESD(latent_channels=4).requires_grad_(True)
    for half, kept in ((model.taesd_encoder, 3), (model.taesd_decoder, 6)):
        for name, module in half.named_modules():
            if not isinstance(module, torch.nn.Conv2d):
                continue
            weight = module.weight.data
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
            if name.endswith("conv.4"):
                weight.mul_(0.1)[:kept] = 0
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
                continue
            weight.mul_(0.5)[:kept] = 0
            for c in range(kept):
                if module.stride[0] == 2:
                    weight[c, c, 1:, 1:] = 0.25
                else:
                    blur = torch.tensor([0.25, 0.5, 0.25])
                    weight[c, c] = blur[:, None] * blur
    axes = torch.tensor(COLOUR_AXES)
    back = torch.linalg.inv(axes)
    first, last = model.taesd_encoder[0], model.taesd_encoder[-1]
    first.weight.data[:3] = 0
    last.weight.data[:3] = 0
    last.weight.data[3].mul_(0.5)
    last.bias.data[:3] = -0.55 * axes.sum(1)
    for c in range(3):
        first.weight.data[c, c, 1, 1] = 1
        last.weight.data[:3, c, 1, 1] = axes[:, c]
    first, last = model.taesd_decoder[1], model.taesd_decoder[-1]
    first.weight.data[:6] = 0
    first.weight.data[:3, :3, 1, 1] = back
    first.weight.data[3:6, :3, 1, 1] = -back
    last.weight.data.mul_(0.03)
    last.bias.data.fill_(0.55)
    for c in range(3):
        last.weight.data[c, [c, c + 3]] = 0
        last.weight.data[c, c, 1, 1], last.weight.data[c, c + 3, 1, 1] = 1, -1
    model.vae_scale.data.fill_(LATENT_SCALE)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    return model


def crops(data: np.ndarray, rng: np.random.Generator, size: int, batch: int) -> torch.Tensor:
    """Random crops as float (batch, 3, size, size) in 0..1, on the 8-pixel grid."""
    steps = (data.shape[1] - size) // 8 + 1
    out = np.empty((batch, size, size, 3), np.uint8)
    for i in range(batch):
        y, x = rng.integers(0, steps, 2) * 8
        out[i] = data[int(rng.integers(len(data))), y : y + size, x : x + size]
    return torch.from_numpy(out).permute(0, 3, 1, 2).float().div_(255)


def picture_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 4 L2 + L1 of horizontal and vertical differences."""
    error = out - target
    loss = error.abs().mean() + 4 * error.square().mean()
    for axis in (2, 3):
        loss = loss + torch.diff(error, dim=axis).abs().mean()
    return loss


def latent_loss(z: torch.Tensor) -> torch.Tensor:
    """How far each channel is from mean 0 and variance 1."""
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
    return mean.square().mean() + (var - 1).square().mean() + 0.1 * z.abs().sub(3).relu().mean()


def train(
    run: Run,
    data: np.ndarray,
    workers: int,
    start: torch.nn.Module | None = None,
    frozen_encoder: bool = False,
) -> torch.nn.Module:
    """Train within the run's budget; returns the model with averaged weights.

    start: the model to go on with, else a random one. frozen_encoder: only the decoder learns, so
    that latents made with this encoder stay true.
    """
    model = (start or build()).to(run.device)
    model.taesd_encoder.requires_grad_(not frozen_encoder)
    busy = np.stack([clutter(SEED + i) for i in range(CLUTTERED)])

    def loss_of(share, ticket, generator):
        rng = np.random.default_rng((SEED, ticket))
        source = busy if rng.random() < 0.3 else data
        crop, batch = PLAN[-1][1:]
        if not frozen_encoder:
            crop, batch = next((c, b) for end, c, b in PLAN if share <= end)
        x = crops(source, rng, crop, batch).to(run.device, memory_format=torch.channels_last)
        with torch.autocast(run.device.type, torch.bfloat16):
            z = model.taesd_encoder(x).float()
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            out = model.taesd_decoder(z + 0.06 * noise).float()
        fit = picture_loss(out, x)
        psnr = -10 * torch.log10((out.detach().clamp(0, 1) - x).square().mean())
        loss = fit if frozen_encoder else fit + 0.1 * latent_loss(z)
        return loss, {"fit": fit, "psnr": psnr, "std": z.std()}

    parallel.train(run, [model], loss_of, rate=5e-4, decay=1e-4, ema=0.995, workers=workers)
    return model


def finished(work: Path) -> torch.nn.Module:
    """The autoencoder that the `vae` stage left in the work folder, else the shipped one."""
    model = build()
    path = Path(work) / "vae.ckpt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        parallel.bind_average([model], state)
    else:
        restore_vae(model)
    return model


@torch.inference_mode()
def encode(
    model: torch.nn.Module, data: np.ndarray, out: np.ndarray, device: torch.device, rows: range
) -> None:
    """Write the latents of some rows of `data` to the same rows of `out`."""
    for i in range(rows.start, rows.stop, 32):
        end = min(i + 32, rows.stop)
        x = torch.from_numpy(data[i:end]).to(device).permute(0, 3, 1, 2).float().div_(255)
        with torch.autocast(device.type, torch.bfloat16):
            z = model.taesd_encoder(x.contiguous(memory_format=torch.channels_last))
        out[i:end] = z.float().cpu().numpy()


def latents(
    work: Path, data: np.ndarray, model: torch.nn.Module, device: torch.device, workers: int
) -> np.ndarray:
    """Encode every picture: float16 (n, 4, 16, 16), mean about 0 and variance about 1."""
    path = Path(work) / f"latents-{len(data)}.npy"
    if path.exists():
        return np.load(path)
    part = path.with_suffix(".part")
    shape = (len(data), 4, data.shape[1] // 8, data.shape[2] // 8)
    out = np.lib.format.open_memmap(part, "w+", np.float16, shape)
    bounds = np.linspace(0, len(data), (workers if device.type == "cpu" else 1) + 1).astype(int)
    ranges = [range(int(a), int(b)) for a, b in zip(bounds, bounds[1:])]
    fork = mp.get_context("fork")
    helpers = [fork.Process(target=encode, args=(model, data, out, device, r)) for r in ranges[1:]]
    for helper in helpers:
        helper.start()
    encode(model, data, out, device, ranges[0])
    for helper in helpers:
        helper.join()
        if helper.exitcode:
            raise RuntimeError("a worker stopped while encoding; run the stage again")
    out.flush()
    os.replace(part, path)
    return np.load(path)
