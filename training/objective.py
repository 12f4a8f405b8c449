"""The loss of a denoiser, for every kind of prediction, as a weighted error of the clean image.

A model of any kind gives an estimate of the clean latents. Its own training loss is the squared
error of what it predicts, which is that of the clean latents times a weight of sigma alone:

- noise (``eps``): ``x = x0 + sigma n``, so ``n_hat - n = (x0 - x0_hat) / sigma`` (Ho et al. 2020),
- ``v``: ``1 + 1 / sigma^2`` (Salimans & Ho 2022, in the variance-exploding form),
- ``edm``: ``(sigma^2 + data^2) / (sigma data)^2`` (Karras et al. 2022),
- ``x0``: 1,
- ``flow``: ``x = (1 - sigma) x0 + sigma n``, so the velocity's error is ``(x0 - x0_hat) / sigma``.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("eps", "v", "edm", "flow", "x0")


def loss_weight(kind: str, sigma: Tensor, min_snr_gamma: float = 0.0,
                sigma_data: float = 1.0) -> Tensor:
    """Weight of the squared error of the clean latents at noise levels ``sigma``, same shape.

    ``min_snr_gamma`` above 0 gives ``min(SNR, gamma)`` for every kind (Hang et al. 2023, whose
    factors on the other losses all come to this one on the clean latents).
    """
    sigma = sigma.float().clamp(min=1e-6)
    # Signal to noise of x_t, whatever its overall scale.
    snr = ((1 - sigma).clamp(min=0) / sigma).square() if kind == "flow" else sigma.pow(-2)
    if min_snr_gamma > 0:
        return snr.clamp(max=min_snr_gamma)
    return {
        "eps": lambda: sigma.pow(-2),
        "v": lambda: 1 + sigma.pow(-2),
        "edm": lambda: (sigma.square() + sigma_data**2) / (sigma * sigma_data).square(),
        "flow": lambda: sigma.pow(-2),
        "x0": lambda: torch.ones_like(sigma),
    }[kind]()


def denoising_loss(clean: Tensor, denoised: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error of each sample: ``[B]`` float32 from ``[B, ...]``, weight ``[B]``."""
    error = (denoised.float() - clean.float()).square().flatten(1).mean(1)
    return error * weight
