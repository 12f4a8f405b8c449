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
    kind = _bitsandbytes(config.optimizer)
    _probe(kind, config.optimizer, found[0]["params"][0].device)
    return kind(found, weight_decay=config.weight_decay)


def _probe(kind: Callable[..., torch.optim.Optimizer], name: str, device: torch.device) -> None:
    """One step on zeros: a library without its native part says so in its first step only.

    As many of them as have a state of 8 bits.
    """
    parameter = nn.Parameter(torch.zeros(4096, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        kind([parameter]).step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the library raises, in several lines mostly
        reason = next((x.strip() for x in str(error).splitlines() if x.strip()), "no reason given")
        raise QuantTuneError(
            f"The optimizer {name} cannot work here, because bitsandbytes fails "
            f"({reason.rstrip('.')}); install bitsandbytes for this device, or choose adamw."
        ) from error


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
