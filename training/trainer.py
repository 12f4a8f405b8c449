"""The loop that fits scales to pictures (TuneQDM Alg. 1), on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..quant import LayerScales, ScaleMetadata, ScaleSet, save_scale_set
from .config import ScaleTraining
from .data import EmptyCaptions, TrainingSet
from .denoising import Denoiser, DenoisingTrainer
from .history import StepRecord
from .loop import Progress
from .optimizers import build_optimizer, set_learning_rate
from .restore import check_like, restore_optimizer, restore_values
from .scales import TrainableScales

KEPT = "scales-before-the-error.safetensors"
"""In the run's folder: what was learnt before a loss that was not finite."""


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


class ScaleTrainer(DenoisingTrainer):
    """One training run in one folder.

    Attributes:
        mixed: of the steps that are no single expert's (``StepRecord.expert`` is -1), by their
            number: what `DenoisingTrainer.by_expert` was.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        data: TrainingSet,
        config: ScaleTraining,
        folder: Path | str,
        metadata: ScaleMetadata | None = None,
        empty: EmptyCaptions | None = None,
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
            empty: conditions of an empty caption by shape, for ``caption_dropout``.
            trackers: of `history.TRACKERS`.
            accelerator: an `accelerate.Accelerator`, or None to make one for this process.

        Raises:
            QuantTuneError: no examples, or a state that does not belong to these settings.
        """
        super().__init__(denoiser, data, config, folder, config.num_experts, empty, trackers,
                         accelerator)
        self.metadata, self.shared = metadata or ScaleMetadata(), False
        self.scales = TrainableScales(
            denoiser.shapes, config.num_experts, config.train_s_in,
            denoiser.base_scales if config.absolute else None, config.s_in_noise, config.seed,
        ).to(denoiser.device)
        groups = [range(config.num_experts)] if not config.separate_experts else [
            [e] for e in range(config.num_experts)]
        self.optimizers = [build_optimizer(config, self._rated(g)) for g in groups]
        self.average = [t if t is None else t.clone() for t in self.scales.flat()]
        self.mixed: dict[int, dict[int, float]] = {}
        self.restore()

    def _rated(self, experts) -> list[tuple[list, float]]:
        """Output and input scales of some experts, each with its learning rate."""
        config = self.config
        r_out, s_in = self._of(experts)
        return [(r_out, config.learning_rate)] + (
            [(s_in, config.s_in_learning_rate or config.learning_rate)] if s_in else [])

    def _of(self, experts) -> tuple[list, list]:
        pairs = [self.scales.of_expert(e) for e in experts]
        return [p for r, _ in pairs for p in r], [p for _, s in pairs for p in s]

    @property
    def parameters(self) -> list[Tensor]:
        """All scales."""
        return list(self.scales.parameters())

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
        self.shared = shared
        timesteps = self.draw(shared)
        total = self.accumulate(timesteps)
        # Another process may have met an expert that this one has not.
        present = {0} if shared else set(self.experts_of(timesteps))
        parameters = [p for e in sorted(present) for group in self._of([e]) for p in group]
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
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.optimizers[0].step()
        self.step += 1
        if expert < 0 and config.num_experts > 1:
            self.mixed[self.step] = self.by_expert
        self._update_average()
        return StepRecord(self.step, total, self.optimizers[0].param_groups[0]["lr"], expert, norm)

    def scales_at(self, timesteps: Tensor) -> Mapping[str, LayerScales]:
        """See `DenoisingTrainer.scales_at`."""
        return self.scales.select([0] * len(timesteps) if self.shared
                                  else self.experts_of(timesteps))

    def experts_of(self, timesteps: Tensor) -> list[int]:
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

    def leave(self) -> Path | None:
        """See `TrainingLoop.leave`."""
        if not self.step:
            return None
        path = self.folder / KEPT
        save_scale_set(path, self.scale_set())
        return path

    def state(self) -> dict:
        """See `TrainingLoop.state`."""
        return {
            "scales": [p.detach().cpu().clone() for p in self.scales.parameters()],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": [t if t is None else t.cpu() for t in self.average],
            "mixed": [(step, *of) for step, losses in self.mixed.items()
                      for of in losses.items()],
        }

    def load(self, state: dict) -> None:
        """See `TrainingLoop.load`."""
        restore_values(self.scales.parameters(), state["scales"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            restore_optimizer(optimizer, value)
        for value, wanted in zip(state["average"], self.average, strict=True):
            check_like(value, wanted)
        self.average = [t if t is None else t.to(self.denoiser.device) for t in state["average"]]
        # States of earlier versions have none.
        for step, expert, loss in state.get("mixed", []):
            self.mixed.setdefault(int(step), {})[int(expert)] = float(loss)

