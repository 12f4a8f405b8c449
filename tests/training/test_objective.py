"""The weighted error of the clean latents is each kind's own training loss."""

import pytest
import torch

from quanttune.training.objective import KINDS, denoising_loss, loss_weight

SIGMAS = torch.tensor([0.05, 0.3, 0.9])


def loss_by_hand(kind, clean, noise, estimate, sigma, data=1.0):
    """The loss in the space that a model of the kind predicts in, from its clean estimate."""
    s = sigma.view(-1, 1, 1, 1)
    if kind == "flow":
        x = (1 - s) * clean + s * noise
        predicted, target = (x - estimate) / s, noise - clean
    else:
        x = clean + s * noise
        if kind == "x0":
            predicted, target = estimate, clean
        elif kind == "eps":
            predicted, target = (x - estimate) / s, noise
        elif kind == "v":  # velocity of the unit-variance form: alpha n - sigma' x0
            a, b = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
            predicted = (a * (x - estimate) / s) - b * estimate
            target = a * noise - b * clean
        else:  # the network's raw output under Karras' preconditioning
            skip, out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
            predicted, target = (estimate - skip * x) / out, (clean - skip * x) / out
    return (predicted - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_give_the_models_own_loss(kind):
    generator = torch.Generator().manual_seed(0)
    clean, noise, error = torch.randn(3, 3, 4, 8, 8, generator=generator)
    estimate, data = clean + 0.1 * error, 0.5 if kind == "edm" else 1.0
    weight = loss_weight(kind, SIGMAS, sigma_data=data)
    expected = loss_by_hand(kind, clean, noise, estimate, SIGMAS, data)
    assert torch.allclose(denoising_loss(clean, estimate, weight), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_is_the_clamped_ratio(kind):
    """Hang et al.: the weight on the clean latents is min(SNR, gamma) for every prediction."""
    weight = loss_weight(kind, torch.tensor([0.1, 1.0, 10.0]), min_snr_gamma=5.0)
    assert torch.allclose(weight, torch.tensor([5.0, 1.0, 0.01]))


def test_ends_of_the_schedule_are_finite():
    for kind in KINDS:
        assert torch.isfinite(loss_weight(kind, torch.tensor([0.0, 1.0, 700.0]), 5.0)).all()
