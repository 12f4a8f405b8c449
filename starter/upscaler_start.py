"""First weights of the small upscaler's diffusion model: the best linear estimate.

The small picture all but says what the first three latents are, so a model that only passes it on
is near already. From random weights most of a short training goes into finding that out; from these
it goes into what is left: noise on the small picture, traces of another autoencoder, detail.

With c the latents that a linear map reads from the small picture, off by a deviation d, the
estimate of x from a x + s e is (1 - w) c + (w / a) (a x + s e), where w = d^2 / (d^2 + s^2 / a^2)
(Wiener), and the velocity follows from it. Values travel in pairs of channels, plus and minus: a
group norm takes the mean from a pair, and silu(x) - silu(-x) = x.
"""

from __future__ import annotations

import numpy as np
import torch

from .upscaler_config import UNET

LEVEL = 0.02
"""Amplitude of a carried value of one: small beside the norms' eps, which makes them linear."""
SIGNS = torch.tensor([1.0, -1.0])
DOUBT = (0.15, 0.15, 0.15, 0.3)
"""d of each latent."""


def read_off(latents: np.ndarray, small: np.ndarray) -> torch.Tensor:
    """The linear map from small pictures to latents, by least squares.

    latents: (n, 4, h, w); small: uint8 (n, h, w, 3). Returns (4, 4): for each latent the weights
    of red, green and blue in -1..1, and a constant.
    """
    colours = small[..., ::4, ::4, :].reshape(-1, 3) / 127.5 - 1
    wanted = latents[:, :, ::4, ::4].transpose(0, 2, 3, 1).reshape(-1, 4).astype(np.float64)
    rows = np.concatenate([colours, np.ones((len(colours), 1))], 1)
    return torch.from_numpy(np.linalg.lstsq(rows, wanted, rcond=None)[0].T).float()


def _gains(signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much the velocity is the noisy latent, and by how much minus c: (steps, 4) each."""
    a, s = signal.sqrt()[:, None], (1 - signal).sqrt()[:, None]
    doubt = torch.tensor(DOUBT).square()
    w = doubt / (doubt + (s / a).square())
    return (a - w / a) / s, (1 - w) / s


def _link(conv: torch.nn.Conv2d, to: int, of: int, weight: float) -> None:
    """Make a convolution add `weight` times the pair number `of`, and `bias`, to the pair `to`."""
    middle = conv.weight.shape[2] // 2
    block = conv.weight[2 * to : 2 * to + 2, 2 * of : 2 * of + 2, middle, middle]
    block += weight * torch.outer(SIGNS, SIGNS)


@torch.no_grad()
def start(model: torch.nn.Module, colours: torch.Tensor, signal: torch.Tensor) -> None:
    """Put the linear estimate into a UNetModel whose residual branches end in zeros, in place.

    The last block carries it: minus c by its shortcut, and by its layers what depends on the
    timestep, whose embedding scales the pairs. The noise level is not looked at.

    colours: what `read_off` gives; signal: cumulative alpha of the timesteps.
    """
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    first, last, out = model.input_blocks[0][0], model.output_blocks[-1][0], model.out
    inner, outer, shortcut = last.in_layers[2], last.out_layers[3], last.skip_connection
    undo = [module.eps**0.5 for module in (last.in_layers[0], last.out_layers[0], out[0])]
    for layer, pairs in ((first, 8), (shortcut, 4), (inner, 8), (outer, 4)):
        layer.weight[: 2 * pairs] = 0
        layer.bias[: 2 * pairs] = 0
    for value in range(7):  # the noisy latent's four, and red, green and blue
        middle = first.weight[2 * value : 2 * value + 2, value, 1, 1]
        middle += LEVEL * SIGNS
    come = (shortcut.in_channels - first.out_channels) // 2
    for latent in range(4):
        constant = float(colours[latent, 3]) * LEVEL
        for colour in range(3):
            weight = float(colours[latent, colour])
            _link(shortcut, latent, come + 4 + colour, -weight / 2)
            _link(inner, 4 + latent, come + 4 + colour, undo[0] * weight)
        _link(inner, latent, come + latent, undo[0])
        inner.bias[8 + 2 * latent : 10 + 2 * latent] += constant * SIGNS
        shortcut.bias[2 * latent : 2 * latent + 2] -= constant * SIGNS
        _link(outer, latent, latent, undo[1])
        _link(outer, latent, 4 + latent, -undo[1])
        out[2].weight[latent, 2 * latent : 2 * latent + 2, 1, 1] = undo[2] / LEVEL * SIGNS

    told = model.time_embed(timestep_embedding(torch.arange(len(signal)), UNET["model_channels"]))
    told = torch.nn.functional.silu(told).double()
    told = torch.cat([told, torch.ones(len(told), 1).double()], 1)
    noisy, clear = _gains(signal)
    wanted = torch.cat([noisy, clear - 1], 1).double() - 1
    weak = 1e-7 * torch.eye(told.shape[1]).double()
    solved = torch.linalg.solve(told.T @ told + weak, told.T @ wanted).float()
    scale = last.emb_layers[1]
    scale.weight[:16] = solved[:-1].T.repeat_interleave(2, 0)
    scale.bias[:16] = solved[-1].repeat_interleave(2)
