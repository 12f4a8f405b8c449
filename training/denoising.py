"""What all trainings of a diffusion model share: examples, noise, captions, and the loss of a step.

The model is known only as a `Denoiser`. Everything random comes from the seed and the step
(``sampling``), so a run that was stopped, killed and resumed, or spread over several processes,
computes what an undisturbed one does.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..quant import LayerScales, QuantTuneError
from ..quant.limits import is_finite
from .data import EmptyCaptions, TrainingSet
from .loop import TrainingLoop, plain
from .objective import denoising_loss, loss_weight
from .optimizers import rate_factor
from .sampling import ExampleOrder, TimestepSampler, edges_of, generator_of
from .settings import DenoisingTraining


class Denoiser(Protocol):
    """A frozen diffusion model as a trainer sees it."""

    kind: str
    """Its prediction: one of ``objective.KINDS``."""
    num_timesteps: float
    """T."""
    sigma_data: float
    """Of an ``"edm"`` model, else 1."""
    device: torch.device
    shapes: Mapping[str, tuple[int, int]]
    """Layer name to ``(P * out, in)`` of the layers that take scales."""
    base_scales: Mapping[str, Tensor]
    """Layer name to ``s0``, ``[out, P]``."""
    fingerprint: str
    """Of the frozen weights."""

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise levels ``[B]`` float32 of timesteps ``[B]`` in 0..T."""

    def routed(self, timesteps: Tensor) -> Tensor:
        """Shares of T ``[B]``, 0 to 1, by which scales are routed when the model is used."""

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noised latents of the model's own process."""

    def denoise(self, noised: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor],
                scales: Mapping[str, LayerScales], checkpointing: bool) -> Tensor:
        """Estimate of the clean latents, differentiable in ``scales`` and what else learns."""


class DenoisingTrainer(TrainingLoop):
    """A training of a diffusion model on encoded examples.

    A subclass sets up what learns and calls `TrainingLoop.restore` at the end of its own set-up.

    Args:
        denoiser: the model.
        data: encoded examples.
        config: settings.
        folder: where the state, the losses and the trackers' files go.
        num_experts: N intervals that timesteps are drawn from in turn; 1 for all alike.
        empty: conditions of an empty caption for the shapes of the examples' latents, for
            ``caption_dropout``.
        trackers: of `history.TRACKERS`.
        accelerator: an `accelerate.Accelerator`, or None to make one for this process.

    Attributes:
        by_expert: expert to the loss of this process's examples in its interval, in the last step;
            weighted as the loss of the step is, and equal to it where a step has one expert.

    Raises:
        QuantTuneError: no examples, or no empty caption where one is needed.
    """

    def __init__(self, denoiser: Denoiser, data: TrainingSet, config: DenoisingTraining,
                 folder: Path | str, num_experts: int = 1,
                 empty: EmptyCaptions | None = None, trackers: Sequence[str] = (),
                 accelerator=None):
        if not data.latents or all(data.prior):
            raise QuantTuneError("There is no image to train on; connect 'Training Images'.")
        if config.caption_dropout and empty is None:
            raise QuantTuneError("caption_dropout needs the conditioning of an empty caption; "
                                 "connect a CLIP, or set it to 0.")
        super().__init__(folder, config.steps, config.save_every, trackers, accelerator,
                         denoiser.device.type == "cpu")
        self.denoiser, self.data, self.config, self.empty = denoiser, data, config, empty
        self.rate, self.by_expert = rate_factor(config), {}
        self.timesteps = TimestepSampler(
            num_experts, denoiser.num_timesteps, config.timestep_range, config.stratified,
            config.seed, edges_of(denoiser.routed, num_experts, denoiser.num_timesteps))
        world = self.accelerator.num_processes
        self.orders = [
            ExampleOrder(buckets, config.batch_size * world, config.seed + i)
            for i, buckets in enumerate(self._buckets()) if buckets]

    def _buckets(self) -> list[list[list[int]]]:
        """Buckets of the subject's examples, and of the class images."""
        prior = self.data.prior
        return [[[i for i in bucket if prior[i] == kind] for bucket in self.data.buckets()
                 if any(prior[i] == kind for i in bucket)] for kind in (False, True)]

    def draw(self, shared: bool = False) -> Tensor:
        """Timesteps of all examples of this step; see `TimestepSampler.timesteps`."""
        size = self.orders[0].batch_size * self.config.gradient_accumulation
        return self.timesteps.timesteps(self.step, size, shared)

    def accumulate(self, timesteps: Tensor) -> Tensor:
        """Gradients of all examples of this step; returns the loss, float64, a single number."""
        config, total = self.config, torch.zeros((), dtype=torch.float64)
        count, self.by_expert = config.gradient_accumulation, {}
        for part, order in enumerate(self.orders):
            weight = 1.0 if part == 0 else config.prior_weight
            seen: dict[int, list[float]] = {}
            for piece in range(count):
                losses, experts = self._losses(order, part, piece, timesteps)
                loss = losses.mean()
                self.accelerator.backward(loss * (weight / count))
                total += float(loss.detach()) * weight / count
                for expert, value in zip(experts, losses.detach().tolist()):
                    seen.setdefault(expert, []).append(value)
            for expert, values in seen.items():
                mean = weight * sum(values) / len(values)
                self.by_expert[expert] = self.by_expert.get(expert, 0.0) + mean
        return total

    def experts_of(self, timesteps: Tensor) -> list[int]:
        """The expert of each timestep; all of one by default."""
        return [0] * len(timesteps)

    def _losses(self, order: ExampleOrder, part: int, piece: int,
                timesteps: Tensor) -> tuple[Tensor, list[int]]:
        """Losses ``[B]`` of this process's examples in piece ``piece``, and their experts."""
        config, number = self.config, self.step * self.config.gradient_accumulation + piece
        indices, size = order.batch(number), order.batch_size
        clean, conditions = self.data.batch(indices)
        generator = generator_of(config.seed, "noise", part, number)
        noise = torch.randn(clean.shape, generator=generator)
        drop = torch.zeros(size, dtype=torch.bool)
        if config.caption_dropout:
            drop = torch.rand(size, generator=generator) < config.caption_dropout
            empty = self.empty[tuple(clean.shape[1:])]
            conditions = without_captions(conditions, empty, drop)
        timesteps = timesteps[piece * size : (piece + 1) * size]
        # Every process draws for all of them and keeps its share.
        mine = slice(self.accelerator.process_index * config.batch_size,
                     (self.accelerator.process_index + 1) * config.batch_size)
        device = self.denoiser.device
        clean, noise, timesteps = (v[mine].to(device) for v in (clean, noise, timesteps))
        conditions = {k: v[mine].to(device) for k, v in conditions.items()}
        conditions = self.conditions(indices[mine], drop[mine], clean, conditions)
        sigma = self.denoiser.sigma(timesteps)
        denoised = self.denoiser.denoise(self.denoiser.noised(clean, noise, sigma), sigma,
                                         conditions, self.scales_at(timesteps),
                                         config.checkpointing)
        weight = loss_weight(self.denoiser.kind, sigma, config.min_snr_gamma,
                             self.denoiser.sigma_data)
        return denoising_loss(clean, denoised, weight), self.experts_of(timesteps)

    def conditions(self, indices: Sequence[int], drop: Tensor, clean: Tensor,
                   encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model is given beside latents: ``encoded``, unless a text encoder learns.

        Args:
            indices: of the examples.
            drop: bool ``[B]``, those that go without their caption.
            clean: their latents.
            encoded: conditions that were computed once, on the model's device.
        """
        return encoded

    def scales_at(self, timesteps: Tensor) -> Mapping[str, LayerScales]:
        """Scales of the layers for samples at ``timesteps`` ``[B]``; none by default."""
        return {}

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """All that learns."""

    def healthy(self) -> bool:
        """See `TrainingLoop.healthy`."""
        return all(map(is_finite, self.parameters))

    def settings(self) -> dict:
        """See `TrainingLoop.settings`."""
        return self.config.asdict()

    def origin(self) -> dict:
        """See `TrainingLoop.origin`."""
        settings = self.config.asdict()
        for name in ("save_every", "preview_every", "checkpointing"):
            settings.pop(name)
        settings["batch_size"] *= self.accelerator.num_processes
        return {"base model": self.denoiser.fingerprint, "set of images": self.data.fingerprint,
                "settings": plain(settings)}


def without_captions(conditions: Mapping[str, Tensor], empty: Mapping[str, Tensor],
                     drop: Tensor) -> dict[str, Tensor]:
    """Replace the conditions of the samples ``drop`` by those of an empty caption."""
    result = {}
    for name, value in conditions.items():
        other = empty.get(name, value[:1])
        if other.dim() > 2 and other.shape[1] != value.shape[1]:
            length = math.lcm(other.shape[1], value.shape[1])
            value, other = (v.repeat(1, length // v.shape[1], 1) for v in (value, other))
        shape = [-1] + [1] * (value.dim() - 1)
        result[name] = torch.where(drop.view(shape), other.to(value), value)
    return result
