"""MODEL in, quantized MODEL out: TuneQDM's one-time quantization inside the host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import comfy.model_management
import folder_paths
import torch
from comfy.utils import ProgressBar

from ..quant import (
    QuantizedCheckpoint,
    QuantizedWeight,
    QuantSpec,
    QuantTuneError,
    keep_float,
    shortcut_splits,
)
from ..quant.paging import PagedStore
from ..quant.plan import BitPlan
from .build import adopt, build_model, quantized_model
from .describe import describe
from .ops import QuantTuneOps, scaled_layers

PREFIX = "diffusion_model."
SCALES = (".weight_scale", ".weight_zero_point")
ALREADY = (
    "This MODEL's weights are quantized already, by ComfyUI or another loader (fp8 or int8 with "
    "scales, nvfp4, GGUF, bitsandbytes); load the fp16 or bf16 file of the same model instead, an "
    "int8 file with 'Load Quantized UNet', or put 'Export Float UNet' before this node.")
ATTRIBUTES = ("model_sampling", "latent_format", "model_type", "concat_keys")
"""What a MODEL may have of its own beside the defaults of its family."""


def quantize_model(patcher, spec: QuantSpec, keep: str | Collection[str] = "none",
                   name: str = "model", split_shortcuts: bool = True, dtypes: tuple | None = None,
                   rounded: Mapping[str, QuantizedWeight] | None = None,
                   plan: BitPlan | None = None, disable_dynamic: bool = False):
    """Quantize every Linear and Conv2d of a MODEL's diffusion model except those kept in float.

    Args:
        patcher: any MODEL the host loaded whose diffusion model is built from its operations.
        spec: bits, symmetry and range.
        keep: a preset name or comma-separated patterns of layer names to keep (see
            ``quant.keep_float``), or those names themselves.
        name: what to call the model in messages and in files made from it.
        split_shortcuts: quantize the two inputs that meet in a UNet's shortcut convolutions apart.
        dtypes: ``(dtype of what stays float, dtype to compute in or None for the same)``; by
            default the source's.
        rounded: weights that were quantized already, by layer name (error feedback).
        plan: bits of single layers, in place of those of ``spec``; what it keeps in float is kept
            beside ``keep``.
        disable_dynamic: keep the host from streaming its weights (dynamic VRAM), for integer
            products, which need them where they are multiplied.

    Returns:
        ``(MODEL, report)``; patches (LoRA), wrappers and sampling changes of the source carry
        over. The source is left as it was.
    """
    if quantized_model(patcher) is not None:
        raise QuantTuneError(
            "This MODEL is quantized already; connect 'Quantize UNet' to the float model instead.")
    refuse_bypass_lora(patcher, "apply it after 'Quantize UNet' instead")
    source = patcher.model
    layers_by_name = quantizable_layers(source)
    kept = keep_float(list(layers_by_name), keep) if isinstance(keep, str) else set(keep)
    if not isinstance(keep, str):
        keep = ", ".join(sorted(keep))
    specs = {}
    if plan is not None:
        plan.check_layers(layers_by_name)
        kept |= plan.kept()
        specs = {n: replace(spec, bits=bits) for n, bits in plan.bits.items() if bits}
    if len(kept) == len(layers_by_name):
        what = f"'{keep}'" if plan is None else f"The plan '{plan.label}'"
        raise QuantTuneError(f"{what} keeps every layer in float, so that nothing would be "
                             "quantized; choose fewer layers to keep.")
    shapes = {layer: tuple(m.weight.shape) for layer, m in layers_by_name.items()}
    splits = shortcut_splits(shapes) if split_shortcuts else {}
    kept_by_host = originals(patcher)

    checkpoint = QuantizedCheckpoint(metadata=None, layers={}, floats={})
    report = QuantizationReport()
    progress = ProgressBar(len(layers_by_name))
    device = comfy.model_management.get_torch_device()
    put_aside = paged_weights() if disable_dynamic else None
    for key, entry in kept_by_host.items():
        local = key[len(PREFIX):]
        weight, convert = entry[0]
        layer = local.removesuffix(".weight")
        if local.endswith(".weight") and layer in layers_by_name and layer not in kept:
            comfy.model_management.throw_exception_if_processing_interrupted()
            original = convert(weight.to(device)).float()
            try:
                packed = (rounded or {}).get(layer)
                if packed is None:
                    packed = QuantizedWeight.quantize(original, specs.get(layer, spec),
                                                      splits.get(layer))
            except QuantTuneError as error:
                raise QuantTuneError(f"Layer '{layer}' of '{name}': {error}") from error
            report.add_layer(layer, original, packed, weight)
            packed = packed.to(torch.device("cpu"))
            checkpoint.layers[layer] = put_aside(packed) if put_aside else packed
            progress.update(1)
        elif weight is not None:
            value = convert(weight).detach().to("cpu")
            report.add_float(value)
            checkpoint.floats[local] = value
    checkpoint.metadata = describe(source, name, {
        "source": name, "bits": spec.bits, "symmetric": spec.symmetric,
        "range": str(getattr(spec.range, "value", spec.range)), "keep": keep,
        "split_shortcuts": split_shortcuts, **({"plan": plan.label} if plan is not None else {})})

    return model_over(patcher, checkpoint, name, dtypes, disable_dynamic), report


def paged_weights():
    """A function that moves quantized weights for integer products where they take no memory.

    On a processor such products keep weights of their own (`int8.prepare`); elsewhere the function
    gives back what it is given.
    """
    if comfy.model_management.get_torch_device().type != "cpu":
        return lambda weight: weight
    store = PagedStore(folder_paths.get_temp_directory())
    return lambda weight: replace(weight, packed=store.put(weight.packed))


def float_model(patcher, name: str = "model", dtypes: tuple | None = None):
    """The float MODEL ``patcher`` over layers of ours, none of them quantized.

    Its layers compute as those do that a plan keeps in float. The host does not stream its weights.

    Args:
        patcher: as for `quantize_model`; patches, wrappers and sampling changes carry over.
        name, dtypes: as there.
    """
    refuse_bypass_lora(patcher, "use 'Load LoRA' for the measurement")
    floats = {key[len(PREFIX):]: entry[0][1](entry[0][0]).detach().to("cpu")
              for key, entry in originals(patcher).items() if entry[0][0] is not None}
    checkpoint = QuantizedCheckpoint(describe(patcher.model, name, {"source": name}), {}, floats)
    return model_over(patcher, checkpoint, name, dtypes, disable_dynamic=True)


def refuse_bypass_lora(patcher, instead: str) -> None:
    """Raise QuantTuneError for a MODEL with a bypass LoRA, whose hooks are on its own layers."""
    if patcher.injections:
        raise QuantTuneError("This MODEL carries a bypass LoRA, which would stay on the float "
                             f"model; {instead}.")


def originals(patcher) -> dict:
    """The host's weights of the diffusion model by key, each with how to bring it to float.

    Raises QuantTuneError for weights that the host or another loader quantized.
    """
    try:
        found = patcher.get_key_patches(PREFIX)
    except AttributeError as error:
        raise QuantTuneError(ALREADY) from error
    for key, (first, *_) in found.items():
        if key.endswith(".weight") and first[0] is not None and not first[0].is_floating_point():
            raise QuantTuneError(ALREADY)
    # Of packed layers their scales are listed, too, since they take memory.
    return {key: entry for key, entry in found.items() if not key.endswith(SCALES)}


def model_over(patcher, checkpoint: QuantizedCheckpoint, name: str, dtypes: tuple | None = None,
               disable_dynamic: bool = False):
    """A clone of a MODEL, its patches and sampling changes included, over other weights.

    Args:
        patcher: a MODEL of the same architecture, float or quantized.
        checkpoint: the weights.
        name: what to call the model.
        dtypes, disable_dynamic: as in `quantize_model`.
    """
    source = patcher.model
    own, own_cast = own_attributes(patcher)
    dtypes = dtypes or (source.get_dtype(), own_cast)
    built = build_model(checkpoint, name, dtypes, own, disable_dynamic)
    return adopt(patcher, built, disable_dynamic)


def own_attributes(patcher) -> tuple[dict, torch.dtype | None]:
    """What a MODEL has of its own beside the defaults of its family, and what it casts to."""
    source = patcher.model
    # The shared model may still carry a clone's object patch from the last sampling.
    own = {name: patcher.object_patches_backup.get(name, getattr(source, name))
           for name in (*ATTRIBUTES, "manual_cast_dtype") if hasattr(source, name)}
    own_cast = own.pop("manual_cast_dtype")
    return own, own_cast


def quantizable_layers(source) -> dict[str, torch.nn.Module]:
    """Layers that become ours when the same UNet is built with our operations, by name."""
    config = dict(source.model_config.unet_config)
    try:
        skeleton = type(source.diffusion_model)(**config, device="meta", operations=QuantTuneOps)
    except TypeError as error:
        raise QuantTuneError(
            f"A {type(source).__name__} model cannot be quantized ({error}); use an SD1.x, SD2.x, "
            "SDXL or another diffusion model loaded by ComfyUI's own loaders.") from error
    layers = scaled_layers(skeleton)
    if not layers:
        raise QuantTuneError("This MODEL has no Linear or Conv2d layer to quantize.")
    return layers


class QuantizationReport:
    """Sizes before and after and the weight error, gathered layer by layer."""

    def __init__(self):
        self.layers, self.bytes_before, self.bytes_after, self.float_bytes = 0, 0, 0, 0
        self.squared_error, self.squared_norm = 0.0, 0.0
        self.worst = ("", 0.0)

    def add_layer(self, name, original, packed, stored):
        """Count one quantized layer: float ``original``, its ``packed`` form, ``stored`` tensor."""
        error = float((packed.dequantize() - original).square().sum())
        norm = float(original.square().sum())
        self.layers += 1
        self.bytes_before += stored.nbytes
        self.bytes_after += packed.nbytes
        self.squared_error += error
        self.squared_norm += norm
        relative = (error / norm) ** 0.5 if norm else 0.0
        if relative >= self.worst[1]:
            self.worst = (name, relative)

    def add_float(self, value):
        """Count a tensor that stays in float."""
        self.float_bytes += value.nbytes

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the change of all quantized weights over that of the weights."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0

    def __str__(self):
        before, after = self.bytes_before + self.float_bytes, self.bytes_after + self.float_bytes
        worst_layer, worst = self.worst
        return (
            f"{self.layers} layers quantized, {self.float_bytes / 2**20:.2f} MiB kept in float\n"
            f"Size {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB "
            f"({after / max(before, 1):.2f} x)\n"
            f"Weight error {100 * self.relative_error:.2f} % (largest {100 * worst:.2f} % in "
            f"{worst_layer})")
