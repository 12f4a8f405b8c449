"""The timesteps of a sampling, on their way to the timelines of the nodes that applied scales."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from .live import EXPERTS, running, tell_page

PAUSE = 0.1
"""Seconds between two messages of one sampling."""


class ExpertFeed:
    """Tells the page where in the denoising process the sampler is.

    A message has the ``nodes`` that applied scales, the ``prompt``, the ``sampler`` (the node
    that samples) and ``at``, the timestep as a share of T. That of a sampling's first forward
    also has ``steps``, the shares of all steps of the sampler.

    Attributes:
        nodes: ids of the nodes that draw a timeline.
    """

    def __init__(self, nodes: tuple[str, ...] = ()):
        self.nodes = nodes
        self._sigmas, self._last, self._told = None, -1.0, 0.0

    def __bool__(self) -> bool:
        return bool(self.nodes)

    def seen(self, timesteps: torch.Tensor, options: dict, model_sampling,
             units: Callable) -> None:
        """A forward at ``timesteps``; whatever goes wrong here must not stop it.

        Args:
            timesteps: ``[B]``, as the diffusion model is given them.
            options: its ``transformer_options``.
            model_sampling: the host's.
            units: ``routing.timestep_units``.
        """
        try:
            self._tell(timesteps, options.get("sample_sigmas"), model_sampling, units)
        except Exception as error:  # a drawing is not worth a picture
            logging.debug(f"The expert timeline was not told of a step: {error!r}")
            self.nodes = ()

    def _tell(self, timesteps, sigmas, model_sampling, units) -> None:
        convert, count = units(model_sampling)
        at = float(convert(timesteps[:1])[0]) / count
        first = sigmas is not None and sigmas is not self._sigmas
        now = time.monotonic()
        if not first and (at == self._last or now - self._told < PAUSE):
            return
        prompt, sampler = running()
        message = {"nodes": list(self.nodes), "prompt": prompt, "sampler": sampler,
                   "at": round(at, 5)}
        if first:
            message["steps"] = steps_of(sigmas, model_sampling, units)
        self._sigmas, self._last, self._told = sigmas, at, now
        tell_page(EXPERTS, message)


def steps_of(sigmas: torch.Tensor, model_sampling, units: Callable) -> list[float]:
    """Shares of T of a sampler's steps: those of its noise levels but the last, where it ends."""
    convert, count = units(model_sampling)
    told = convert(model_sampling.timestep(sigmas[:-1]).float()) / count
    return [round(min(max(share, 0.0), 1.0), 5) for share in told.tolist()]
