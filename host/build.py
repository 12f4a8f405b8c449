"""Build a ComfyUI MODEL around packed integers, from a file or from another MODEL."""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass, replace
from functools import partial

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ..quant import (
    QuantizedCheckpoint,
    QuantizedWeight,
    QuantTuneError,
    load_quantized_unet,
)
from ..quant import fingerprint as fingerprint_of
from ..quant.paging import give_back_after
from ..quant.torch_archive import SUFFIXES as CHECKPOINTS
from .bnb_file import is_bnb_file, read_bnb
from .compat import set_inference_dtype
from .describe import model_config
from .import_qdiffusion import read_qdiffusion
from .layout import wrap
from .lora import keep_integers_under_patches
from .ops import QuantTuneOps
from .routing import OPTION as ROUTER
from .routing import route_forwards
from .stock_int8 import read_stock
from .tuneqdm import is_tuneqdm, read_tuneqdm

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


def load_model(path: str, name: str | None = None, bits: int | None = None,
               disable_dynamic: bool = False):
    """Load a quantized UNet file as a MODEL: ours, ComfyUI's own INT8, of bitsandbytes, of
    Q-Diffusion, or a ``tuneqdm_state.pt``.

    The integers of our files stay mapped to the file until used. ``bits`` is for those of
    Q-Diffusion, which do not say how many they have.
    """
    if path.lower().endswith(CHECKPOINTS):
        checkpoint = read_tuneqdm(path)[0] if is_tuneqdm(path) else read_qdiffusion(path, bits)
    elif is_bnb_file(path):
        checkpoint = read_bnb(path)
    else:
        checkpoint = read_stock(path) or load_quantized_unet(path)
    patcher = build_model(checkpoint, name or path, disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_model, (path, name, bits))
    return patcher


def build_model(checkpoint: QuantizedCheckpoint, name: str, dtypes: tuple | None = None,
                attributes: dict | None = None, disable_dynamic: bool = False,
                operations=QuantTuneOps):
    """A ModelPatcher over ``checkpoint``.

    ``dtypes`` is ``(unet dtype, manual cast dtype or None)``; by default the host chooses as it
    does for its own files. ``attributes`` replace those of the host's model (its sampling, its
    latent format). ``operations`` make the layers; None for the host's own, of a checkpoint of
    floats alone, whose MODEL then is an ordinary one. Raises QuantTuneError when the family is
    unknown to this ComfyUI or the tensors do not fit the model.
    """
    metadata = checkpoint.metadata
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    config = model_config(checkpoint, name)
    unet_dtype, cast_dtype = dtypes or _choose_dtypes(checkpoint, config, load_device)
    set_inference_dtype(config, unet_dtype, cast_dtype, load_device)
    config.custom_operations = operations

    compute_dtype = cast_dtype or unet_dtype
    state = dict(checkpoint.floats)
    for layer, weight in checkpoint.layers.items():
        state[f"{layer}.weight"] = (wrap(weight, compute_dtype)
                                    if isinstance(weight, QuantizedWeight)
                                    else weight.wrap(compute_dtype))
    _check_shapes(_construct(config, state, metadata, name, "meta"), state, name)
    model = _construct(config, state, metadata, name)
    predict_as_described(model, config, metadata.model_type)
    _fill(model.diffusion_model, state, name)
    if operations is not None:
        route_forwards(model.diffusion_model, checkpoint.source)
        model.state_dict_for_saving = _refuse_stock_save
    for attribute, value in (attributes or {}).items():
        # A copy: the host moves each of its models to a device of its own.
        setattr(model, attribute, copy.deepcopy(value))

    give_back_after(model)
    patcher_class = (comfy.model_patcher.ModelPatcher if disable_dynamic
                     else comfy.model_patcher.CoreModelPatcher)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    if operations is not None:
        # The layers of another library are not ours to save or to multiply.
        if all(isinstance(w, QuantizedWeight) for w in checkpoint.layers.values()):
            patcher.set_attachments(ATTACHMENT, QuantizedModel(checkpoint, name))
        keep_integers_under_patches(patcher)
    patcher.cached_patcher_init = (partial(build_model, operations=operations),
                                   (checkpoint, name, dtypes, attributes))
    return patcher


def adopt(source, built, disable_dynamic: bool = False):
    """A clone of the MODEL ``source`` (its patches, wrappers, options) over the ``built`` one."""
    clone = source.clone(disable_dynamic=disable_dynamic,
                         model_override=built.get_clone_model_override())
    clone.size = 0
    clone.parent = None
    clone.clone_base_uuid = uuid.uuid4()
    clone.cached_patcher_init = built.cached_patcher_init
    # A clone shares these with its source, whose float weights they would write over ours.
    clone.hook_backup, clone.cached_hook_patches = {}, {}
    clone.set_attachments(ATTACHMENT, quantized_model(built))
    options = clone.model_options["transformer_options"]
    if ROUTER in options:
        options[ROUTER] = options[ROUTER].on(built.model)
    for call_type, by_key in built.callbacks.items():
        for key, callbacks in by_key.items():
            clone.remove_callbacks_with_key(call_type, key)
            for callback in callbacks:
                clone.add_callback_with_key(call_type, key, callback)
    return clone


def resident(patcher):
    """A clone of a MODEL whose weights the host does not stream (dynamic VRAM).

    Integer products and measurements need the weights where they are computed with. A copy is made
    only where the host streams them; the integers of a quantized MODEL are shared in any case.

    Raises QuantTuneError for a MODEL that cannot be loaded a second time.
    """
    if not patcher.is_dynamic():
        return patcher.clone()
    if patcher.cached_patcher_init is None:
        raise QuantTuneError("This MODEL cannot be taken out of ComfyUI's dynamic VRAM, since its "
                             "loader does not say how; start ComfyUI with --disable-dynamic-vram.")
    if quantized_model(patcher) is None:
        return patcher.clone(disable_dynamic=True)
    factory, arguments = patcher.cached_patcher_init[:2]
    return adopt(patcher, factory(*arguments, disable_dynamic=True), disable_dynamic=True)


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
                         "quantized model, or 'Export Float UNet' for its weights as floats.")


def _construct(config, state, metadata, name, device=None):
    try:
        return config.get_model(state, "", device=device)
    except Exception as error:  # the host's own classes meet what may be a hostile description
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise QuantTuneError(
            f"'{name}' describes a {metadata.family} UNet that this ComfyUI cannot build "
            f"({reason[0]}); quantize the original model again with this version.") from error


def predict_as_described(model, config, model_type: str) -> None:
    """Set what a model predicts: some families take that for granted, whatever is asked."""
    wanted = comfy.model_base.ModelType[model_type]
    if model.model_type != wanted:
        model.model_type = wanted
        model.model_sampling = comfy.model_base.model_sampling(config, wanted)


def _check_shapes(skeleton, state: dict, name: str) -> None:
    """Refuse tensors that do not fit before any memory is taken for the model they describe."""
    expected = {k: p.shape for k, p in skeleton.diffusion_model.named_parameters()}
    for keys, what in ((expected.keys() - state.keys(), "lacks"),
                       (state.keys() - skeleton.diffusion_model.state_dict().keys(),
                        "has an unknown")):
        if keys:
            raise QuantTuneError(
                f"'{name}' {what} tensor '{min(keys)}' ({len(keys)} such); the file is damaged or "
                "of another version, quantize the original model again.")
    for key, shape in expected.items():
        if tuple(state[key].shape) != tuple(shape):
            raise QuantTuneError(
                f"'{name}' does not fit the model it describes: {key} has shape "
                f"{list(state[key].shape)} and the model expects {list(shape)}; quantize the "
                "original model again.")


def _fill(unet: torch.nn.Module, state: dict, name: str) -> None:
    """Load the tensors; `_check_shapes` has looked at all but buffers."""
    try:
        missing, _ = unet.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = (str(error).splitlines()[1:2] or [str(error)])[0].strip()
        raise QuantTuneError(f"'{name}' does not fit the model it describes: {reason}; quantize "
                             "the original model again.") from error
    if missing:
        raise QuantTuneError(f"'{name}' lacks tensor '{missing[0]}'; the file is damaged, quantize "
                             "the original model again.")
