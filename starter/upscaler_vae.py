"""The small upscaler's autoencoder: the host's AutoencoderKL with a quarter of the picture's side.

Three of its four latents are the colours of 4 x 4 means, what the small picture shows, and the
fourth is a little detail: it starts so, with a decoder that blurs the means up, and the loss keeps
it so. Were they free to hold what they like, the diffusion model would have to work out from the
small picture what stands in them. What sharp edges look like, the decoder knows.

Loss: that of the starter's autoencoder (`stage_vae`), the squared distance of the first three
latents from the means' colours, and the fourth's size. Noise on the latents makes the decoder
forgive the diffusion model's errors.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import parallel
from .common import SEED, Run
from .stage_vae import COLOUR_AXES, picture_loss
from .upscaler_config import FACTOR, SCALE_FACTOR, VAE
from .upscaler_data import Pictures, cut, places
from .upscaler_fold import VAE_SCALE, fold, soften

CROP, BATCH = 16, 8
"""Side of a training square in latents, and squares a step."""
NOISE = 0.06
"""Highest standard deviation of the noise on the latents; each square draws its own."""
OFF_COST, DETAIL_COST = 4.0, 0.02
"""Weights of the first three latents' distance from the colours, and of the fourth's square."""
EXACT, PLAIN = 0.5, 0.25
"""Shares of squares that are decoded from the colours themselves, and without the fourth latent:
what the diffusion model will give at worst."""
SPREAD = 2.0
"""Standard deviation of the latents that the diffusion model sees. More than 1 moves the schedule's
noise down: most of a picture is known from the start."""
CARRIED = 6
"""Channels that carry the colours: plus and minus red, green and blue. In pairs, since a group norm
takes the mean from a pair, and since silu(x) - silu(-x) = x."""
LEVEL = 0.3
"""The carried colours' amplitude."""


def build() -> torch.nn.Module:
    """The autoencoder as it is trained, with seeded weights: soft norms, no attention."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    torch.manual_seed(SEED)
    model = AutoencoderKL(**VAE).requires_grad_(True).train()
    for half in (model.encoder, model.decoder):
        half.mid.attn_1 = torch.nn.Identity()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)
            _carry(name, module.weight.data)
        elif isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.SiLU):
            module.inplace = False
    soften(model, VAE_SCALE)
    _carry_ends(model)
    for layer in (model.quant_conv, model.post_quant_conv):
        layer.requires_grad_(False)
        layer.weight.data.copy_(torch.eye(len(layer.weight))[..., None, None])
    return model


def _carry(name: str, weight: torch.Tensor) -> None:
    """Make a convolution inside of encoder or decoder pass the carried channels on."""
    each = range(CARRIED)
    if name.endswith("conv2"):
        weight.mul_(0.1)[:CARRIED] = 0
    elif name.endswith("nin_shortcut"):
        weight.mul_(0.5)[:CARRIED] = 0
        weight[each, each] = 1
    elif name.endswith("downsample.conv"):
        weight.mul_(0.5)[:CARRIED] = 0
        weight[each, each, :2, :2] = 0.25
    elif name.endswith("upsample.conv"):
        blur = torch.tensor([0.25, 0.5, 0.25])
        weight.mul_(0.5)[:CARRIED] = 0
        weight[each, each] = blur[:, None] * blur


def _carry_ends(model: torch.nn.Module) -> None:
    """Let colours into the carried channels and out of them."""
    axes = torch.tensor(COLOUR_AXES) / 2
    middle = -0.1 * axes.sum(1)
    back = torch.linalg.inv(axes)
    encoder, decoder = model.encoder, model.decoder
    # What a norm divides by: the carried colours' variance is about a third of LEVEL squared.
    gain = math.sqrt(encoder.norm_out.eps + LEVEL**2 / 3) / LEVEL
    encoder.conv_in.weight.data[:CARRIED] = 0
    encoder.conv_out.weight.data[:3] = 0
    encoder.conv_out.weight.data[3].mul_(0.5)
    encoder.conv_out.weight.data[4:] = 0
    encoder.conv_out.bias.data[:3] = middle
    decoder.conv_in.weight.data[:CARRIED] = 0
    decoder.conv_out.weight.data.mul_(0.03)[:, :CARRIED] = 0
    for colour in range(3):
        for channel, sign in ((2 * colour, 1), (2 * colour + 1, -1)):
            encoder.conv_in.weight.data[channel, colour, 1, 1] = sign * LEVEL
            encoder.conv_out.weight.data[:3, channel, 1, 1] = sign * gain * axes[:, colour]
            decoder.conv_in.weight.data[channel, :3, 1, 1] = sign * LEVEL * back[colour]
            decoder.conv_in.bias.data[channel] = -sign * LEVEL * (back[colour] @ middle)
            decoder.conv_out.weight.data[colour, channel, 1, 1] = sign * gain


def mean_colours(x: torch.Tensor) -> torch.Tensor:
    """What the first three latents of pictures (n, 3, h, w) in -1..1 should be, at h/4, w/4."""
    axes = torch.tensor(COLOUR_AXES, device=x.device) / 2
    means = F.avg_pool2d(x, FACTOR)
    return torch.einsum("zc,nchw->nzhw", axes, means) - 0.1 * axes.sum(1)[:, None, None]


def train(run: Run, pictures: Pictures, workers: int) -> torch.nn.Module:
    """Train within the run's budget; returns the model with averaged weights."""
    from .fast_norm import install

    model, detail = build().to(run.device), pictures.detail()
    if run.device.type == "cpu":
        install(model)

    def loss_of(share, ticket, generator):
        rng = np.random.default_rng((SEED, ticket))
        index = rng.integers(len(detail), size=BATCH)
        where = places(detail, index, CROP, rng)
        x = cut(pictures.large, index, *where, CROP, FACTOR).to(run.device)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(run.device.type, torch.bfloat16):
            z = model.encoder(x)[:, :4].float()
            colours = mean_colours(x)
            draw = torch.rand((2, BATCH, 1, 1, 1), generator=generator, device=x.device)
            told = torch.where(draw[0] < EXACT, colours, z[:, :3])
            used = torch.cat([told, z[:, 3:] * (draw[1] >= PLAIN)], 1)
            spread = NOISE * torch.rand((BATCH, 1, 1, 1), generator=generator, device=x.device)
            noise = torch.randn(z.shape, generator=generator, device=x.device)
            out = model.decoder(used + spread * noise).float()
        fit = picture_loss(out / 2, x / 2)
        psnr = -10 * torch.log10((out.detach().clamp(-1, 1) / 2 - x / 2).square().mean())
        off = (z[:, :3] - colours).square().mean()
        detail_size = z[:, 3].square().mean()
        loss = fit + OFF_COST * off + DETAIL_COST * detail_size
        return loss, {"fit": fit, "psnr": psnr, "off": off, "detail": detail_size}

    parallel.train(run, [model], loss_of, rate=6e-4, decay=1e-4, ema=0.995, workers=workers)
    return model


def finished(work: Path) -> torch.nn.Module:
    """The autoencoder that the `vae` stage left in the work folder, as it was trained."""
    model = build()
    state = torch.load(Path(work) / "upscaler-vae.ckpt", weights_only=True, map_location="cpu")
    parallel.bind_average([model], state)
    return model.eval()


@torch.inference_mode()
def latents(work: Path, pictures: Pictures, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Encode every window: `latents` float16 (n, 4, WINDOW, WINDOW) of mean 0 and deviation
    `SPREAD` (the fourth, which holds detail, in the mean scale of the others), and the `mean` and
    `std` (4,) that were taken out."""
    path = Path(work) / "upscaler-latents.npz"
    if not path.exists():
        out = []
        for i in range(0, len(pictures.large), 4):
            x = torch.from_numpy(pictures.large[i : i + 4]).permute(0, 3, 1, 2)
            x = x.to(next(model.parameters()).device).float().div(127.5).sub(1)
            with torch.autocast(x.device.type, torch.bfloat16):
                z = model.encoder(x.contiguous(memory_format=torch.channels_last))[:, :4]
            out.append(z.float().cpu().numpy())
        z = np.concatenate(out)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        std[3] = std[:3].mean()
        std /= SPREAD
        z = ((z - mean[:, None, None]) / std[:, None, None]).astype(np.float16)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, latents=z, mean=mean, std=std)
        part.replace(path)
    with np.load(path) as file:
        return dict(file)


def for_the_host(model: torch.nn.Module, mean: np.ndarray, std: np.ndarray) -> torch.nn.Module:
    """The trained autoencoder as the host computes it, in place: ordinary norms, an attention that
    adds nothing, and latents that times the scale factor are what the diffusion model sees."""
    from comfy.ldm.modules.diffusionmodules.model import AttnBlock

    for half in (model.encoder, model.decoder):
        half.mid.attn_1 = AttnBlock(half.mid.block_1.out_channels).requires_grad_(False)
        for parameter in half.mid.attn_1.parameters():
            torch.nn.init.zeros_(parameter)
        half.mid.attn_1.norm.eps /= VAE_SCALE**2
    fold(model, VAE_SCALE)
    mean, std = torch.from_numpy(mean), torch.from_numpy(std)
    gain = 1 / (std * SCALE_FACTOR)
    last, into, out_of = model.encoder.conv_out, model.quant_conv, model.post_quant_conv
    with torch.no_grad():
        last.weight[4:] = 0
        last.bias[4:] = 2 * math.log(NOISE / 2)  # what the log variance is in a VAE
        into.weight[:, :, 0, 0] = torch.diag(torch.cat([gain, torch.ones(4)]))
        into.bias[:4], into.bias[4:] = -mean * gain, 2 * gain.log()
        out_of.weight[:, :, 0, 0] = torch.diag(1 / gain)
        out_of.bias.copy_(mean)
    return model
