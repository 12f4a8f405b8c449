"""The passes of a calibration over its samples, which an interrupt does not undo."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import folder_paths
import latent_preview
import torch
from comfy.utils import ProgressBar

from ..quant import QuantizedWeight, QuantTuneError, shortcut_splits
from ..quant.gptq import InputMoments, gptq_quantize
from ..training.state import load_state, save_state
from .identity import identity_of
from .observe import ActivationWatch, ForwardRecord
from .run import RUNS
from .samples import Samples

if TYPE_CHECKING:
    from .calibrate import Calibration

MOMENT_ROWS = 8192
"""Positions a layer, over all samples, that error feedback learns from."""
MOMENT_BYTES = 3 * 2**30
"""Of the moments kept at once; layers that do not fit wait for another pass over the samples."""
SAVE_SECONDS = 60
"""Between two savings of what was observed; a crash loses no more."""
CHECKED = 4
"""Forwards on which the result is compared with the model before."""


class CalibrationRun:
    """The passes over the samples, with a state on disk.

    Attributes:
        watch: what was observed of each layer.
        record: a few forwards, to compare the result with.
        folder: of the state; the same calibration of the same model goes on from there.
    """

    def __init__(self, patcher, samples: Samples, splits, how: Calibration):
        self.patcher, self.samples, self.how = patcher, samples, how
        self.watch = ActivationWatch(patcher, splits, how.timestep_buckets)
        self.watch.rows = max(1, math.ceil(MOMENT_ROWS / (len(samples) * samples.forwards)))
        total = len(samples) * samples.forwards
        wanted = {int((i + 0.5) * total / CHECKED) for i in range(CHECKED)}
        self.record = ForwardRecord(wanted.__contains__)
        self.key = hashlib.sha256(repr((
            asdict(how), samples.key(), identity_of(patcher), sorted(splits.items(), key=str),
        )).encode()).hexdigest()[:32]
        self.folder = Path(folder_paths.get_output_directory()) / RUNS / ".calibration" / self.key
        self.saved = time.monotonic()
        self.state, self.rounded = {"done": 0, "observers": None, "weights": {}}, {}
        try:
            self._restore(load_state(self.folder) or self.state)
        except (QuantTuneError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            self.forget()  # damaged, or of a version before: the work is done again
            rows, self.watch = self.watch.rows, ActivationWatch(patcher, splits,
                                                                how.timestep_buckets)
            self.watch.rows = rows

    def _restore(self, state: dict) -> None:
        weights = {n: _unpacked(w) for n, w in state["weights"].items()}
        done, observers = int(state["done"]), state["observers"]
        if (observers is None) != (done == 0) or not 0 <= done <= len(self.samples):
            raise ValueError("observations of another number of samples")
        if observers is not None:
            if observers.keys() != self.watch.splits.keys():
                raise ValueError("observations of other layers")
            self.watch.restore(observers)
        self.state, self.rounded = {"done": done, "observers": observers,
                                    "weights": dict(state["weights"])}, weights

    def forget(self) -> None:
        """Delete the state."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def observe(self) -> None:
        """Find the ranges of all layers."""
        unet = self.patcher.model.diffusion_model
        with self.watch.watching(), self.record.recording(unet):
            self._pass(self.state["done"], self._keep_ranges)
        if not self.record.calls:
            with self.record.recording(unet):
                self.samples.run(self.patcher, 0)

    def _keep_ranges(self, done: int) -> None:
        self.state |= {"done": done, "observers": self.watch.state()}
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()

    def weights(self, modules: dict, kept) -> dict[str, QuantizedWeight]:
        """Weights rounded with error feedback, as many layers a pass as `MOMENT_BYTES` hold."""
        splits = shortcut_splits({n: tuple(m.weight.shape) for n, m in modules.items()})
        originals = self.patcher.get_key_patches("diffusion_model.")
        device, budget = _moments_at()
        done = self.rounded
        left = [n for n, m in modules.items() if n not in kept and n not in done
                and getattr(m, "groups", 1) == 1 and not isinstance(
                    getattr(m, "padding", None), str)]
        while left:
            group, size = [], 0
            while left and (not group or size + _moment_bytes(modules[left[0]]) <= budget):
                size += _moment_bytes(modules[left[0]])
                group.append(left.pop(0))
            self.watch.moments = {n: InputMoments(math.prod(modules[n].weight.shape[1:]), device)
                                  for n in group}
            with self.watch.watching(ranges=False):
                self._pass(0, lambda _: None)
            try:
                for name in group:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    weight, convert = originals[f"diffusion_model.{name}.weight"][0]
                    moments = self.watch.moments.pop(name)
                    if not moments.count:
                        continue  # a layer that this model never calls is rounded to nearest
                    done[name] = gptq_quantize(convert(weight).float(), moments, self.how.spec,
                                               splits.get(name))
                    self.state["weights"][name] = _packed(done[name])
            finally:
                self._save()
        return done

    def _pass(self, first: int, keep) -> None:
        """Run the samples from ``first`` on; what is interrupted is saved after the last whole."""
        each = self.samples.forwards
        bar = ProgressBar(len(self.samples) * each)
        previewer = latent_preview.get_previewer(
            self.patcher.load_device, self.patcher.get_model_object("latent_format"))

        def show(step, clean, noisy, steps):
            picture = previewer and previewer.decode_latent_to_preview_image("JPEG", clean)
            bar.update_absolute(min(index * each + step + 1, bar.total), preview=picture or None)

        try:
            for index in range(first, len(self.samples)):
                self.watch.seed(self.how.seed + index)
                self.samples.run(self.patcher, index, show)
                keep(index + 1)
        except BaseException:
            if self.state["done"] or self.state["weights"]:
                self._save()
            raise

    def _save(self) -> None:
        self.saved = time.monotonic()
        try:
            save_state(self.folder, self.state)
        except QuantTuneError:
            pass  # without a state the work is done again


def _moments_at() -> tuple[torch.device, int]:
    """Where second moments are summed up and weights rounded, and how many bytes at once."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        # As much again for the inverse and its root.
        share = int(comfy.model_management.get_free_memory(device) / 4)
        if share > MOMENT_BYTES:
            return device, MOMENT_BYTES
    return torch.device("cpu"), MOMENT_BYTES


def _moment_bytes(module) -> int:
    return 4 * math.prod(module.weight.shape[1:]) ** 2


def _packed(weight: QuantizedWeight) -> dict:
    return {k: getattr(weight, k) for k in ("packed", "scale", "zero_point", "bits", "split",
                                            "symmetric")} | {"shape": list(weight.shape)}


def _unpacked(facts: dict) -> QuantizedWeight:
    return QuantizedWeight(**{**facts, "shape": tuple(facts["shape"])})
