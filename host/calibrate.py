"""Static INT8 (Diffusia's PTQ): ranges of the activations from calibration data, and weights
rounded with their help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase

import comfy.model_management
import torch

from ..quant import QuantSpec, QuantTuneError, shortcut_splits
from ..quant.int8 import ActivationRanges, RangeEstimator
from ..quant.spec import check_bits
from . import int8
from .build import ATTACHMENT, QuantizedModel, quantized_model
from .calibration_run import CalibrationRun
from .dynamic_int8 import CALIBRATED, SPEC, compute_dtype, dynamic_int8, kept_layers
from .layout import is_uniform
from .observe import ActivationWatch, ForwardRecord
from .ops import scaled_layers
from .patches import changes_digest
from .quantize import quantizable_layers, quantize_model, refuse_bypass_lora
from .routing import OPTION as ROUTER
from .samples import Samples

NEAREST, GPTQ = "nearest", "gptq"
ROUNDINGS = (NEAREST, GPTQ)
CROSS_ATTENTION = ("*.attn2.*", "*cross_attn*", "*cross_attention*")
"""Layers that read the prompt, or what is compared with it."""


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
    run = CalibrationRun(patcher, samples, splits, how)
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
