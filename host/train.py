"""Training of scales inside the host."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..metrics.charts import loss_chart
from ..quant import ScaleMetadata
from ..training.config import ScaleTraining
from ..training.data import EmptyCaptions, TrainingSet
from ..training.run_lock import alone
from ..training.trainer import ScaleTrainer, TrainingResult
from .build import quantized_model
from .loss_feed import LossFeed
from .routing import apply_scale_set
from .run import PictureWatcher, Validation, replaced, run_folder, stopped
from .training import HostDenoiser, training_copy


@dataclass(frozen=True)
class Outcome:
    """What a training gives to the graph.

    Attributes:
        result: the trainer's.
        loss_picture: chart of the loss.
        grid: validation pictures so far, a row a prompt, or None.
        report: in words.
        losses: what the node's chart shows, see `LossFeed`.
    """

    result: TrainingResult
    loss_picture: Image.Image
    grid: Image.Image | None
    report: str
    losses: dict


def train(
    patcher,
    data: TrainingSet,
    config: ScaleTraining,
    name: str,
    subject: str = "",
    empty: EmptyCaptions | None = None,
    validation: Validation | None = None,
    trackers: Sequence[str] = (),
    node_id: str | None = None,
    anew: bool = False,
) -> Outcome:
    """Train scales for a quantized MODEL, or go on with the run ``name``.

    ``anew`` deletes that run first, once it is certain that the training can begin. The host's
    Stop ends the training after the step under way; the state is saved and the scales so far are
    returned. Raises QuantTuneError for whatever a user can mend.
    """
    quantized = quantized_model(patcher)
    with alone(run_folder(name)), training_copy(patcher, config.precision) as denoiser:
        bits = [w.bits for w in quantized.checkpoint.layers.values()]
        metadata = ScaleMetadata(
            base_fingerprint=quantized.fingerprint, base_name=quantized.name, subject=subject,
            bits=max(set(bits), key=bits.count),
            extra={"mode": config.mode, "settings": config.asdict()})
        with replaced(name, anew):
            trainer = ScaleTrainer(denoiser, data, config, run_folder(name), metadata, empty,
                                   trackers)
        watcher = scale_watcher(denoiser, config, validation, run_folder(name), node_id)
        watcher.start(trainer)
        result = trainer.run(watcher)
        if missed := watcher.end(trainer):
            logging.warning(f"'{name}': {missed}")
    steps, losses = zip(*[(r.step, r.loss) for r in result.history]) if result.history else ((), ())
    title = f"{config.mode}: {name}"
    return Outcome(result, loss_chart(steps, losses, title=title), watcher.grid(),
                   _report(result, config, name, anew), watcher.feed.end())


def scale_watcher(denoiser: HostDenoiser, config: ScaleTraining, validation: Validation | None,
                  folder: Path, node_id: str | None = None) -> PictureWatcher:
    """What looks at scales in training; see `PictureWatcher`."""
    def scaled(trainer):
        return apply_scale_set(denoiser.patcher, trainer.scale_set(), 1.0,
                               "the scales in training")[0]

    feed = LossFeed(node_id, folder.name, config.steps, config.num_experts,
                    denoiser.num_timesteps)
    return PictureWatcher(config.steps, node_id, config.preview_every, validation, folder, scaled,
                          denoiser.patcher, feed)


def _report(result: TrainingResult, config: ScaleTraining, name: str, anew: bool) -> str:
    done = len(result.history)
    tail = [r.loss for r in result.history[-max(1, done // 10):]]
    lines = [f"{config.mode}: {done} of {config.steps} steps, loss {np.mean(tail):.4f} over the "
             f"last {len(tail)}" if done else f"{config.mode}: no step done",
             f"{result.scale_set.num_parameters:,} scales, "
             f"{result.scale_set.nbytes / 1e6:.2f} MB"]
    if not result.finished:
        lines.append(stopped(name, anew))
    if result.message:
        lines.append(result.message)
    return "\n".join(lines)
