"""Quantization-aware training: fake-quantized layers learn to answer as the float model does
(Diffusia's light QAT, by distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.qat import FakeQuantLayer
from .history import StepRecord
from .loop import TrainingLoop, plain
from .optimizers import rate_factor, set_learning_rate
from .restore import restore_optimizer, restore_values
from .sampling import generator_of

WEIGHTINGS = ("picture", "even")


@dataclass(frozen=True)
class QatTraining:
    """Settings of a quantization-aware training.

    Attributes:
        steps: optimizer steps.
        batch_size: recorded forwards a step.
        learning_rate: of step sizes and activation ranges, relative to what they were.
        weight_learning_rate: of the weights, in quantization steps; 0 leaves the integers alone.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        scheduler: one of `settings.SCHEDULERS`.
        warmup_steps: of the scheduler.
        checkpointing: recompute activations in the backward pass.
        precision: "auto", "fp32" or "bf16".
        save_every: steps between two checkpoints of the run; 0 saves at the end only.
        seed: of the order.
        weighting: one of `WEIGHTINGS`; "picture" weighs each forward by how much its error shows in
            the picture (`Student.weight`), "even" takes all alike.
    """

    steps: int = 200
    batch_size: int = 2
    learning_rate: float = 1e-3
    weight_learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    warmup_steps: int = 10
    checkpointing: bool = True
    precision: str = "auto"
    save_every: int = 50
    seed: int = 0
    weighting: str = "picture"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise QuantTuneError(f"The weighting is '{self.weighting}', but it has to be one of "
                                 f"{', '.join(WEIGHTINGS)}.")
        for name, low in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("save_every", 0),
                          ("seed", 0)):
            if getattr(self, name) < low:
                raise QuantTuneError(f"The setting {name} is {getattr(self, name)}, but it has to "
                                     f"be at least {low}.")
        for name in ("learning_rate", "weight_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise QuantTuneError(f"The setting {name} is {getattr(self, name)}, but it has to "
                                     "be a number from 0 to 1.")
        if not self.learning_rate and not self.weight_learning_rate:
            raise QuantTuneError("Both learning rates are 0, so that nothing would be trained; "
                                 "raise one of them.")


class Student(Protocol):
    """A diffusion model with fake-quantized layers, and the forwards it learns from."""

    layers: Mapping[str, FakeQuantLayer]
    device: torch.device
    fingerprint: str
    """Of the integers it started from."""
    examples: str
    """A key of the forwards."""

    def __len__(self) -> int:
        """How many forwards there are to learn from."""

    def answer(self, index: int, checkpointing: bool) -> tuple[Tensor, Tensor]:
        """The model's output for forward ``index``, and that of the float model."""

    def weight(self, index: int) -> float:
        """How much an error of forward ``index`` shows in the picture, about 0 to 1."""


class QatTrainer(TrainingLoop):
    """Fits step sizes, ranges and weights to the outputs of the float model."""

    def __init__(self, student: Student, config: QatTraining, folder: Path | str,
                 trackers: Sequence[str] = (), accelerator=None):
        """Prepare, and go on from the folder's state if it has one.

        Raises QuantTuneError: nothing to learn from, or a state of another training.
        """
        if not len(student):
            raise QuantTuneError("There is no forward of the float model to learn from; use more "
                                 "samples.")
        super().__init__(folder, config.steps, config.save_every, trackers, accelerator,
                         student.device.type == "cpu")
        self.student, self.config = student, config
        scales, weights = [], []
        for layer in student.layers.values():
            scales += [p for p in (layer.r_out, layer.ends) if p is not None]
            weights += [layer.steps] if layer.steps is not None else []
        groups = [{"params": p, "lr": rate, "base_lr": rate}
                  for p, rate in ((scales, config.learning_rate),
                                  (weights, config.weight_learning_rate)) if p and rate]
        for group, trains in ((scales, config.learning_rate),
                              (weights, config.weight_learning_rate)):
            for p in group:
                p.requires_grad_(bool(trains))
        self.parameters = [p for g in groups for p in g["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.rate = rate_factor(config)
        self.restore()

    def run(self, callback=None) -> str:
        """Train to the last step, or until ``callback`` returns True; see `TrainingLoop.loop`."""
        return self.loop(callback)

    def one_step(self) -> StepRecord:
        """One batch of forwards, one update. The loss is the weighted squared relative error."""
        config = self.config
        set_learning_rate(self.optimizer, self.rate(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        for index in self._batch():
            output, target = self.student.answer(index, config.checkpointing)
            output, target = output.float(), target.float()
            loss = (output - target).square().mean() / target.square().mean().clamp(min=1e-12)
            if config.weighting == "picture":
                loss = loss * self.student.weight(index)
            self.accelerator.backward(loss / config.batch_size)
            total += float(loss.detach()) / config.batch_size
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total = self.mean(total, self.parameters, self.student.device)
        norm = self.clip(total, self.parameters, config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        return StepRecord(self.step, total, self.optimizer.param_groups[0]["lr"], -1, norm)

    def _batch(self) -> list[int]:
        """This process's forwards of the step: all are seen before any is seen again."""
        count, size = len(self.student), self.config.batch_size
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = (self.step * world + rank) * size
        found = []
        for place in range(first, first + size):
            epoch, position = divmod(place, count)
            generator = generator_of(self.config.seed, "forwards", epoch)
            found.append(int(torch.randperm(count, generator=generator)[position]))
        return found

    def healthy(self) -> bool:
        """See `TrainingLoop.healthy`."""
        return all(map(is_finite, self.parameters))

    def settings(self) -> dict:
        """See `TrainingLoop.settings`."""
        return asdict(self.config)

    def origin(self) -> dict:
        """See `TrainingLoop.origin`."""
        settings = asdict(self.config)
        for name in ("save_every", "checkpointing"):
            settings.pop(name)
        settings["batch_size"] *= self.accelerator.num_processes
        return {"base model": self.student.fingerprint, "set of samples": self.student.examples,
                "settings": plain(settings)}

    def state(self) -> dict:
        """See `TrainingLoop.state`."""
        return {"parameters": [p.detach().cpu().clone() for p in self.parameters],
                "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        """See `TrainingLoop.load`."""
        restore_values(self.parameters, state["parameters"])
        restore_optimizer(self.optimizer, state["optimizer"])
