"""What a training writes down while it runs: a CSV of the losses, and accelerate's trackers."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

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
    """The steps in a run's ``loss.csv``."""
    with open(Path(folder) / FILE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [StepRecord(int(r["step"]), float(r["loss"]), float(r["rate"]), int(r["expert"]),
                       float(r["gradient_norm"])) for r in rows]


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
