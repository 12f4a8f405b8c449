"""Static INT8 (Diffusia's PTQ): ranges of the activations from calibration data, and weights
rounded with their help."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import comfy.model_management
import folder_paths
import latent_preview
import torch
from comfy.utils import ProgressBar

from ..quant import QuantizedWeight, QuantSpec, QuantTuneError, shortcut_splits
from ..quant.gptq import InputMoments, gptq_quantize
from ..quant.int8 import ActivationRanges, RangeEstimator
from ..quant.spec import check_bits
from ..training.state import load_state, save_state
from . import int8
from .build import ATTACHMENT, QuantizedModel, quantized_model
from .dynamic_int8 import CALIBRATED, SPEC, compute_dtype, dynamic_int8, kept_layers
from .identity import identity_of
from .layout import is_uniform
from .observe import ActivationWatch, ForwardRecord
from .ops import scaled_layers
from .patches import changes_digest
from .quantize import quantizable_layers, quantize_model, refuse_bypass_lora
from .routing import OPTION as ROUTER
from .run import RUNS
from .samples import Samples

NEAREST, GPTQ = "nearest", "gptq"
ROUNDINGS = (NEAREST, GPTQ)
CROSS_ATTENTION = ("*.attn2.*", "*cross_attn*", "*cross_attention*")
"""Layers that read the prompt, or what is compared with it."""
MOMENT_ROWS = 8192
"""Positions a layer, over all samples, that error feedback learns from."""
MOMENT_BYTES = 3 * 2**30
"""Of the moments kept at once; layers that do not fit wait for another pass over the samples."""
SAVE_SECONDS = 60
"""Between two savings of what was observed; a crash loses no more."""
CHECKED = 4
"""Forwards on which the result is compared with the model before."""


@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    Attributes:
        samples: forwards of the model to look at, at least.
        estimator: how ranges are chosen, see `quant.int8.RangeEstimator`.
        percentile: of `RangeEstimator.PERCENTILE`.
        timestep_buckets: N equal intervals of the denoising timesteps with ranges of their own.
        dynamic_cross_attention: leave `CROSS_ATTENTION` to ranges found at run time.
        bits: of the weights of a float MODEL.
        rounding: of those weights: "nearest", or "gptq" with error feedback.
        layers: a key of ``dynamic_int8.LAYERS``.
        precision: of everything else, one of ``dynamic_int8.PRECISIONS``.
        steps, cfg, sampler, scheduler: as in the host's KSampler.
        seed: of the first sample's noise.
    """

    samples: int = 100
    estimator: RangeEstimator = RangeEstimator.MSE
    percentile: float = 99.9
    timestep_buckets: int = 4
    dynamic_cross_attention: bool = True
    bits: int = 8
    rounding: str = NEAREST
    layers: str = "all"
    precision: str = "auto"
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "estimator", RangeEstimator(self.estimator))
        check_bits(self.bits)
        for name, low in (("samples", 1), ("timestep_buckets", 1), ("steps", 1)):
            if getattr(self, name) < low:
                raise QuantTuneError(f"{name} is {getattr(self, name)}; it has to be at least "
                                     f"{low}.")
        if not 50 < self.percentile <= 100:
            raise QuantTuneError(f"The percentile is {self.percentile}; it has to be above 50 and "
                                 "at most 100.")
        if self.rounding not in ROUNDINGS:
            raise QuantTuneError(f"The rounding is '{self.rounding}'; it has to be one of "
                                 f"{', '.join(ROUNDINGS)}.")

    @property
    def spec(self) -> QuantSpec:
        """How the weights of a float MODEL are quantized."""
        if self.bits == 8:
            return SPEC
        return QuantSpec(self.bits, range="mse")


def calibrate(patcher, latent: dict, positive: Sequence, negative: Sequence = (),
              how: Calibration | None = None, name: str = "model"):
    """A MODEL that multiplies integers with static activation ranges.

    An interrupt keeps what was observed on disk, and the same calibration goes on from there.

    Args:
        patcher: a float MODEL, which is quantized here, or a quantized one, which keeps its
            integers. LoRAs and scales that it carries are part of what is observed.
        latent: the host's LATENT; zeros to generate from noise.
        positive: CONDITIONING; each entry is a prompt of its own.
        negative: CONDITIONING, or empty.
        how: settings.
        name: what to call the model.

    Returns:
        ``(MODEL, report)``.

    Raises:
        QuantTuneError: nothing to calibrate with, NaN in the model, settings that do not fit.
    """
    how = how or Calibration()
    own = quantized_model(patcher)
    if own is not None and how.rounding != NEAREST:
        raise QuantTuneError(
            f"This MODEL is quantized already, so '{how.rounding}' has no float weights to round; "
            "connect the float model, or set rounding to 'nearest'.")
    if int8.OPTION in patcher.model_options["transformer_options"]:
        patcher = patcher.clone()
        patcher.model_options["transformer_options"].pop(int8.OPTION)
    if own is None:
        refuse_bypass_lora(patcher, "apply it after 'Calibrate INT8' instead")
    samples = Samples(latent, positive, negative, how)
    modules, kept, splits = _layers(patcher, how)
    run = _Run(patcher, samples, splits, how)
    rounded = run.weights(modules, kept) if how.rounding == GPTQ else {}
    run.observe()
    ranges = _ranges(run.watch, how)
    lines = [_found_on(samples, how, len(ranges.layers), len(modules))]
    if own is None:
        dtype = compute_dtype(how.precision, comfy.model_management.get_torch_device())
        quantized, report = quantize_model(
            patcher, how.spec, kept, name, dtypes=None if dtype is None else (dtype, None),
            rounded=rounded, disable_dynamic=True)
        lines.append(str(report))
    else:
        quantized = patcher.clone()
    checkpoint = quantized_model(quantized).checkpoint
    router = patcher.model_options["transformer_options"].get(ROUTER)
    facts = {**asdict(how), "estimator": how.estimator.value, "prompts": len(samples.positive),
             "scales": "" if router is None else router.digest,
             "patches": changes_digest(patcher)}
    checkpoint = replace(checkpoint, ranges=ranges,
                         metadata=replace(checkpoint.metadata, calibration=facts))
    quantized.set_attachments(ATTACHMENT, QuantizedModel(checkpoint, quantized_model(
        quantized).name))
    result, note = dynamic_int8(quantized, how.layers, how.precision, ranges=CALIBRATED, name=name)
    lines += [note, _compared(run.record, result)]
    if samples.unused:
        lines.append(samples.unused)
    run.forget()
    int8.rest(result.model)
    return result, "\n".join(lines)


def _found_on(samples: Samples, how: Calibration, calibrated: int, layers: int) -> str:
    what = "noised latents"
    if samples.generates:
        what = f"denoisings of {how.steps} steps"
    each = "all timesteps" if how.timestep_buckets == 1 else (
        f"each of {how.timestep_buckets} intervals of the timesteps")
    return (f"{calibrated} of {layers} layers have static ranges for {each} "
            f"({how.estimator.value}), found on {len(samples)} {what} with "
            f"{min(len(samples), len(samples.positive))} prompts.")


def _layers(patcher, how: Calibration):
    """Float or quantized layers by name, those that stay in float, and the splits of the rest."""
    if quantized_model(patcher) is None:
        modules = quantizable_layers(patcher.model)
        splits = shortcut_splits({n: tuple(m.weight.shape) for n, m in modules.items()})
    else:
        modules = scaled_layers(patcher.model.diffusion_model)
        modules = {n: m for n, m in modules.items() if is_uniform(m.weight)}
        splits = {n: m.scale_split() for n, m in modules.items()}
    kept = kept_layers(modules, how.layers)
    observed = {
        n: splits.get(n) for n in modules if n not in kept and not (
            how.dynamic_cross_attention and any(fnmatchcase(n, p) for p in CROSS_ATTENTION))}
    if not observed:
        raise QuantTuneError("No layer is left to calibrate; choose more layers, or switch "
                             "dynamic_cross_attention off.")
    return modules, kept, observed


class _Run:
    """The passes over the samples, with a state on disk."""

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


def _ranges(watch: ActivationWatch, how: Calibration) -> ActivationRanges:
    """The chosen ranges; a bucket that no step fell into takes those of the nearest one."""
    layers = {}
    for name, buckets in watch.observers.items():
        seen = [i for i, parts in enumerate(buckets) if any(o.width for o in parts)]
        if not seen:
            continue  # a layer that is never called, or reads zeros only
        nearest = [min(seen, key=lambda j, i=i: (abs(i - j), j)) for i in range(len(buckets))]
        found = {i: [o.range(how.estimator, how.percentile) for o in buckets[i]] for i in seen}
        layers[name] = torch.tensor([found[i] for i in nearest], dtype=torch.float32)
    return ActivationRanges(layers)


def _compared(record: ForwardRecord, result) -> str:
    """How far the outputs are from those of the model before, and with ranges of the moment."""
    options = result.model_options["transformer_options"]
    if int8.OPTION not in options:
        return "Its error is not known: nothing here multiplies integers."
    comfy.model_management.load_models_gpu([result])
    static = record.error(result)
    mode = options[int8.OPTION]
    try:
        options[int8.OPTION] = replace(mode, ranges=None)
        dynamic = record.error(result)
        del options[int8.OPTION]
        alone = record.error(result)
    finally:
        options[int8.OPTION] = mode
    return (f"Output error against the model before, on {len(record.calls)} forwards: "
            f"{static:.2%} with these ranges, {dynamic:.2%} with those of the moment, {alone:.2%} "
            "of it from the weights.")


