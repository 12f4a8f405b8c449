"""Build a ComfyUI MODEL around packed integers, from a file or from another MODEL."""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch

from ..quant import QuantizedCheckpoint, QuantTuneError, load_quantized_unet
from ..quant import fingerprint as fingerprint_of
from .layout import wrap
from .lora import keep_integers_under_patches
from .ops import QuantTuneOps
from .routing import route_forwards

ATTACHMENT = "quanttune"


@dataclass
class QuantizedModel:
    """What a quantized MODEL carries along: its integers, their description and a name.

    The integers are the very tensors the model computes with (or, once the model sits on a GPU,
    the host-memory or file-mapped originals it is reloaded from).
    """

    checkpoint: QuantizedCheckpoint
    name: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the integers and their scales; computed once."""
        metadata = self.checkpoint.metadata
        if not metadata.fingerprint:
            metadata = replace(metadata, fingerprint=fingerprint_of(self.checkpoint.layers))
            self.checkpoint.metadata = metadata
        return metadata.fingerprint


def quantized_model(patcher) -> QuantizedModel | None:
    """The :class:`QuantizedModel` of a MODEL, or None when it is not one of ours."""
    return patcher.get_attachment(ATTACHMENT)


def load_model(path: str, name: str | None = None, disable_dynamic: bool = False):
    """Load a quantized UNet file as a MODEL. The integers stay mapped to the file until used."""
    patcher = build_model(load_quantized_unet(path), name or path, disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_model, (path, name))
    return patcher


def build_model(checkpoint: QuantizedCheckpoint, name: str, disable_dynamic: bool = False,
                dtypes: tuple | None = None):
    """A ModelPatcher over ``checkpoint``.

    ``dtypes`` is ``(unet dtype, manual cast dtype or None)``; by default the host chooses as it
    does for its own files. Raises QuantTuneError when the family is unknown to this ComfyUI or
    the tensors do not fit the model.
    """
    metadata = checkpoint.metadata
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    config = _model_config(metadata, name)
    unet_dtype, cast_dtype = dtypes or _choose_dtypes(checkpoint, config, load_device)
    config.set_inference_dtype(unet_dtype, cast_dtype, device=load_device)
    config.custom_operations = QuantTuneOps

    compute_dtype = cast_dtype or unet_dtype
    state = dict(checkpoint.floats)
    for layer, weight in checkpoint.layers.items():
        state[f"{layer}.weight"] = wrap(weight, compute_dtype)
    try:
        model = config.get_model(state, "")
    except Exception as error:  # the host's own classes meet what may be a hostile description
        raise QuantTuneError(
            f"'{name}' describes a {metadata.family} UNet that this ComfyUI cannot build "
            f"({error}); quantize the original model again with this version.") from error
    _fill(model.diffusion_model, state, name)
    route_forwards(model.diffusion_model)
    model.state_dict_for_saving = _refuse_stock_save

    patcher_class = (comfy.model_patcher.ModelPatcher if disable_dynamic
                     else comfy.model_patcher.CoreModelPatcher)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    patcher.set_attachments(ATTACHMENT, QuantizedModel(checkpoint, name))
    keep_integers_under_patches(patcher)
    patcher.cached_patcher_init = (build_model, (checkpoint, name))
    return patcher


def _model_config(metadata, name):
    config_class = getattr(comfy.supported_models, metadata.family, None)
    if not (isinstance(config_class, type)
            and issubclass(config_class, comfy.supported_models.supported_models_base.BASE)):
        raise QuantTuneError(
            f"'{name}' holds a model of family '{metadata.family}', which this ComfyUI does not "
            "know; update ComfyUI.")
    config = config_class(dict(metadata.unet_config))
    # Some families look for marker tensors of the original file to tell their prediction type.
    prediction = comfy.model_base.ModelType.__members__.get(metadata.model_type)
    if prediction is None:
        raise QuantTuneError(
            f"'{name}' has the prediction type '{metadata.model_type}', which this ComfyUI does "
            "not know; update ComfyUI or quantize the original model again.")
    config.model_type = lambda state_dict, prefix="": prediction
    config.sampling_settings.update(metadata.sampling_settings)
    return config


def _choose_dtypes(checkpoint, config, load_device):
    supported = list(config.supported_inference_dtypes)
    parameters = sum(w.numel for w in checkpoint.layers.values())
    parameters += sum(t.numel() for t in checkpoint.floats.values())
    stored = comfy.utils.weight_dtype(checkpoint.floats)
    dtype = comfy.model_management.unet_dtype(model_params=parameters, supported_dtypes=supported,
                                              weight_dtype=stored)
    return dtype, comfy.model_management.unet_manual_cast(dtype, load_device, supported)


def _refuse_stock_save(*args, **kwargs):
    """Stand-in for the host's own saving, which would write integers under the names of floats."""
    raise QuantTuneError("This node writes float weights only; use 'Save Quantized UNet' for a "
                         "quantized model.")


def _fill(unet: torch.nn.Module, state: dict, name: str) -> None:
    try:
        missing, unexpected = unet.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise QuantTuneError(
            f"'{name}' does not fit the model it describes: {first[0].strip()}; quantize the "
            "original model again.") from error
    for keys, what in ((missing, "lacks"), (unexpected, "has an unknown")):
        if keys:
            raise QuantTuneError(
                f"'{name}' {what} tensor '{keys[0]}' ({len(keys)} such); the file is damaged or "
                "of another version, quantize the original model again.")
