"""The losses of a training, on their way to the chart that its node draws."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..training.loop import Progress
from .live import LOSSES, running, tell_page

POINTS = 512
"""Points of all experts' curves together, at most: a snapshot takes about 10 KB."""
PAUSE = 0.4
"""Seconds between two messages."""
WHOLE = 12
"""Every so many messages all points are sent, for a page that was opened in between."""


class Curve:
    """A row of losses in a limited number of points: the means of equally many successive ones.

    Attributes:
        points: ``(step, loss)``, means of `width` losses each.
        width: doubles, and neighbours join, whenever there are ``limit`` points.
    """

    def __init__(self, limit: int):
        self.limit, self.points, self.width = limit, [], 1
        self._steps = self._losses = 0.0
        self._count = 0

    def add(self, step: int, loss: float) -> bool:
        """Take a loss; True if it made points join."""
        self._steps, self._losses, self._count = self._steps + step, self._losses + loss, \
            self._count + 1
        if self._count < self.width:
            return False
        self.points.append((self._steps / self.width, self._losses / self.width))
        self._steps = self._losses = 0.0
        self._count = 0
        if len(self.points) < self.limit:
            return False
        even = zip(self.points[::2], self.points[1::2])
        self.points = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in even]
        self.width *= 2
        return True


class LossFeed:
    """Tells the page of a training's losses, each under the expert whose interval it fell into.

    A message has ``node`` and ``prompt``; ``run``, ``steps`` (of the whole training), ``step``,
    ``experts`` and ``timesteps`` (N and T); and ``points``: of each expert a list of
    ``[step, loss]``. With ``whole`` these are all points, else those since the last message.

    Args:
        node_id: of the node that shows them, or None for nothing.
        run: name of the run.
        steps: of the whole training.
        experts: N.
        timesteps: T.
    """

    def __init__(self, node_id: str | None, run: str, steps: int, experts: int = 1,
                 timesteps: float = 1000):
        self.node_id, self.run, self.steps, self.experts = node_id, run, steps, experts
        # Flow models may count 0..1.
        self.timesteps = round(timesteps) if timesteps > 1 else 1000
        self.step = 0
        limit = max(8, POINTS // experts // 2 * 2)
        self.curves = [Curve(limit) for _ in range(experts)]
        self._sent, self._told, self._count, self._whole = [0] * experts, 0.0, 0, True

    def begin(self, trainer) -> None:
        """Show what the run has learnt so far; nothing of a new one."""
        for record in trainer.history:
            self._take(trainer, record)
        self._send(whole=True)

    def add(self, progress: Progress) -> None:
        """Take a step; now and then, and at the end, the page is told."""
        self._take(progress.trainer, progress.record)
        done = self.step >= self.steps
        if done or time.monotonic() - self._told > PAUSE:
            self._send(whole=done or self._whole or self._count % WHOLE == 0)

    def end(self) -> dict[str, Any]:
        """The last state, which the node keeps."""
        return self._message(whole=True)

    def _take(self, trainer, record) -> None:
        self.step = record.step
        for expert, loss in _by_expert(trainer, record, self.experts):
            self._whole |= self.curves[expert].add(record.step, loss)

    def _send(self, whole: bool) -> None:
        if self.node_id is not None:
            tell_page(LOSSES, {"node": self.node_id, "prompt": running()[0],
                               **self._message(whole)})
        self._told, self._whole = time.monotonic(), False
        self._count += 1
        self._sent = [len(curve.points) for curve in self.curves]

    def _message(self, whole: bool) -> dict[str, Any]:
        new = [curve.points[0 if whole else sent:]
               for curve, sent in zip(self.curves, self._sent)]
        return {"run": self.run, "steps": self.steps, "step": self.step,
                "experts": self.experts, "timesteps": self.timesteps, "whole": whole,
                "points": [[[round(step, 1), float(f"{loss:.4g}")] for step, loss in points]
                           for points in new]}


def _by_expert(trainer, record, experts: int) -> Iterator[tuple[int, float]]:
    """Experts and losses of a step; none of a mixed step from a state of an earlier version."""
    if experts == 1:
        yield 0, record.loss
    elif record.expert >= 0:
        yield record.expert, record.loss
    else:
        yield from trainer.mixed.get(record.step, {}).items()
