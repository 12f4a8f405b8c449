"""MODEL in, MODEL with bitsandbytes' Linear layers out."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.utils import ProgressBar

from ..quant import QuantizedCheckpoint, QuantTuneError, keep_float
from .bnb import KINDS, LABELS, BnbWeight, bnb_weight, is_bnb
from .build import quantized_model
from .describe import describe
from .ops import scaled_layers
from .quantize import PREFIX, model_over, originals, quantizable_layers, refuse_bypass_lora


def quantize_bnb(patcher, kind: str = "nf4", keep: str = "none", name: str = "model"):
    """Quantize every Linear of a float MODEL with bitsandbytes' own quantizer.

    bitsandbytes has no convolution: those stay in the MODEL's own floats, of SD1.5 two thirds of
    all weights.

    Args:
        patcher: any float MODEL.
        kind: of `bnb.KINDS`.
        keep: Linear layers that stay in float, as in `quantize.quantize_model`.
        name: what to call the model in messages.

    Returns:
        ``(MODEL, report)``; patches, wrappers, scales and sampling changes carry over.

    Raises:
        QuantTuneError: an unknown kind, a MODEL that is quantized or carries a bypass LoRA, one
            without Linear layers, or no bitsandbytes.
    """
    if kind not in KINDS:
        raise QuantTuneError(f"kind is '{kind}', but it has to be one of {', '.join(KINDS)}.")
    if quantized_model(patcher) is not None or bnb_kind(patcher):
        raise QuantTuneError("This MODEL is quantized already; connect 'bitsandbytes Quantize' to "
                             "the float model instead.")
    refuse_bypass_lora(patcher, "apply it after 'bitsandbytes Quantize' instead")
    layers = {n for n, m in quantizable_layers(patcher.model).items()
              if isinstance(m, torch.nn.Linear)}
    chosen = layers - keep_float(sorted(layers), keep)
    if not chosen:
        raise QuantTuneError("No Linear layer of this MODEL is left to quantize, and bitsandbytes "
                             "has no convolution; use 'Quantize UNet'.")
    device = comfy.model_management.get_torch_device()
    checkpoint = QuantizedCheckpoint(describe(patcher.model, name, {"source": name}), {}, {})
    report, progress = BnbReport(kind), ProgressBar(len(chosen))
    for key, entry in originals(patcher).items():
        local = key.removeprefix(PREFIX)
        weight, convert = entry[0]
        if weight is None:
            continue
        layer = local.removesuffix(".weight")
        if layer in chosen and local != layer:
            comfy.model_management.throw_exception_if_processing_interrupted()
            original = convert(weight.to(device)).float()
            try:
                packed = BnbWeight.quantize(original, kind)
            except QuantTuneError as error:
                raise QuantTuneError(f"Layer '{layer}' of '{name}': {error}") from error
            report.add(original, packed, weight)
            checkpoint.layers[layer] = packed.to("cpu")
            progress.update(1)
        else:
            value = convert(weight).detach().to("cpu")
            report.float_bytes += value.nbytes
            checkpoint.floats[local] = value
    return model_over(patcher, checkpoint, name), report


def bnb_kind(patcher) -> str:
    """The kind of a MODEL's bitsandbytes layers, "" for a MODEL without any."""
    for layer in scaled_layers(patcher.model.diffusion_model).values():
        if is_bnb(layer.weight):
            return bnb_weight(layer.weight).kind
    return ""


class BnbReport:
    """Sizes before and after and the weight error."""

    def __init__(self, kind: str):
        self.kind, self.layers, self.float_bytes = kind, 0, 0
        self.before, self.after = 0, 0
        self.squared_error = self.squared_norm = 0.0

    def add(self, original, packed: BnbWeight, stored) -> None:
        """Count one layer: float ``original``, its ``packed`` form, ``stored`` tensor."""
        self.layers += 1
        self.before += stored.nbytes
        self.after += packed.nbytes
        self.squared_error += float((packed.dequantize() - original).square().sum())
        self.squared_norm += float(original.square().sum())

    @property
    def relative_error(self) -> float:
        """Norm of the change of the quantized weights over that of the weights."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0

    def __str__(self):
        before, after = self.before + self.float_bytes, self.after + self.float_bytes
        return (f"{self.layers} Linear layers in {LABELS[self.kind]}; convolutions and the rest, "
                f"{self.float_bytes / 2**20:.2f} MiB, stay in float (bitsandbytes has no "
                f"convolution)\nSize {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB "
                f"({after / max(before, 1):.2f} x)\nWeight error of the Linear layers "
                f"{100 * self.relative_error:.2f} %")
