"""Optimizers by name, and the learning rate of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..quant import QuantTuneError
from .settings import DenoisingTraining

BITSANDBYTES = {"adamw8bit": "AdamW8bit", "lion": "Lion32bit", "lion8bit": "Lion8bit"}


def build_optimizer(config: DenoisingTraining,
                    groups: Sequence[tuple[Sequence[nn.Parameter], float]]
                    ) -> torch.optim.Optimizer:
    """The configured optimizer over groups of parameters, each with its own learning rate.

    Each group keeps its undisturbed rate as ``base_lr``; see `set_learning_rate`.
    """
    found = [{"params": list(p), "lr": rate, "base_lr": rate} for p, rate in groups]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(found, weight_decay=config.weight_decay)
    return _bitsandbytes(config.optimizer)(found, weight_decay=config.weight_decay)


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        import bitsandbytes.optim as library
    except ImportError as error:
        raise QuantTuneError(
            f"The optimizer {name} needs bitsandbytes, which cannot be loaded here ({error}); "
            "install it, or choose adamw.") from error
    return getattr(library, BITSANDBYTES[name])


def rate_factor(config: DenoisingTraining) -> Callable[[int], float]:
    """Factor of the learning rate by step, from diffusers' schedules."""
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(config.scheduler, dummy, num_warmup_steps=config.warmup_steps,
                              num_training_steps=config.steps)
    return scheduler.lr_lambdas[0]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its undisturbed one times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
