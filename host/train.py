"""Training of scales inside the host: run folders, validation pictures, progress, Stop."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..metrics.charts import loss_chart, picture_grid
from ..quant import QuantTuneError, ScaleMetadata
from ..training.config import ScaleTraining
from ..training.data import TrainingSet
from ..training.loop import Progress
from ..training.trainer import ScaleTrainer, TrainingResult
from .build import quantized_model
from .pictures import SamplingSettings, sample_pictures
from .routing import apply_scale_set
from .training import HostDenoiser, training_copy

LOOKS = "looks"
"""Key of what a preview shows, in its file."""
RUNS = "quanttune_runs"
"""Folder of the training runs in the host's output folder."""


@dataclass(frozen=True)
class Validation:
    """What to look at while training.

    Attributes:
        prompts: one row of the grid each.
        settings: how the pictures are sampled.
        clip, vae: the host's.
    """

    prompts: Sequence[str]
    settings: SamplingSettings
    clip: object
    vae: object


@dataclass(frozen=True)
class Outcome:
    """What a training gives to the graph.

    Attributes:
        result: the trainer's.
        loss_picture: chart of the loss.
        grid: validation pictures so far, a row a prompt, or None.
        report: in words.
    """

    result: TrainingResult
    loss_picture: Image.Image
    grid: Image.Image | None
    report: str


def run_folder(name: str) -> Path:
    """Folder of the run ``name``. Raises QuantTuneError for a name that is no folder name."""
    if not re.fullmatch(r"[\w][\w .-]{0,99}", name) or name.endswith((".", " ")):
        raise QuantTuneError(f"The run name {name!r} cannot be a folder name; use letters, digits, "
                             "'-', '_' and '.'.")
    return Path(folder_paths.get_output_directory()) / RUNS / name


@contextmanager
def replaced(name: str, anew: bool) -> Iterator[None]:
    """With ``anew``, put a run aside while another is set up in its place; delete it then.

    If that fails, the run is as it was.
    """
    folder = run_folder(name)
    if not anew or not folder.is_dir():
        yield
        return
    aside = folder.with_name(f".{name}.{secrets.token_hex(4)}.old")
    folder.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def run_state(name: str) -> str:
    """What changes when a run has gone on, or has been deleted."""
    state = run_folder(name) / "checkpoint.pt"
    return str(state.stat().st_mtime_ns) if state.exists() else "new"


def train(
    patcher,
    data: TrainingSet,
    config: ScaleTraining,
    name: str,
    subject: str = "",
    empty: Mapping[str, torch.Tensor] | None = None,
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
    with training_copy(patcher, config.precision) as denoiser:
        bits = [w.bits for w in quantized.checkpoint.layers.values()]
        metadata = ScaleMetadata(
            base_fingerprint=denoiser.fingerprint, base_name=quantized.name, subject=subject,
            bits=max(set(bits), key=bits.count),
            extra={"mode": config.mode, "settings": config.asdict()})
        with replaced(name, anew):
            trainer = ScaleTrainer(denoiser, data, config, run_folder(name), metadata, empty,
                                   trackers)
        watcher = _Watcher(denoiser, config, validation, run_folder(name), node_id)
        watcher.start(trainer)
        result = trainer.run(watcher)
        if validation and watcher.last != trainer.step and result.finished:
            try:
                watcher.look(trainer)
            except (comfy.model_management.InterruptProcessingException,
                    torch.OutOfMemoryError):
                logging.warning(f"The last validation pictures of '{name}' were not made; the "
                                "scales are complete.")
    steps, losses = zip(*[(r.step, r.loss) for r in result.history]) if result.history else ((), ())
    title = f"{config.mode}: {name}"
    return Outcome(result, loss_chart(steps, losses, title=title), watcher.grid(),
                   _report(result, config, name, anew))


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


def stopped(name: str, anew: bool) -> str:
    """What to do with a run that was stopped; one that starts anew would lose it."""
    how = "set if_run_exists to 'continue' and queue" if anew else "queue"
    return f"Stopped; {how} again to go on with the run '{name}'."


def tell(progress: Progress, node_id: str | None) -> None:
    """Show step, loss and time left on a node, if there is a server and a node."""
    left = (progress.steps - progress.record.step) * progress.seconds_per_step
    recent = [r.loss for r in progress.trainer.history[-25:]]
    text = (f"step {progress.record.step}/{progress.steps}  loss {np.mean(recent):.4f}  "
            f"{progress.seconds_per_step:.2f} s a step, {int(left) // 60}:"
            f"{int(left) % 60:02d} left")
    if node_id is not None:
        from server import PromptServer

        if getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(text, node_id)


class _Watcher:
    """The trainer's callback: bar, text, pictures, and the host's Stop."""

    def __init__(self, denoiser: HostDenoiser, config: ScaleTraining,
                 validation: Validation | None, folder: Path, node_id: str | None):
        self.denoiser, self.config, self.validation = denoiser, config, validation
        self.folder, self.node_id = folder, node_id
        self.bar = comfy.utils.ProgressBar(config.steps, node_id=node_id)
        self.columns: dict[int, list[np.ndarray]] = {}
        self.last, self.told = -1, 0.0

    def start(self, trainer: ScaleTrainer) -> None:
        """Before the first step: what was looked at in the run so far."""
        for path in sorted((self.folder / "previews").glob("step-*.png")):
            step = int(path.stem.split("-")[1])
            if step <= trainer.step and self.validation:
                rows = _rows(path, len(self.validation.prompts), self._looks())
                if rows:
                    self.columns[step] = rows
        if self.validation and self.config.preview_every and trainer.step == 0:
            self.look(trainer)

    def __call__(self, progress: Progress) -> bool:
        record, every = progress.record, self.config.preview_every
        preview = None
        try:
            if self.validation and every and record.step % every == 0:
                self.look(progress.trainer)
                preview = ("JPEG", self.grid(), 768)
            now = time.monotonic()
            if now - self.told > 0.5 or preview or record.step == progress.steps:
                self.told = now
                tell(progress, self.node_id)
            self.bar.update_absolute(record.step, progress.steps, preview)
            comfy.model_management.throw_exception_if_processing_interrupted()
        except comfy.model_management.InterruptProcessingException:
            return True
        return False

    def look(self, trainer: ScaleTrainer) -> None:
        """Sample the validation prompts with the present scales."""
        v, copy = self.validation, self.denoiser.patcher
        routed, _ = apply_scale_set(copy, trainer.scale_set(), 1.0, "the scales in training")
        pictures = sample_pictures(routed, v.clip, v.vae, v.prompts, v.settings)
        self.last = trainer.step
        self.columns[trainer.step] = [(p.numpy().clip(0, 1) * 255).round().astype(np.uint8)
                                      for p in pictures]
        try:
            (self.folder / "previews").mkdir(parents=True, exist_ok=True)
            told = PngInfo()
            told.add_text(LOOKS, self._looks())
            Image.fromarray(np.concatenate(self.columns[trainer.step])).save(
                self.folder / "previews" / f"step-{trainer.step:06}.png", pnginfo=told)
        except OSError:
            pass  # the pictures are in the graph's outputs anyway
        # A small card may have had to make room for the decoder.
        comfy.model_management.load_models_gpu([copy], force_full_load=True)

    def _looks(self) -> str:
        """What pictures of one grid have in common."""
        return repr((list(self.validation.prompts), self.validation.settings))

    def grid(self) -> Image.Image | None:
        """All rounds so far, a row a prompt and a column a round; at most eight columns."""
        if not self.columns:
            return None
        steps = sorted(self.columns)
        if len(steps) > 8:
            steps = [steps[round(i * (len(steps) - 1) / 7)] for i in range(8)]
        rows = [[self.columns[s][i] for s in steps] for i in range(len(self.validation.prompts))]
        return picture_grid(rows, list(self.validation.prompts), [f"step {s}" for s in steps])


def _rows(path: Path, count: int, looks: str) -> list[np.ndarray]:
    """A saved column of pictures, cut up again.

    None from a file that a kill has cut off, or that shows other prompts.
    """
    try:
        with Image.open(path) as image:
            if image.info.get(LOOKS) != looks:
                return []
            column = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError):
        return []
    return np.split(column, count) if column.shape[0] % count == 0 else []
