"""What every training shares: steps, checkpoints, losses on disk, trackers, stopping, processes."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.torch_checks import tensors_in
from .history import LossFile, StepRecord, Trackers, usable_trackers
from .processes import from_first, leave_together
from .state import check_same, load_state, remove_parts, save_state


class NotFinite(QuantTuneError):
    """A loss or gradient that is NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step.

    Attributes:
        record: the step.
        steps: of the whole training.
        seconds_per_step: over the steps of this session.
        trainer: for a look at the present state.
    """

    record: StepRecord
    steps: int
    seconds_per_step: float
    trainer: Any


class TrainingLoop(ABC):
    """A resumable run of optimizer steps in a folder.

    A subclass sets up its parameters, calls `restore` and gives the methods below. Everything
    random has to come from the seed and the step, so that a run that was stopped, killed and
    resumed computes what an undisturbed one does.

    Args:
        folder: where the state, the losses and the trackers' files go.
        steps: of the whole training.
        save_every: steps between two checkpoints; 0 saves at the end only.
        trackers: of `history.TRACKERS`.
        accelerator: an `accelerate.Accelerator`, or None to make one for this process.
        cpu: whether that one is for the processor.

    Attributes:
        step: steps done.
        history: a record of each.
    """

    def __init__(self, folder: Path | str, steps: int, save_every: int,
                 trackers: Sequence[str] = (), accelerator=None, cpu: bool = True):
        from accelerate import Accelerator

        self.folder, self.steps, self.save_every = Path(folder), steps, save_every
        self.trackers = usable_trackers(trackers)
        self.accelerator = accelerator or Accelerator(
            cpu=cpu, log_with=self.trackers or None, project_dir=str(self.folder))
        self.step, self.history, self._saved = 0, [], 0

    @abstractmethod
    def one_step(self) -> StepRecord:
        """Do step ``self.step + 1``, and count it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors, numbers and lists that `load` takes."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take a `state`."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What a state has to agree with to be resumed, as a user would call it."""

    def settings(self) -> dict[str, Any]:
        """For the trackers."""
        return {}

    def loop(self, callback: Callable[[Progress], bool | None] | None = None) -> str:
        """Train to the last step, or until ``callback`` returns True.

        Returns:
            What the user should know, or "".

        Raises:
            QuantTuneError: a loss that is not finite; the run keeps its last good state then.
        """
        main = self.accelerator.is_main_process
        if main:
            self._make_folder()
        losses = LossFile(self.folder, self.history) if main else None
        trackers = Trackers(self.accelerator, self.trackers)
        trackers.start(plain(self.settings()), self.step)
        start, first, message, stopped = time.monotonic(), self.step, "", False
        while self.step < self.steps and not stopped:
            record = self.one_step()
            self.history.append(record)
            if losses:
                losses.add(record)
            trackers.add(record)
            every = self.save_every
            if every and self.step % every == 0 and self.step < self.steps:
                message = self.save() or message
            if callback is not None:
                pace = (time.monotonic() - start) / (self.step - first)
                try:
                    asked = callback(Progress(record, self.steps, pace, self))
                except BaseException:
                    self.save()
                    raise
                stopped = self._any(bool(asked))
        if self.step != self._saved or not self.step:
            message = self.save() or message
        trackers.close()
        leave_together(self.accelerator)
        return message or trackers.failed

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def clip(self, loss: float, parameters: Sequence[Tensor], largest: float) -> float:
        """Clip the gradients to the norm ``largest`` (0 for no limit) and return their norm.

        Raises QuantTuneError when the loss or a gradient is not finite.
        """
        if not math.isfinite(loss):
            raise NotFinite(f"The loss of step {self.step + 1} is {loss}{self._keep()} Start it "
                            "anew with a lower learning rate.")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, largest or math.inf))
        if not math.isfinite(norm):
            raise NotFinite(f"The gradient of step {self.step + 1} is not finite{self._keep()} "
                            "Start it anew with a lower learning rate, or precision fp32.")
        return norm

    def _keep(self) -> str:
        """Save what was learnt before a step that failed; the middle of a sentence about it."""
        left = None
        if self.healthy():
            if self.step != self._saved:
                self.save()
            if self.accelerator.is_main_process:
                try:
                    left = self.leave()
                except QuantTuneError as error:
                    logging.warning(str(error))
        if self.accelerator.num_processes > 1:
            # A launcher ends all processes when the first one fails.
            self.accelerator.wait_for_everyone()
        return f"; what was learnt in {self.step} steps is in {left}." if left else "."

    def healthy(self) -> bool:
        """Whether what was learnt so far is finite."""
        return True

    def leave(self) -> Path | None:
        """Write what was learnt so far for the user of a run that cannot go on; its file."""
        return None

    def mean(self, total: Tensor, parameters: Sequence[Tensor], device: torch.device) -> float:
        """Average the gradients in place, and the loss ``total``, over the processes."""
        if self.accelerator.num_processes > 1:
            for p in parameters:
                p.grad = self.accelerator.reduce(p.grad, "mean")
            total = self.accelerator.reduce(total.float().to(device), "mean")
        return float(total)

    def _any(self, asked: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QuantTuneError(
                f"The folder {self.folder} for the training cannot be made "
                f"({error.strerror or error}); choose another one.") from error
        remove_parts(self.folder)

    def restore(self) -> None:
        """Go on from the folder's state if it has one: that of the first process counts for all.

        Raises QuantTuneError for a state that does not belong to these settings.
        """
        state = from_first(self.accelerator, lambda: load_state(self.folder))
        if state is None:
            return
        try:
            check_same(self.folder, state, self.origin())
            history = [StepRecord(*row) for row in state["history"]]
            step = int(state["step"])
            if not 0 <= step <= self.steps or [r.step for r in history] != list(
                    range(1, step + 1)) or not all(math.isfinite(r.loss) for r in history):
                raise ValueError("steps")
            # Saved is a state only while the loss is a number.
            if not all(map(is_finite, tensors_in(state))):
                raise ValueError("values")
            self.step = self._saved = step
            self.load(state)
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError,
                RuntimeError) as error:
            if isinstance(error, QuantTuneError):
                raise
            raise QuantTuneError(
                f"The training state in {self.folder} is damaged ({type(error).__name__}); delete "
                "it to start the training anew.") from error
        self.history = history

    def save(self) -> str:
        """Save the state; returns what went wrong, or ""."""
        if not self.accelerator.is_main_process:
            return ""
        try:
            save_state(self.folder, {
                "origin": self.origin(), "step": self.step, **self.state(),
                "history": [list(asdict(r).values()) for r in self.history],
            })
        except QuantTuneError as error:
            logging.warning(str(error))
            return str(error)
        self._saved = self.step
        return ""


def plain(settings: dict) -> dict:
    """Settings as numbers and strings, which is what trackers and ``weights_only`` files take."""
    return {k: v if isinstance(v, (bool, int, float, str)) else str(v)
            for k, v in settings.items()}
