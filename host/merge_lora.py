"""A LoRA into the integers of a quantized MODEL, for those who want one file."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace

import comfy.lora
import comfy.model_management
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ..quant import QuantizedCheckpoint, QuantizedWeight, QuantSpec, QuantTuneError
from ..quant.limits import is_finite
from .build import quantized_model
from .int8 import OPTION as INT8
from .quantize import PREFIX, model_over
from .routing import OPTION as ROUTER

AS_IT_IS = 0
"""In place of a bit width: each layer keeps its own."""
WORST = 3
"""So many layers are named in the report."""
ENOUGH = 0.5
"""A merge that keeps a smaller share of the LoRA is advised against."""


@dataclass(frozen=True)
class LayerMerge:
    """What rounding did to one merged layer; squared Frobenius norms.

    Attributes:
        layer: its name.
        error: of what came out against the exact sum of base and LoRA.
        norm: of the sum.
        change: of the LoRA alone, by which the base is off the sum.
        kept: of what came out minus the base, its inner product with the LoRA.
        bits: it was rounded to.
    """

    layer: str
    error: float
    norm: float
    change: float
    kept: float
    bits: int

    @property
    def relative_error(self) -> float:
        """Norm of the error over that of the sum."""
        return _root(self.error, self.norm)


class MergeReport:
    """The errors of a merge, by layer and over all."""

    def __init__(self):
        self.layers: list[LayerMerge] = []
        self.floats, self.unchanged = 0, 0

    def total(self, what: str) -> float:
        """Sum over the layers of an attribute of `LayerMerge`."""
        return sum(getattr(layer, what) for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """Norm of all errors over that of all sums."""
        return _root(self.total("error"), self.total("norm"))

    @property
    def relative_change(self) -> float:
        """The same of a base without the LoRA: what leaving it out would cost."""
        return _root(self.total("change"), self.total("norm"))

    @property
    def survived(self) -> float:
        """Share of the LoRA that the new integers hold: their change, projected onto it."""
        change = self.total("change")
        return self.total("kept") / change if change else 1.0

    def __str__(self):
        lines = [f"{len(self.layers)} layers merged and rounded to "
                 f"{_list(sorted({layer.bits for layer in self.layers}))} bits, {self.floats} "
                 "tensors merged in float"] if self.layers else [
                     f"{self.floats} tensors merged in float, no integers changed"]
        if self.unchanged:
            lines.append(f"{self.unchanged} layers have a LoRA that changes nothing")
        if self.layers:
            lines.append(f"Weight error {self.relative_error:.2%} of base + LoRA; the base without "
                         f"the LoRA is {self.relative_change:.2%} off")
            lines.append(f"{self.survived:.1%} of the LoRA is in the integers, under rounding "
                         f"noise {_root(self.total('error'), self.total('change')):.2g} times its "
                         "size")
            worst = sorted(self.layers, key=lambda layer: -layer.relative_error)[:WORST]
            lines.append("Largest: " + ", ".join(
                f"{w.layer} {w.relative_error:.2%} (LoRA {_root(w.change, w.norm):.2%})"
                for w in worst))
            if self.relative_error > self.relative_change or self.survived < ENOUGH:
                lines.append("Rounding loses most of the LoRA: merge into 8 bits, or keep the LoRA "
                             "as a file of its own, which costs no quality.")
        return "\n".join(lines)


def merge_lora(patcher, bits: int = AS_IT_IS, range: str = "mse"):
    """Put the LoRAs (and merges) on a quantized MODEL into its integers.

    Each layer is dequantized, patched by the host's own function, and quantized again; layers
    without a patch keep their very integers. Layers in float are patched in float.

    Args:
        patcher: a quantized MODEL with patches from 'Load LoRA', or any node like it.
        bits: of the layers that change; 0 for those that each has.
        range: how each output channel's range is chosen, see ``quant.QuantSpec``.

    Returns:
        ``(MODEL without patches, MergeReport)``. Scales that are applied stay applied. Calibrated
        activation ranges are left out, since they were found on the model without the LoRA.

    Raises:
        QuantTuneError: a MODEL without integers or without patches, a bypass LoRA, a patch that
            changes a shape or makes NaN.
    """
    own = quantized_model(patcher)
    if own is None:
        raise QuantTuneError("This MODEL is not quantized by QuantTune; merge after 'Quantize "
                             "UNet', or quantize a float model with its LoRA on it.")
    if patcher.injections:
        raise QuantTuneError("This MODEL carries a bypass LoRA, which cannot be merged; load it "
                             "with 'Load LoRA' instead.")
    checkpoint = own.checkpoint
    chosen = [key for key in patcher.patches if _layer(key) in checkpoint.layers
              or key.removeprefix(PREFIX) in checkpoint.floats]
    if not chosen:
        raise QuantTuneError("This MODEL has no LoRA on it; put 'Load LoRA' before 'Merge LoRA "
                             "into Quantized UNet'.")
    layers, floats, report = dict(checkpoint.layers), dict(checkpoint.floats), MergeReport()
    device = comfy.model_management.get_torch_device()
    progress = ProgressBar(len(chosen))
    for key in chosen:
        comfy.model_management.throw_exception_if_processing_interrupted()
        layer = _layer(key)
        packed = layers.get(layer)
        if packed is None:
            local = key.removeprefix(PREFIX)
            merged = patched_weight(patcher, key, floats[local].to(device, torch.float32))
            floats[local] = merged.to("cpu", floats[local].dtype)
            report.floats += 1
        else:
            spec = QuantSpec(bits or packed.bits, packed.symmetric, range)
            layers[layer] = _merged(patcher, key, packed.to(device), spec, report) or packed
        progress.update(1)
    provenance = {**checkpoint.metadata.provenance, "merged_lora": {
        "layers": len(report.layers), "bits": bits, "range": range}}
    metadata = replace(checkpoint.metadata, fingerprint="", calibration={}, provenance=provenance)
    bare = patcher.clone()
    bare.patches = {key: p for key, p in patcher.patches.items() if key not in chosen}
    bare.patches_uuid = uuid.uuid4()
    result = model_over(bare, QuantizedCheckpoint(metadata, layers, floats), own.name,
                        disable_dynamic=not patcher.is_dynamic())
    _rebind(result)
    return result, report


def notes(patcher) -> list[str]:
    """What merging changes besides the weights of a MODEL, a sentence each."""
    options = patcher.model_options["transformer_options"]
    lines = []
    if ROUTER in options:
        lines.append("The scales that are applied stay applied; they were trained on the model "
                     "without the LoRA.")
    if quantized_model(patcher).checkpoint.ranges is not None:
        lines.append("The calibrated activation ranges were found without the LoRA and are left "
                     "out; run 'Calibrate INT8' again for static ranges.")
    return lines


def _layer(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".weight")


def patched_weight(patcher, key: str, weight: Tensor) -> Tensor:
    """A float32 weight with its patches, by the host; may write into ``weight``."""
    shape = weight.shape
    weight = comfy.lora.calculate_weight(patcher.patches[key], weight, key)
    layer = _layer(key)
    if weight.shape != shape:
        raise QuantTuneError(f"The LoRA changes the shape of the layer '{layer}', which cannot be "
                             "merged; use it with 'Load LoRA'.")
    if not is_finite(weight):
        raise QuantTuneError(f"The LoRA makes NaN or infinite values of the layer '{layer}'; "
                             "lower its strength or use another file.")
    return weight


def _merged(patcher, key, packed: QuantizedWeight, spec: QuantSpec,
            report: MergeReport) -> QuantizedWeight | None:
    """The layer with its patches in new integers; None where they change nothing."""
    base = packed.dequantize()
    exact = patched_weight(patcher, key, base.clone())
    change = exact - base
    if not bool(change.any()):
        report.unchanged += 1
        return None
    merged = QuantizedWeight.quantize(exact, spec, packed.split)
    result = merged.dequantize()
    report.layers.append(LayerMerge(
        _layer(key), _square(result - exact), _square(exact), _square(change),
        float(((result - base) * change).sum(dtype=torch.float64)), spec.bits))
    return merged.to("cpu")


def _square(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _root(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0


def _list(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))


def _rebind(result) -> None:
    """Let what the clone took over act on the new model, not on the one it came from."""
    options = result.model_options["transformer_options"]
    if INT8 in options:
        options[INT8] = replace(options[INT8], ranges=None, model=result.model, scales="")
