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
    """

    num_experts: int
    num_timesteps: float
    span: tuple[float, float]
    stratified: bool
    seed: int

    def interval(self, expert: int) -> tuple[float, float]:
        """First and last share of T that the expert serves, within the span; may be empty."""
        low = max(expert / self.num_experts, self.span[0])
        return low, max(low, min((expert + 1) / self.num_experts, self.span[1]))

    @property
    def active(self) -> list[int]:
        """Experts whose interval meets the span."""
        return [e for e in range(self.num_experts)
                if self.interval(e)[1] - self.interval(e)[0] > 1e-9]

    def expert(self, step: int, count: int = 1) -> int | None:
        """The one expert of a stratified step: all in turn, shuffled anew each round.

        None if the ``count`` samples of a step are enough for all of them to take part.
        """
        active = self.active
        if count >= len(active) > 1:
            return None
        turn, position = divmod(step, len(active))
        order = torch.randperm(len(active), generator=generator_of(self.seed, "turn", turn))
        return active[int(order[position])]

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
