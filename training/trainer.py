"""The loop that fits scales to pictures (TuneQDM Alg. 1), on one process or several.

It knows the model only as a `Denoiser`, and reports through one callback. Everything random comes
from the seed and the step (``sampling``), so a run that was stopped, killed and resumed, or spread
over several processes, computes what an undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..quant import LayerScales, QuantTuneError, ScaleMetadata, ScaleSet, save_scale_set
from .config import ScaleTraining
from .data import TrainingSet
from .history import StepRecord
from .loop import Progress, TrainingLoop, plain
from .objective import denoising_loss, loss_weight
from .optimizers import build_optimizer, rate_factor, set_learning_rate
from .sampling import ExampleOrder, TimestepSampler, edges_of, generator_of
from .scales import TrainableScales

KEPT = "scales-before-the-error.safetensors"
"""In the run's folder: what was learnt before a loss that was not finite."""


class Denoiser(Protocol):
    """A frozen diffusion model as the trainer sees it."""

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
    """Of the integers."""

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise levels ``[B]`` float32 of timesteps ``[B]`` in 0..T."""

    def routed(self, timesteps: Tensor) -> Tensor:
        """Shares of T ``[B]``, 0 to 1, by which scales are routed when the model is used."""

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noised latents of the model's own process."""

    def denoise(self, noised: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor],
                scales: Mapping[str, LayerScales], checkpointing: bool) -> Tensor:
        """Estimate of the clean latents, differentiable in ``scales``."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves.

    Attributes:
        scale_set: the trained scales.
        history: every step, those before a resume included.
        finished: False if it was stopped early.
        message: what the user should know, or "".
    """

    scale_set: ScaleSet
    history: tuple[StepRecord, ...]
    finished: bool
    message: str = ""


class ScaleTrainer(TrainingLoop):
    """One training run in one folder."""

    def __init__(
        self,
        denoiser: Denoiser,
        data: TrainingSet,
        config: ScaleTraining,
        folder: Path | str,
        metadata: ScaleMetadata | None = None,
        empty: Mapping[str, Tensor] | None = None,
        trackers: Sequence[str] = (),
        accelerator=None,
    ):
        """Prepare, and go on from the folder's state if it has one.

        Args:
            denoiser: the model.
            data: encoded examples.
            config: settings.
            folder: where the state, the losses and the trackers' files go.
            metadata: of the scale set; steps and seed are filled in.
            empty: conditions of an empty caption, for ``caption_dropout``.
            trackers: of `history.TRACKERS`.
            accelerator: an `accelerate.Accelerator`, or None to make one for this process.

        Raises:
            QuantTuneError: no examples, or a state that does not belong to these settings.
        """
        if not data.latents or all(data.prior):
            raise QuantTuneError("There is no image to train on; connect 'Training Images'.")
        if config.caption_dropout and empty is None:
            raise QuantTuneError("caption_dropout needs the conditioning of an empty caption; "
                                 "connect a CLIP, or set it to 0.")
        super().__init__(folder, config.steps, config.save_every, trackers, accelerator,
                         denoiser.device.type == "cpu")
        self.denoiser, self.data, self.config = denoiser, data, config
        self.metadata, self.empty = metadata or ScaleMetadata(), empty
        self.scales = TrainableScales(
            denoiser.shapes, config.num_experts, config.train_s_in,
            denoiser.base_scales if config.absolute else None, config.s_in_noise, config.seed,
        ).to(denoiser.device)
        groups = [range(config.num_experts)] if not config.separate_experts else [
            [e] for e in range(config.num_experts)]
        self.optimizers = [build_optimizer(config, *self._parameters(g)) for g in groups]
        self.rate = rate_factor(config)
        self.timesteps = TimestepSampler(config.num_experts, denoiser.num_timesteps,
                                         config.timestep_range, config.stratified, config.seed,
                                         edges_of(denoiser.routed, config.num_experts,
                                                  denoiser.num_timesteps))
        world = self.accelerator.num_processes
        self.orders = [
            ExampleOrder(buckets, config.batch_size * world, config.seed + i)
            for i, buckets in enumerate(self._buckets()) if buckets]
        self.average = [t if t is None else t.clone() for t in self.scales.flat()]
        self.restore()

    def _parameters(self, experts) -> tuple[list, list]:
        pairs = [self.scales.of_expert(e) for e in experts]
        return [p for r, _ in pairs for p in r], [p for _, s in pairs for p in s]

    def _buckets(self) -> list[list[list[int]]]:
        """Buckets of the subject's examples, and of the class images."""
        prior = self.data.prior
        return [[[i for i in bucket if prior[i] == kind] for bucket in self.data.buckets()
                 if any(prior[i] == kind for i in bucket)] for kind in (False, True)]

    @property
    def shared_steps(self) -> int:
        """Steps in which all experts train as one."""
        return int(self.config.steps * self.config.shared_share) if self.config.num_experts > 1 \
            else 0

    def run(self, callback: Callable[[Progress], bool | None] | None = None) -> TrainingResult:
        """Train to the last step, or until ``callback`` returns True.

        Raises QuantTuneError when the loss is not finite; the run keeps its last good state then.
        """
        message = self.loop(callback)
        return TrainingResult(self.scale_set(), tuple(self.history), self.finished, message)

    def scale_set(self) -> ScaleSet:
        """The present scales (their average if there is one) as a set of their own."""
        values = tuple(self.average) if self.config.ema_decay else None
        metadata = replace(self.metadata, steps=self.step, seed=self.config.seed)
        count = max(1, round(self.denoiser.num_timesteps))
        # Flow models may count 0..1; what is routed by is the share of T.
        return self.scales.scale_set(count if count > 1 else 1000, metadata, values)

    def one_step(self) -> StepRecord:
        """All examples of a step, one update."""
        config, step = self.config, self.step
        shared = step < self.shared_steps
        if step == self.shared_steps and step > 0:
            self._split_experts()
        factor = self.rate(step)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, factor)
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        parts = [(order, 1.0 if i == 0 else config.prior_weight)
                 for i, order in enumerate(self.orders)]
        count = config.gradient_accumulation
        for part, (order, weight) in enumerate(parts):
            size = order.batch_size * count
            timesteps = self.timesteps.timesteps(step, size, shared)
            for piece in range(count):
                loss = self._loss(order, part, piece, timesteps, shared)
                self.accelerator.backward(loss * (weight / count))
                total += float(loss.detach()) * weight / count
        # Another process may have met an expert that this one has not.
        present = {0} if shared else set(self._experts(timesteps))
        parameters = [p for e in sorted(present) for group in self._parameters([e]) for p in group]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total = self.mean(total, parameters, self.denoiser.device)
        norm = self.clip(total, parameters, config.max_grad_norm)
        expert = -1
        if config.separate_experts:
            for index in sorted(present):
                self.optimizers[index].step()
            if len(present) == 1 and not shared:
                expert = min(present)
        else:
            for p in self.scales.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.optimizers[0].step()
        self.step += 1
        self._update_average()
        return StepRecord(self.step, total, self.optimizers[0].param_groups[0]["lr"], expert, norm)

    def _loss(self, order: ExampleOrder, part: int, piece: int, timesteps: Tensor,
              shared: bool) -> Tensor:
        """Mean loss of this process's examples in piece ``piece`` of the step."""
        config, number = self.config, self.step * self.config.gradient_accumulation + piece
        indices, size = order.batch(number), order.batch_size
        clean, conditions = self.data.batch(indices)
        generator = generator_of(config.seed, "noise", part, number)
        noise = torch.randn(clean.shape, generator=generator)
        if config.caption_dropout:
            drop = torch.rand(size, generator=generator) < config.caption_dropout
            conditions = _without_captions(conditions, self.empty, drop)
        timesteps = timesteps[piece * size : (piece + 1) * size]
        # Every process draws for all of them and keeps its share.
        mine = slice(self.accelerator.process_index * config.batch_size,
                     (self.accelerator.process_index + 1) * config.batch_size)
        device = self.denoiser.device
        clean, noise, timesteps = (v[mine].to(device) for v in (clean, noise, timesteps))
        conditions = {k: v[mine].to(device) for k, v in conditions.items()}
        experts = [0] * len(clean) if shared else self._experts(timesteps)
        sigma = self.denoiser.sigma(timesteps)
        denoised = self.denoiser.denoise(self.denoiser.noised(clean, noise, sigma), sigma,
                                         conditions, self.scales.select(experts),
                                         config.checkpointing)
        weight = loss_weight(self.denoiser.kind, sigma, config.min_snr_gamma,
                             self.denoiser.sigma_data)
        return denoising_loss(clean, denoised, weight).mean()

    def _experts(self, timesteps: Tensor) -> list[int]:
        """The expert of each timestep (eq. 6)."""
        count = self.config.num_experts
        share = self.denoiser.routed(timesteps).double().cpu() * count
        return share.floor().clamp(0, count - 1).long().tolist()

    def _split_experts(self) -> None:
        """End of the shared stage: every expert goes on from the first one and its moments."""
        self.scales.copy_expert(0)
        if self.config.separate_experts:
            state = self.optimizers[0].state_dict()["state"]
            for optimizer in self.optimizers[1:]:
                copied = {k: {n: v.clone() if isinstance(v, Tensor) else v for n, v in s.items()}
                          for k, s in state.items()}
                optimizer.load_state_dict({**optimizer.state_dict(), "state": copied})
        if self.config.ema_decay:
            for average in self.average:
                if average is not None:
                    average[1:] = average[:1]

    def _update_average(self) -> None:
        if not self.config.ema_decay:
            return
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
        for average, now in zip(self.average, self.scales.flat()):
            if average is not None:
                average.lerp_(now, 1 - decay)

    def settings(self) -> dict:
        """See `TrainingLoop.settings`."""
        return self.config.asdict()

    def healthy(self) -> bool:
        """See `TrainingLoop.healthy`."""
        return all(bool(p.isfinite().all()) for p in self.scales.parameters())

    def leave(self) -> Path | None:
        """See `TrainingLoop.leave`."""
        if not self.step:
            return None
        path = self.folder / KEPT
        save_scale_set(path, self.scale_set())
        return path

    def origin(self) -> dict:
        """See `TrainingLoop.origin`."""
        settings = self.config.asdict()
        for name in ("save_every", "preview_every", "checkpointing"):
            settings.pop(name)
        settings["batch_size"] *= self.accelerator.num_processes
        return {"base model": self.denoiser.fingerprint, "set of images": self.data.fingerprint,
                "settings": plain(settings)}

    def state(self) -> dict:
        """See `TrainingLoop.state`."""
        return {
            "scales": [p.detach().cpu().clone() for p in self.scales.parameters()],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": [t if t is None else t.cpu() for t in self.average],
        }

    def load(self, state: dict) -> None:
        """See `TrainingLoop.load`."""
        with torch.no_grad():
            for parameter, value in zip(self.scales.parameters(), state["scales"], strict=True):
                if parameter.shape != value.shape:
                    raise ValueError("shapes")
                parameter.copy_(value)
        for optimizer, value in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(value)
        self.average = [t if t is None else t.to(self.denoiser.device) for t in state["average"]]


def _without_captions(conditions: Mapping[str, Tensor], empty: Mapping[str, Tensor],
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
