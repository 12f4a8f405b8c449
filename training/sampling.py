"""What each step trains on: examples, timesteps and noise, from the seed and the step alone.

Nothing here has a state, so a training that is resumed, or spread over several processes, draws
exactly what an undisturbed single one draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIKE = 2e-3
"""Difference of two intervals, as shares of T, that does not count: a timestep or two."""
ROUND = 16
"""Turns a round has for each expert where their intervals differ in length."""


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a key, such as (seed, "noise", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class ExampleOrder:
    """Batches of equally shaped examples, each example about once an epoch.

    Attributes:
        buckets: indices of the examples of each shape.
        batch_size: examples a batch; the last of an epoch is filled up from the bucket's start.
        seed: of the order.
    """

    buckets: Sequence[Sequence[int]]
    batch_size: int
    seed: int

    def batch(self, number: int) -> list[int]:
        """The examples of batch ``number``, counted from the first epoch on."""
        per_epoch = sum(math.ceil(len(b) / self.batch_size) for b in self.buckets)
        epoch, position = divmod(number, per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = generator_of(self.seed, "order", epoch)
        batches = []
        for bucket in self.buckets:
            order = [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()]
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                while len(batch) < self.batch_size:
                    batch += order[: self.batch_size - len(batch)]
                batches.append(batch)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class TimestepSampler:
    """Timesteps and the expert that a step trains.

    Attributes:
        num_experts: N.
        num_timesteps: T.
        span: ``(first, last)`` shares of T that are trained.
        stratified: timesteps evenly over the span, so that every expert has its share of a step;
            in a step of fewer samples than experts, evenly over the interval of one expert, all
            in turn. Otherwise every timestep on its own.
        seed: of the draw.
        edges: the N + 1 shares of T at which one expert gives way to the next; empty for equal
            parts. They differ where the model is given another timestep than the one drawn (a flow
            model's shift), since that is what scales are routed by.
    """

    num_experts: int
    num_timesteps: float
    span: tuple[float, float]
    stratified: bool
    seed: int
    edges: tuple[float, ...] = ()

    def interval(self, expert: int) -> tuple[float, float]:
        """First and last share of T that the expert serves, within the span; may be empty."""
        count = self.num_experts
        ends = self.edges[expert : expert + 2] or (expert / count, (expert + 1) / count)
        low = max(ends[0], self.span[0])
        return low, max(low, min(ends[1], self.span[1]))

    @property
    def active(self) -> list[int]:
        """Experts whose interval meets the span."""
        return [e for e in range(self.num_experts)
                if self.interval(e)[1] - self.interval(e)[0] > 1e-9]

    def expert(self, step: int, count: int = 1) -> int | None:
        """The one expert of a stratified step: all in turn, shuffled anew each round.

        An expert of a longer interval has more turns in a round. None if the ``count`` samples of
        a step are enough for all of them to take part.
        """
        active = self.active
        if count >= len(active) > 1:
            return None
        turns = self._turns(active)
        turn, position = divmod(step, len(turns))
        order = torch.randperm(len(turns), generator=generator_of(self.seed, "turn", turn))
        return turns[int(order[position])]

    def _turns(self, active: list[int]) -> list[int]:
        """One round: each expert once if their intervals are alike, else in proportion."""
        lengths = [high - low for low, high in map(self.interval, active)]
        if max(lengths) - min(lengths) < ALIKE:
            return active
        places = ROUND * len(active)
        ends = torch.tensor(lengths, dtype=torch.float64).cumsum(0) / sum(lengths)
        middles = (torch.arange(places, dtype=torch.float64) + 0.5) / places
        return [active[i] for i in torch.searchsorted(ends, middles).tolist()]

    def timesteps(self, step: int, count: int, shared: bool = False) -> Tensor:
        """``count`` timesteps for a step, float32, at least 0 and below T.

        shared: all experts train as one, so that the whole span is drawn from.
        """
        generator = generator_of(self.seed, "timesteps", step)
        low, high = self.span
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.stratified:
            expert = None if shared else self.expert(step, count)
            if expert is not None:
                low, high = self.interval(expert)
            order = torch.randperm(count, generator=generator)
            uniform = (order + uniform) / count
        found = ((low + uniform * (high - low)) * self.num_timesteps).float()
        end = torch.tensor(float(self.num_timesteps))
        return found.clamp(max=float(torch.nextafter(end, torch.zeros(()))))


def edges_of(routed, num_experts: int, num_timesteps: float) -> tuple[float, ...]:
    """`TimestepSampler.edges` of a model; empty if they are equal parts.

    Args:
        routed: turns timesteps ``[B]`` in 0..T into shares of T by which scales are routed, rising.
        num_experts, num_timesteps: N and T.
    """
    edges = [0.0]
    for expert in range(1, num_experts):
        low, high = 0.0, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            t = torch.tensor([middle * num_timesteps], dtype=torch.float64)
            reached = float(routed(t)[0]) * num_experts >= expert
            low, high = (low, middle) if reached else (middle, high)
        edges.append(round(high, 7))
    edges.append(1.0)
    equal = [e / num_experts for e in range(num_experts + 1)]
    return () if max(abs(a - b) for a, b in zip(edges, equal)) < 1e-6 else tuple(edges)
