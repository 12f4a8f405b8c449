"""A UNet of other programs, as the host's MODEL or straight to packed integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import torch
from comfy.utils import ProgressBar

from ..quant import (
    QuantizedCheckpoint,
    QuantizedWeight,
    QuantSpec,
    QuantTuneError,
    UNetMetadata,
    keep_float,
    shortcut_splits,
)
from ..quant.stream_checkpoint import LayerPlan
from .build import build_model, predict_as_described
from .describe import model_config
from .float_model import check_fits, float_model, unbuilt
from .precision import PRECISIONS, at_precision, check_precision
from .quantize import quantizable_layers
from .unet_files import find_unet_source
from .unet_source import UNetSource, open_unet


@dataclass(frozen=True)
class Quantization:
    """How a UNet that has not been read yet will be quantized.

    Attributes:
        source: the UNet.
        spec: bits, symmetry and range.
        layers: layer name to `LayerPlan`, in the model's order.
        floats: name to shape and dtype of every other tensor.
        metadata: of the file.
    """

    source: UNetSource
    spec: QuantSpec
    layers: dict[str, LayerPlan]
    floats: dict[str, tuple[tuple[int, ...], torch.dtype]]
    metadata: UNetMetadata

    def layer(self, name: str) -> QuantizedWeight:
        """Read and quantize one layer.

        Raises:
            QuantTuneError: NaN or infinite weights, or a file that cannot be read any more.
        """
        weight = self.source.read(f"{name}.weight").to(comfy.model_management.get_torch_device())
        return QuantizedWeight.quantize(weight, self.spec, self.layers[name].split).to("cpu")


def load_unet(name: str, precision: str = "float"):
    """Load a UNet by its listed name.

    Args:
        name: as `unet_files.unet_names` lists it.
        precision: a key of `precision.PRECISIONS`.

    Raises:
        QuantTuneError: nothing of that name, a folder or file that is not whole, another model.
    """
    check_precision(precision)
    path = find_unet_source(name)
    if PRECISIONS[precision] is not None:
        # Layer by layer: a float copy of the model would take many times the memory.
        return load_quantized(path, PRECISIONS[precision], name)
    model = load_float(path, name)
    return model if precision == "float" else at_precision(model, precision, name)


def load_float(path: Path | str, name: str | None = None, disable_dynamic: bool = False):
    """The float MODEL of a folder or file; also the factory the host reloads it with.

    Args:
        path: as for `unet_source.open_unet`.
        name: what to call it.
        disable_dynamic: keep the host from streaming its weights.
    """
    source = open_unet(path, name)
    config = _config(source)
    state = {key: source.read(key, mapped=True) for key in source.shapes}
    patcher = float_model(config, _constructor(config), state, source.where, disable_dynamic)
    predict_as_described(patcher.model, config, source.metadata.model_type)
    patcher.cached_patcher_init = (load_float, (str(path), name))
    return patcher


def load_quantized(path: Path | str, spec: QuantSpec, name: str | None = None):
    """The quantized MODEL of a folder or file, without its float model in between."""
    plan = plan_quantization(open_unet(path, name), spec)
    progress = ProgressBar(len(plan.layers))
    layers = {}
    for layer in plan.layers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        layers[layer] = plan.layer(layer)
        progress.update(1)
    floats = {key: plan.source.read(key) for key in plan.floats}
    return build_model(QuantizedCheckpoint(plan.metadata, layers, floats), plan.source.name)


def plan_quantization(source: UNetSource, spec: QuantSpec, keep: str = "none",
                      split_shortcuts: bool = True) -> Quantization:
    """Which layers of a UNet become integers; options as in `quantize.quantize_model`.

    Raises:
        QuantTuneError: tensors that do not fit the UNet, or nothing to quantize.
    """
    config = _config(source)
    config.set_inference_dtype(torch.float32, None)
    try:
        skeleton = _constructor(config)("meta")
    except Exception as error:  # the host's classes meet what may be a hostile description
        raise unbuilt(source.where, error) from error
    check_fits(skeleton.diffusion_model, source.shapes, source.where)
    modules = quantizable_layers(skeleton)
    kept = keep_float(list(modules), keep)
    if len(kept) == len(modules):
        raise QuantTuneError(f"'{keep}' keeps every layer in float, so that nothing would be "
                             "quantized; choose fewer layers to keep.")
    shapes = {name: source.shapes[f"{name}.weight"] for name in modules}
    splits = shortcut_splits(shapes) if split_shortcuts else {}
    # In the order of the host's state, as 'Quantize UNet' goes through it.
    names = [key.removesuffix(".weight") for key in skeleton.diffusion_model.state_dict()
             if key.endswith(".weight")]
    layers = {name: LayerPlan(shapes[name], spec.bits, spec.symmetric, splits.get(name))
              for name in names if name in modules and name not in kept}
    floats = {key: (shape, source.dtype(key)) for key, shape in source.shapes.items()
              if key.removesuffix(".weight") not in layers or not key.endswith(".weight")}
    metadata = source.metadata
    metadata = UNetMetadata(
        family=metadata.family, unet_config=metadata.unet_config, model_type=metadata.model_type,
        latent_format=metadata.latent_format, sampling_settings=metadata.sampling_settings,
        provenance={"source": source.name, "bits": spec.bits, "symmetric": spec.symmetric,
                    "range": str(getattr(spec.range, "value", spec.range)), "keep": keep,
                    "split_shortcuts": split_shortcuts})
    return Quantization(source, spec, layers, floats, metadata)


def _config(source: UNetSource):
    """The host's model configuration of a UNet."""
    return model_config(QuantizedCheckpoint(source.metadata, {}, dict.fromkeys(source.shapes)),
                        source.name)


def _constructor(config) -> Callable:
    return lambda device: config.get_model({}, "", device=device)
