"""What a training writes down while it runs: a CSV of the losses, and accelerate's trackers."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from ..quant import QuantTuneError

FILE = "loss.csv"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: from 1 on.
        loss: mean over all examples of the step, class images weighted.
        rate: learning rate of the output scales.
        expert: the expert it trained, -1 for all or several.
        gradient_norm: before clipping.
    """

    step: int
    loss: float
    rate: float
    expert: int
    gradient_norm: float


class LossFile:
    """``loss.csv`` of a run: a line a step, flushed at once; cut back when a run is resumed."""

    def __init__(self, folder: Path, before: Sequence[StepRecord] = ()):
        """Start with the steps already done. A folder that cannot be written is only warned of."""
        self.path, self.failed = Path(folder) / FILE, False
        self._write(before, "w")

    def add(self, record: StepRecord) -> None:
        """Append a step."""
        self._write([record], "a")

    def _write(self, records: Sequence[StepRecord], mode: str) -> None:
        if self.failed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, mode, newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if mode == "w":
                    writer.writerow([f.name for f in fields(StepRecord)])
                # repr: the shortest text that reads back as the same number.
                writer.writerows([repr(v) for v in astuple(r)] for r in records)
        except OSError as error:
            self.failed = True
            logging.warning(f"The losses cannot be written to {self.path} ({error.strerror}); the "
                            "training goes on without that file.")


def read_losses(folder: Path) -> list[StepRecord]:
    """The steps in a run's ``loss.csv``.

    Raises:
        QuantTuneError: no such file, or one that `LossFile` has not written.
    """
    path = Path(folder) / FILE
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        return [StepRecord(int(r["step"]), float(r["loss"]), float(r["rate"]), int(r["expert"]),
                           float(r["gradient_norm"])) for r in rows]
    except OSError as error:
        raise QuantTuneError(f"The losses {path} cannot be read ({error.strerror or error}); give "
                             "the folder of a training run.") from error
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise QuantTuneError(f"The losses {path} are damaged; delete the file, the training writes "
                             "it again.") from error


TRACKERS = ("tensorboard", "wandb")


def usable_trackers(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are installed. Raises QuantTuneError for one that does not exist."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    there = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if name not in there:
            raise QuantTuneError(f"There is no tracker '{name}'; use {' or '.join(TRACKERS)}.")
        if not there[name]():
            logging.warning(f"The tracker {name} is not installed; losses go to {FILE} only.")
    return [name for name in names if there[name]()]


class Trackers:
    """accelerate's trackers of a run; one that fails is warned of, and the training goes on.

    Args:
        accelerator: an `accelerate.Accelerator` made with them.
        names: of `TRACKERS`, for messages.

    Attributes:
        failed: what went wrong, in a sentence, or "".
    """

    def __init__(self, accelerator, names: Sequence[str]):
        self.accelerator, self.names, self.failed = accelerator, list(names), ""

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        """Open them, ``step`` steps into the run."""
        if not self.names:
            return
        # What was logged after the state that is resumed is logged again.
        purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
        try:
            self.accelerator.init_trackers("quanttune", config=dict(settings), init_kwargs=purge)
        except Exception as error:  # whatever a library of others raises, losses go to the file
            self._give_up(", ".join(self.names), error)
            self.close()

    def add(self, record: StepRecord) -> None:
        """Log a step."""
        values = {k: v for k, v in asdict(record).items() if k != "step"}
        self._each(lambda tracker: tracker.log(values, step=record.step))

    def close(self) -> None:
        """Finish them all."""
        self._each(lambda tracker: tracker.finish())
        self.accelerator.trackers = []

    def _each(self, act: Callable[[Any], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                act(tracker)
            except Exception as error:
                self._give_up(tracker.name, error)
                self.accelerator.trackers.remove(tracker)

    def _give_up(self, name: str, error: Exception) -> None:
        if self.failed:
            return
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self.failed = (f"The tracker {name} failed ({reason.splitlines()[0]}); the training went "
                       f"on without it, with its losses in {FILE} only.")
        logging.warning(self.failed)
