"""Group norms of a decoder that use the statistics of the whole picture, whatever tile they see.

A group norm takes mean and variance over all places. Of a tile they are the tile's, so that each
comes out with a tone of its own, and with those of the whole picture it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.ops
import torch


class SharedNorms:
    """Measures the group norms of a module in some forwards, and holds them to that in others.

    The module is as it was outside of `measured` and `applied`.

    Args:
        module: whose norms these are.
        relief: called before each norm inside, for instance to give freed memory back, or None.

    Attributes:
        norms: of the module, those of the host's kind.
        sums: what was measured: how often, and the sums of mean and mean square of each group,
            ``[groups]`` float32, by norm.
    """

    def __init__(self, module: torch.nn.Module, relief: Callable[[], None] | None = None):
        self.relief = relief
        self.norms = [m for m in module.modules() if isinstance(m, torch.nn.GroupNorm)
                      and isinstance(m, comfy.ops.CastWeightBiasOp) and m.affine]
        self.sums: dict[torch.nn.Module, tuple[int, torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def measured(self, margins: tuple[float, float] = (0, 0)) -> Iterator[None]:
        """Note the statistics of each forward inside; they count alike.

        The pictures of a batch are normed together, as if they were parts of one.

        Args:
            margins: the share of rows and of columns at either end of each picture that does not
                count, since what borders do to it is nothing of the whole picture's.
        """
        for norm in self.norms:
            norm.forward = _Measured(self, norm, margins)
        try:
            yield
        finally:
            for norm in self.norms:
                del norm.forward

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the norms inside use what was measured in place of their input's statistics."""
        held = [norm for norm in self.norms if norm in self.sums]
        for norm in held:
            count, mean, square = self.sums[norm]
            norm.forward = _Held(self, norm, mean / count, square / count)
        try:
            yield
        finally:
            for norm in held:
                del norm.forward

    def note(self, norm: torch.nn.GroupNorm, mean: torch.Tensor, square: torch.Tensor) -> None:
        """Count the mean and mean square of each group, ``[groups]``, with those of ``norm``."""
        count, *sums = self.sums.get(norm, (0, 0, 0))
        self.sums[norm] = (count + 1, sums[0] + mean, sums[1] + square)


class _Measured:
    """A group norm's forward over a whole batch, which notes its statistics."""

    def __init__(self, norms: SharedNorms, norm: torch.nn.GroupNorm, margins: tuple[float, float]):
        self.norms, self.norm, self.margins = norms, norm, margins

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        inner = x
        for dim, share in zip((-2, -1), self.margins):
            cut = int(x.shape[dim] * share)
            inner = inner.narrow(dim, cut, x.shape[dim] - 2 * cut)
        groups = inner.unflatten(1, (self.norm.num_groups, -1)).transpose(0, 1).flatten(1).float()
        variance, mean = torch.var_mean(groups, -1, correction=0)
        self.norms.note(self.norm, mean, variance + mean ** 2)
        return _Held(self.norms, self.norm, mean, variance + mean ** 2)(x)


class _Held:
    """A group norm's forward with given statistics: ``(x - mean) / std * weight + bias``."""

    def __init__(self, norms: SharedNorms, norm: torch.nn.GroupNorm, mean: torch.Tensor,
                 square: torch.Tensor):
        each = norm.num_channels // norm.num_groups
        spread = ((square - mean ** 2).clamp(min=0) + norm.eps).rsqrt()
        self.norms, self.norm = norms, norm
        self.mean, self.spread = (v.repeat_interleave(each) for v in (mean, spread))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.norms.relief is not None:
            self.norms.relief()
        weight, bias, offloaded = comfy.ops.cast_bias_weight(self.norm, x, offloadable=True)
        scale = weight.float() * self.spread.to(x.device)
        shift = bias.float() - self.mean.to(x.device) * scale
        comfy.ops.uncast_bias_weight(self.norm, weight, bias, offloaded)
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x.float(), scale.view(shape)).to(x.dtype)
