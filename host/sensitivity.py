"""Layer sensitivity inside the host: one layer at a time is quantized, the rest stays float."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import comfy.model_management
import comfy.utils
import torch

from ..metrics.sensitivity import INT8, PRECISIONS, Sensitivity, bits_of
from ..quant import QuantizedWeight, QuantSpec, QuantTuneError, shortcut_splits
from ..quant.groups import group_of
from ..quant.int8 import quantize_tensor
from ..quant.limits import is_finite
from .build import quantized_model, resident
from .explain import explained
from .identity import identity_of
from .observe import ForwardRecord
from .quantize import quantizable_layers
from .replay import Replay
from .routing import buckets_of
from .samples import Samples, digest_of

UNITS = ("layer", "group")
REPEATED = 1e-2
"""Relative difference up to which a repeated forward is the recorded one: other kernels may run."""
BROKEN = 1e6
"""Squared error that stands for an output that is NaN or infinite."""


@dataclass(frozen=True)
class SensitivitySettings:
    """How a sensitivity is measured.

    Attributes:
        precisions: of ``metrics.sensitivity.PRECISIONS``.
        unit: "layer", or "group" to quantize all layers of a kind at once.
        forwards: forwards of the model that every change is judged on, spread over the samples.
        timestep_buckets: intervals of the timesteps that are told apart.
        range: how the range of a weight is chosen, as in *Quantize UNet*.
        samples: pictures that are sampled for these forwards, a prompt each; steps, cfg, sampler,
            scheduler, seed: how.
    """

    precisions: tuple[str, ...] = ("8", "4")
    unit: str = "layer"
    forwards: int = 8
    timestep_buckets: int = 4
    range: str = "mse"
    samples: int = 80
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.precisions:
            raise QuantTuneError("No precision is chosen; switch on at least one of "
                                 f"{', '.join(PRECISIONS)}.")
        if unknown := set(self.precisions) - set(PRECISIONS):
            raise QuantTuneError(f"There is no precision '{min(unknown)}'; choose of "
                                 f"{', '.join(PRECISIONS)}.")
        if self.unit not in UNITS:
            raise QuantTuneError(f"The unit is '{self.unit}', but it has to be 'layer' or 'group'.")
        for name in ("forwards", "timestep_buckets", "samples", "steps"):
            if getattr(self, name) < 1:
                raise QuantTuneError(f"The setting {name} is {getattr(self, name)}, but it has to "
                                     "be at least 1.")


_DONE: dict[str, dict] = {}
"""What a measurement that was stopped has found, so that it goes on; one is kept."""


def layer_sensitivity(patcher, latent: dict, positive: Sequence, negative: Sequence,
                      how: SensitivitySettings, node_id: str | None = None) -> Sensitivity:
    """Measure what each layer's quantization alone does to the output of a float MODEL.

    The same recorded forwards are repeated for each change, from the block that it is in on (see
    `replay.Replay`), weights being swapped in place and put back. The host's Stop ends it; queued
    again in the same session it goes on.

    Raises:
        QuantTuneError: a quantized MODEL, no prompt or latent, or an output that is not finite.
    """
    if quantized_model(patcher) is not None:
        raise QuantTuneError("This MODEL is quantized already; connect the float model, whose "
                             "layers are quantized one at a time.")
    patcher = resident(patcher)
    layers = quantizable_layers(patcher.model)
    shapes = {name: tuple(m.weight.shape) for name, m in layers.items()}
    splits = shortcut_splits(shapes)
    units = _units(shapes, how.unit)
    samples = Samples(latent, positive, negative, how)
    record = record_forwards(patcher, samples, how.forwards)
    buckets = [_bucket(patcher, record, i, how.timestep_buckets) for i in range(len(record.calls))]
    # With the outputs: of patches that are functions the identity knows nothing.
    key = repr((identity_of(patcher), asdict(how), samples.key(),
                digest_of([output for _, _, output in record.calls])))
    if key not in _DONE:
        _DONE.clear()
    done = _DONE.setdefault(key, {})
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    dtype = patcher.model.manual_cast_dtype or torch.float16
    modules = dict(patcher.model.diffusion_model.named_modules())
    missing = any((u, p) not in done for u in units for p in how.precisions)
    replay = Replay(record, patcher) if missing else None
    bar = comfy.utils.ProgressBar(len(units) * len(how.precisions), node_id=node_id)
    rows = []
    for unit, names in units.items():
        for precision in how.precisions:
            if (unit, precision) not in done:
                comfy.model_management.throw_exception_if_processing_interrupted()
                own = {n: modules[n] for n in names}
                with _quantized(own, precision, how.range, splits, patcher.load_device, dtype):
                    done[unit, precision] = _errors(replay, names)
            rows.append(done[unit, precision])
            bar.update(1)
    errors = torch.tensor(rows, dtype=torch.float64).view(len(units), len(how.precisions), -1)
    own_bucket = torch.tensor(buckets)
    forwards = tuple(int((own_bucket == b).sum()) for b in range(how.timestep_buckets))
    # It is there for a measurement that was stopped; another one may differ in what no key tells.
    _DONE.clear()
    by_bucket = torch.stack([errors[..., own_bucket == b].mean(-1)
                             for b in range(how.timestep_buckets)], dim=-1)
    return Sensitivity(units, shapes, dict.fromkeys(splits, 2), how.precisions, by_bucket, forwards)


def _units(shapes: Mapping[str, tuple], unit: str) -> dict[str, tuple[str, ...]]:
    if unit == "layer":
        return {name: (name,) for name in shapes}
    found: dict[str, list[str]] = {}
    for name in shapes:
        found.setdefault(group_of(name), []).append(name)
    return {group: tuple(names) for group, names in found.items()}


def record_forwards(patcher, samples: Samples, forwards: int) -> ForwardRecord:
    """So many forwards: prompts in turn, steps at regular distances over the denoising.

    Raises QuantTuneError when there is none, when they are not finite, or when repeating one
    outside of the sampler gives something else.
    """
    count, steps = len(samples), samples.how.steps
    wanted: dict[int, list[int]] = {}
    if samples.generates:
        for j in range(forwards):
            wanted.setdefault(j % count, []).append(int((j + 0.5) * steps / forwards))
    else:
        # Given latents are noised to timesteps that rise with the index.
        wanted = {int((j + 0.5) * count / forwards): [0] for j in range(forwards)}

    def is_wanted(number):
        # By the noise level: some samplers run the model several times in a step.
        step = _step_of(record.options)
        if step not in wanted[index]:
            return False
        wanted[index].remove(step)
        return True

    record = ForwardRecord(is_wanted)
    with record.recording(patcher.model.diffusion_model):
        for index in sorted(wanted):
            samples.run(patcher, index)
    if not record.calls:
        raise QuantTuneError("The model was not run once; use more samples or fewer forwards.")
    if not all(is_finite(output) for _, _, output in record.calls):
        raise QuantTuneError("The MODEL computes NaN or infinite values already in float; use a "
                             "precision it can run in, or another file.")
    comfy.model_management.load_models_gpu([patcher])
    with explained("The forwards of this MODEL cannot be repeated outside of the sampler "
                   "({reason}); measure it without its patches."):
        difference = record.error(patcher, [0, len(record.calls) - 1])
    if not difference < REPEATED:
        raise QuantTuneError(
            f"The forwards of this MODEL come out differently ({difference:.1%}) when they are "
            "repeated outside of the sampler, perhaps because of a LoRA scheduled by hooks; "
            "measure it without what changes it while it samples.")
    return record


def _step_of(options: dict) -> int:
    """Which step of its sampler a forward belongs to, by the transformer options it is given."""
    steps, sigma = options.get("sample_sigmas"), options.get("sigmas")
    if steps is None or sigma is None:
        return 0
    return int((steps[:-1].float().cpu() - float(sigma.flatten()[0])).abs().argmin())


def _bucket(patcher, record: ForwardRecord, index: int, count: int) -> int:
    timesteps = record.timesteps(index)
    if timesteps is None or count == 1:
        return 0
    return max(buckets_of(timesteps, patcher.model.model_sampling, count))


def _errors(replay: Replay, changed: Sequence[str]) -> list[float]:
    """Squared relative error of each recorded forward, ``changed`` being the layers that were."""
    found = []
    for index, (_, _, output) in enumerate(replay.record.calls):
        again = replay.again(index, changed).float().cpu()
        norm = float(output.square().sum())
        error = float((again - output).square().sum()) / max(norm, 1e-30)
        found.append(error if math.isfinite(error) else BROKEN)
    return found


@contextmanager
def _quantized(modules: Mapping[str, torch.nn.Module], precision: str, range_: str,
               splits: Mapping[str, int], device, dtype) -> Iterator[None]:
    """Some layers of the loaded model with quantized weights, and inputs for `INT8`, inside.

    ``dtype`` is for weights that are stored in fp8, which would be rounded to that again.
    """
    originals, hooks = {}, []
    spec = QuantSpec(bits_of(precision), symmetric=precision == INT8,
                     range="minmax" if precision == INT8 else range_)
    try:
        for name, module in modules.items():
            weight = originals[name] = module._parameters["weight"]
            packed = QuantizedWeight.quantize(weight.to(device).float(), spec, splits.get(name))
            kept = weight.dtype if weight.dtype.itemsize > 1 else dtype
            changed = packed.dequantize().to(weight.device, kept)
            module._parameters["weight"] = torch.nn.Parameter(changed, requires_grad=False)
            if precision == INT8:
                hooks.append(module.register_forward_pre_hook(_rounded(splits.get(name))))
        yield
    finally:
        for name, weight in originals.items():
            modules[name]._parameters["weight"] = weight
        for hook in hooks:
            hook.remove()


def _rounded(split: int | None):
    """A hook that rounds a layer's input to 8 bits, by the range of the moment."""
    def hook(module, args):
        x = args[0]
        channels = 1 if isinstance(module, torch.nn.Conv2d) else -1
        parts = [x] if split is None else x.tensor_split([split], dim=channels)
        rounded = torch.cat([quantize_tensor(p).dequantize() for p in parts], dim=channels)
        return rounded.to(x.dtype), *args[1:]
    return hook
