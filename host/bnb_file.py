"""UNet files that diffusers or transformers saved with bitsandbytes layers, streamed from the map.

Of 4 bits: ``L.weight`` uint8, ``L.weight.absmax``, ``L.weight.quant_map``, with double
quantization ``L.weight.nested_absmax`` and ``L.weight.nested_quant_map``, and
``L.weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), JSON as bytes. Of LLM.int8: ``L.weight``
int8, ``L.SCB`` and maybe ``L.weight_format``. Names are the host's (with or without its prefix) or
those of diffusers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import comfy.model_detection
import comfy.utils
import torch
from torch import Tensor

from ..quant import QuantizedCheckpoint, QuantTuneError
from ..quant.safe_file import read_header, read_with_strings
from .bnb import BLOCK, FOUR_BIT, BnbWeight
from .describe import describe_config
from .diffusers_unet import host_config
from .stock_int8 import PREDICTION_MARKS

STATE = ".weight.quant_state.bitsandbytes__"
SCB, FORMAT = ".SCB", ".weight_format"
ROW = ("row", 0)
"""What the only layout of int8 weights that files hold is called, as text and as number."""
MARK = "conv_in.weight"
"""Only a UNet in diffusers' names has it."""
LARGEST_BLOCK = 4096


def is_bnb_file(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file holds layers of bitsandbytes, by its header alone."""
    try:
        _, shapes = read_header(path)
    except QuantTuneError:
        return False
    return any(STATE in key or key.endswith(SCB) for key in shapes)


def read_bnb(path: str | os.PathLike[str]) -> QuantizedCheckpoint:
    """The UNet of such a file, its codes as they are.

    Scales that were quantized themselves (double quantization) become floats, to the same values.
    A ``config.json`` of diffusers beside the file says what UNet it is; without one ComfyUI's own
    detection does.

    Raises:
        QuantTuneError: a damaged file or layer, or a model that this ComfyUI does not know.
    """
    path = os.fspath(path)
    _, tensors = read_with_strings(path)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    if not any(key.startswith(prefix) for key in tensors):
        prefix = ""
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    layers = {}
    for key in list(own):
        if STATE in key:
            name, _, kind = key.partition(STATE)
            layers[name] = _four_bit(path, name, kind, own)
        elif key.endswith(SCB):
            name = key.removesuffix(SCB)
            layers[name] = _int8(path, name, own)
    for name, value in own.items():
        if name not in PREDICTION_MARKS and (
                not value.is_floating_point() or value.element_size() < 2):
            raise QuantTuneError(
                f"The file {os.path.basename(path)} holds '{name}' as {value.dtype} without saying "
                "how it is quantized; save the model again.")
    config, names = _config(path, {**own, **{
        f"{n}.weight": torch.empty(w.shape, device="meta") for n, w in layers.items()}})
    if names is not None:
        if unknown := sorted(n for n in own if n not in names):
            raise QuantTuneError(f"The file {os.path.basename(path)} holds a tensor "
                                 f"'{unknown[0]}' that is no part of such a UNet; save the model "
                                 "again.")
        own = {names[n]: v for n, v in own.items()}
        layers = {names[f"{n}.weight"].removesuffix(".weight"): w for n, w in layers.items()}
    name = os.path.basename(path)
    metadata = describe_config(config, own, name, {"source": name, "bits": 8, "symmetric": True})
    for mark in PREDICTION_MARKS & own.keys():
        del own[mark]
    return QuantizedCheckpoint(metadata, layers, own)


def _config(path: str, shapes: Mapping[str, Tensor]):
    """The host's model config of a UNet, and diffusers' names of its tensors if it has those."""
    if MARK not in shapes:
        config = comfy.model_detection.model_config_from_unet(dict(shapes), "")
        names = None
    else:
        beside = Path(path).with_name("config.json")
        config = (host_config(beside) if beside.is_file()
                  else comfy.model_detection.model_config_from_diffusers_unet(dict(shapes)))
        names = None if config is None else comfy.utils.unet_to_diffusers(config.unet_config)
    if config is None:
        raise QuantTuneError(
            f"The file {os.path.basename(path)} holds no UNet that this ComfyUI knows; put the "
            "config.json of diffusers beside it, or choose another file.")
    return config, names


def _four_bit(path: str, name: str, kind: str, tensors: dict) -> BnbWeight:
    """Take a layer's tensors out of ``tensors``."""
    wrong = _wrong(path, name)
    raw = tensors.pop(f"{name}{STATE}{kind}")
    data, absmax, code, nested, nested_code = (
        tensors.pop(f"{name}.weight{part}", None)
        for part in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"))
    try:
        facts = json.loads(bytes(raw.tolist()))
        shape, block = tuple(int(n) for n in facts["shape"]), int(facts.get("blocksize", BLOCK))
        offset, nested_block = float(facts.get("nested_offset", 0.0)), int(
            facts.get("nested_blocksize", 256))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise wrong("with an unreadable description") from None
    if kind not in FOUR_BIT or facts.get("quant_type", kind) != kind:
        raise wrong(f"of the kind {kind[:40]}, which this pack does not know")
    blocks = 64 <= block <= LARGEST_BLOCK and 0 < nested_block <= LARGEST_BLOCK
    if len(shape) != 2 or min(shape) < 1 or not blocks or block & (block - 1):
        raise wrong(f"of shape {list(shape)} in blocks of {block}")
    count = shape[0] * shape[1]
    if data is None or data.dtype != torch.uint8 or data.numel() != (count + 1) // 2:
        raise wrong("whose codes do not have the number that its shape says")
    groups = -(-count // block)
    if absmax is None or absmax.numel() != groups:
        raise wrong("without a scale for each block")
    if code is None or code.numel() != 16 or not _is_standard(code, kind):
        raise wrong("with a table of values that is not bitsandbytes' own")
    if nested is not None:
        if (absmax.dtype != torch.uint8 or nested_code is None or nested_code.numel() != 256
                or nested.numel() != -(-groups // nested_block)):
            raise wrong("whose scales of scales do not fit")
        # What bitsandbytes' dequantize_blockwise computes.
        each = nested.float().flatten().repeat_interleave(nested_block)[:groups]
        absmax = nested_code.float()[absmax.flatten().long()] * each + offset
    scale = absmax.float().flatten()
    if not bool(scale.isfinite().all()):
        raise wrong("whose scale is not finite")
    return BnbWeight(data.reshape(-1, 1), scale, kind, shape, block)


def _int8(path: str, name: str, tensors: dict) -> BnbWeight:
    wrong = _wrong(path, name)
    scale, data = tensors.pop(f"{name}{SCB}"), tensors.pop(f"{name}.weight", None)
    form = tensors.pop(f"{name}{FORMAT}", None)
    if form is not None and (form.numel() != 1 or form.item() not in ROW):
        raise wrong("in a layout of one graphics card; save it again with a newer bitsandbytes")
    if data is None or data.dtype != torch.int8 or data.dim() != 2 or not data.numel():
        raise wrong("without int8 weights")
    if not scale.is_floating_point() or scale.numel() != data.shape[0]:
        raise wrong("without a scale for each row")
    if not bool(scale.isfinite().all()):
        raise wrong("whose scale is not finite")
    return BnbWeight(data, scale.float().flatten(), "int8", tuple(data.shape))


def _is_standard(code: Tensor, kind: str) -> bool:
    from ..training.bitsandbytes_library import bitsandbytes

    library = bitsandbytes("A file of bitsandbytes", "load the float model")
    table = library.functional.get_4bit_type(kind, device="cpu")
    return bool(torch.allclose(code.float().flatten(), table.float(), atol=1e-4))


def _wrong(path: str, name: str):
    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(f"The file {os.path.basename(path)} has a layer '{name}' {what}; "
                              "download or save it again.")
    return wrong
