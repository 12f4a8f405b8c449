"""Runs of a training inside the host: their folders, progress, validation pictures, Stop."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..metrics.charts import picture_grid
from ..quant import QuantTuneError
from ..training.loop import Progress
from ..training.state import FILE as STATE
from .folders import RESERVED, is_inside
from .live import server
from .loss_feed import LossFeed
from .picture_file import LARGEST, UNREADABLE, write_png
from .pictures import SamplingSettings, sample_pictures

LOOKS = "looks"
"""Key of what a preview shows, in its file."""
RUNS = "quanttune_runs"
"""Folder of the training runs in the host's output folder."""
ASIDE, DONE = ".old", ".gone"
"""Ends of the hidden names of a run that is put aside, and of one that is being deleted."""
LONGEST = 240
"""Bytes of a run's name; file systems have 255, of which a run that is put aside takes some."""


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


def run_folder(name: str) -> Path:
    """Folder of the run ``name``. Raises QuantTuneError for a name that is no folder name."""
    if not re.fullmatch(r"[\w][\w .-]{0,99}", name) or name.endswith((".", " ")):
        raise QuantTuneError(f"The run name {name!r} cannot be a folder name; use letters, digits, "
                             "'-', '_' and '.'.")
    if len(name.encode()) > LONGEST:
        raise QuantTuneError(f"The run name {name[:20]!r}… is too long for a folder name; use at "
                             "most 100 letters, or 80 of a script such as Chinese.")
    if RESERVED.fullmatch(name):
        raise QuantTuneError(f"The run name {name!r} is one that Windows keeps for devices; use "
                             "another one.")
    folder = Path(folder_paths.get_output_directory()) / RUNS / name
    if not is_inside(folder, folder_paths.get_output_directory()):
        raise QuantTuneError(f"The run {name!r} leads out of the output folder by a link; use "
                             "another name, or start ComfyUI with --output-directory.")
    return folder


@contextmanager
def replaced(name: str, anew: bool) -> Iterator[None]:
    """With ``anew``, put a run aside while another is set up in its place; delete it then.

    If that fails, the run is as it was. If the process is killed meanwhile, it is again when the
    run is next started, with ``anew`` or without.
    """
    folder = run_folder(name)
    _put_back(folder)
    if not anew or not folder.is_dir():
        yield
        return
    aside = folder.with_name(f".{name}.{secrets.token_hex(4)}{ASIDE}")
    folder.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    # Under another name first: a run that is deleted in part is not to be put back.
    done = aside.with_suffix(DONE)
    try:
        aside.rename(done)
    except OSError:  # on Windows, while anything looks at what is in it
        done = aside
        with suppress(OSError):
            (done / STATE).unlink()
    shutil.rmtree(done, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Undo what a process that was killed in `replaced` has left of a run.

    A run that was put aside comes back, unless the one in its place has a state by now (earlier
    versions left it behind then, too). What was being deleted is deleted.
    """
    if not folder.parent.is_dir():  # the first run of all
        return
    left = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}({ASIDE}|{DONE})")
    try:
        found = [p for p in folder.parent.iterdir() if left.fullmatch(p.name)
                 and p.is_dir() and not p.is_symlink()]
        # The last one that was put aside, if a process was killed more than once.
        found.sort(key=lambda p: p.stat().st_mtime, reverse=True)
        for path in found:
            if path.suffix == ASIDE and not (folder / STATE).exists() and (
                    (path / STATE).exists() or not folder.exists()):
                shutil.rmtree(folder, ignore_errors=True)
                path.rename(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        logging.warning(f"What was left of an earlier run '{folder.name}' could not be put back "
                        f"({error.strerror or error}); look for it in {folder.parent}.")


def run_state(name: str) -> str:
    """What changes when a run has gone on, or has been deleted."""
    state = run_folder(name) / STATE
    return str(state.stat().st_mtime_ns) if state.exists() else "new"


def stopped(name: str, anew: bool) -> str:
    """What to do with a run that was stopped; one that starts anew would lose it."""
    how = "set if_run_exists to 'continue' and queue" if anew else "queue"
    return f"Stopped; {how} again to go on with the run '{name}'."


def tell(progress: Progress, node_id: str | None) -> None:
    """Show step, loss and time left on a node of the page that queued, if there is one."""
    host = server()
    client = getattr(host, "client_id", None)
    # Without a client the host tells every page, whatever node has this id there.
    if node_id is None or client is None:
        return
    left = (progress.steps - progress.record.step) * progress.seconds_per_step
    recent = [r.loss for r in progress.trainer.history[-25:]]
    text = (f"step {progress.record.step}/{progress.steps}  loss {np.mean(recent):.4f}  "
            f"{progress.seconds_per_step:.2f} s a step, {int(left) // 60}:"
            f"{int(left) % 60:02d} left")
    host.send_progress_text(text, node_id, client)


class Watcher:
    """A trainer's callback: bar, text, chart, and the host's Stop.

    Args:
        steps: of the whole training.
        node_id: of the node that shows them, or None.
        feed: what the node's chart is told.
    """

    def __init__(self, steps: int, node_id: str | None, feed: LossFeed):
        self.node_id, self.feed, self.told = node_id, feed, 0.0
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)

    def start(self, trainer) -> None:
        """Before the first step."""
        self.feed.begin(trainer)

    def __call__(self, progress: Progress) -> bool:
        """Told after each step; True asks the trainer to stop."""
        self.feed.add(progress)
        try:
            preview = self.preview(progress)
            now = time.monotonic()
            if now - self.told > 0.5 or preview or progress.record.step == progress.steps:
                self.told = now
                tell(progress, self.node_id)
            self.bar.update_absolute(progress.record.step, progress.steps, preview)
            comfy.model_management.throw_exception_if_processing_interrupted()
        except comfy.model_management.InterruptProcessingException:
            return True
        return False

    def preview(self, progress: Progress) -> tuple | None:
        """What the bar shows beside this step, in the host's form."""
        return None


class PictureWatcher(Watcher):
    """A `Watcher` that also samples validation pictures every so many steps.

    Args:
        steps, node_id, feed: as in `Watcher`.
        every: steps between two rounds; 0 for none.
        validation: what to sample, or None for nothing.
        folder: of the run; the pictures are kept below it.
        model: the MODEL to sample from, given the trainer.
        copy: the MODEL that trains, which is loaded again after each round.
    """

    def __init__(self, steps: int, node_id: str | None, every: int,
                 validation: Validation | None, folder: Path, model: Callable, copy,
                 feed: LossFeed):
        super().__init__(steps, node_id, feed)
        self.every, self.validation, self.folder = every, validation, folder
        self.model, self.copy = model, copy
        self.columns: dict[int, list[np.ndarray]] = {}
        self.last = -1

    def start(self, trainer) -> None:
        """See `Watcher.start`; also what was looked at in the run so far."""
        super().start(trainer)
        for path in sorted((self.folder / "previews").glob("step-*.png")):
            step = int(path.stem.split("-")[1])
            if step <= trainer.step and self.validation:
                rows = _rows(path, len(self.validation.prompts), self._looks())
                if rows:
                    self.columns[step] = rows
        if self.validation and self.every and trainer.step == 0:
            self.look(trainer)

    def end(self, trainer) -> str:
        """After the last step: a last look, unless it was just taken; what went wrong, or ""."""
        if not self.validation or self.last == trainer.step or not trainer.finished:
            return ""
        try:
            self.look(trainer)
        except (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError):
            return "The last validation pictures were not made; what was learnt is complete."
        return ""

    def preview(self, progress: Progress) -> tuple | None:
        """See `Watcher.preview`."""
        if not self.validation or not self.every or progress.record.step % self.every:
            return None
        self.look(progress.trainer)
        return ("JPEG", self.grid(), 768)

    def look(self, trainer) -> None:
        """Sample the validation prompts with what was learnt so far."""
        v = self.validation
        pictures = sample_pictures(self.model(trainer), v.clip, v.vae, v.prompts, v.settings)
        self.last = trainer.step
        self.columns[trainer.step] = [(p.numpy().clip(0, 1) * 255).round().astype(np.uint8)
                                      for p in pictures]
        told = PngInfo()
        told.add_text(LOOKS, self._looks())
        try:
            write_png(Image.fromarray(np.concatenate(self.columns[trainer.step])),
                      self.folder / "previews" / f"step-{trainer.step:06}.png", pnginfo=told)
        except OSError:
            pass  # the pictures are in the graph's outputs anyway
        # A small card may have had to make room for the decoder.
        comfy.model_management.load_models_gpu([self.copy], force_full_load=True)

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
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > LARGEST or image.info.get(LOOKS) != looks:
                return []
            column = np.asarray(image.convert("RGB"))
    except UNREADABLE:
        return []
    return np.split(column, count) if column.shape[0] % count == 0 else []
