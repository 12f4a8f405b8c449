"""A float denoiser of three layers with adapters, for tests of the LoRA trainer."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from quanttune.tests.training.toy import ToyDenoiser, empty_of, toy_set
from quanttune.training.adapters import adapters
from quanttune.training.lora_config import LoraTraining
from quanttune.training.lora_trainer import LoraTrainer


class ToyNet(nn.Module):
    """Layers by the names of a UNet's."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.in_layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
            self.attn1 = nn.ModuleDict({"to_q": nn.Linear(6, 8)})
            self.out = nn.Sequential(nn.Conv2d(8, 4, 1))
        self.requires_grad_(False)

    def forward(self, x, context):
        hidden = self.in_layers(x) + self.attn1["to_q"](context).mean(1)[:, :, None, None]
        return self.out(torch.tanh(hidden))


class LoraToyDenoiser(ToyDenoiser):
    """`ToyDenoiser` whose net is a `ToyNet`."""

    def __init__(self, seed=0):
        self.net, self.seen = ToyNet(seed), []

    def denoise(self, noised, sigma, conditions, scales, checkpointing=False):
        assert not scales
        s = sigma.view(-1, 1, 1, 1)
        out = self.net(noised / (1 + s**2).sqrt(), conditions["c_crossattn"])
        return noised / (1 + s**2) + s / (1 + s**2).sqrt() * out


def settings(**changes):
    """Quick settings that move the adapters well."""
    return LoraTraining(**{"steps": 20, "batch_size": 2, "learning_rate": 3e-2, "warmup_steps": 2,
                           "save_every": 5, "rank": 4, "targets": "all layers", **changes})


@contextmanager
def trainer(folder, data=None, denoiser=None, start="", **changes):
    """A trainer of the toy in ``folder``."""
    denoiser, config = denoiser or LoraToyDenoiser(), settings(**changes)
    names = [n for n, m in denoiser.net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    data = data or toy_set()
    with adapters(denoiser.net, config.chosen(names), config, denoiser.device) as own:
        yield LoraTrainer(denoiser, {"diffusion_model": own}, data, config, folder,
                          empty_of(data), start=start)
