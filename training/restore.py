"""A state's numbers, put back where they were taken from, and nowhere else.

torch broadcasts and converts when it copies, and loads moments of any shape into an optimizer: a
damaged state would be taken silently, or fail steps later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""How optimizers, those of bitsandbytes included, call what they keep of each parameter's shape."""


def restore_values(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy saved values into parameters.

    Raises:
        ValueError: not as many of them, or one of another shape or type.
    """
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            check_like(value, parameter)
            parameter.copy_(value)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    """Load an optimizer's saved state.

    Raises:
        ValueError: groups or moments that are not those of its parameters.
        KeyError, TypeError, AttributeError: what else torch makes of a state that is none.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = optimizer.state.get(parameter, {})
            for name in MOMENTS:
                if name in found and found[name].shape != parameter.shape:
                    raise ValueError(f"{name} of another shape")


def check_like(value: Tensor | None, wanted: Tensor | None) -> None:
    """Raise ValueError unless a saved tensor has another's shape and type, or both are None."""
    if (value is None) != (wanted is None):
        raise ValueError("a tensor that is lacking")
    if wanted is not None and (value.shape != wanted.shape or value.dtype != wanted.dtype):
        raise ValueError("a tensor of another shape or type")
