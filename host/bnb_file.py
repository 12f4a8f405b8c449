"""UNet files that diffusers or transformers saved with bitsandbytes layers, streamed from the map.

Of 4 bits: ``L.weight`` uint8, ``L.weight.absmax``, ``L.weight.quant_map``, with double
quantization ``L.weight.nested_absmax`` and ``L.weight.nested_quant_map``, and
``L.weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), JSON as bytes. Of LLM.int8: ``L.weight``
int8, ``L.SCB`` and maybe ``L.weight_format``. Names are the host's (with or without its prefix) or
those of diffusers. A model in several files (shards) has an index of them beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import comfy.model_detection
import torch
from torch import Tensor

from ..quant import QuantizedCheckpoint, QuantTuneError, UNetMetadata
from ..quant.limits import is_finite
from ..quant.safe_file import read_header, read_with_strings
from .bnb import BLOCK, FOUR_BIT, BnbWeight
from .describe import describe_config
from .diffusers_files import SHARD, incomplete, index_of, is_index, shards
from .lora_keys import brief
from .stock_int8 import PREDICTION_MARKS
from .unet_names import DIFFUSERS, detect, find_unet, host_names
from .unet_source import SCB, STATE, V_SIGN, settings_beside, unet_metadata

FORMAT = ".weight_format"
ROW = ("row", 0)
"""What the only layout of int8 weights that files hold is called, as text and as number."""
LARGEST_BLOCK = 4096
LARGEST_SCALE = 65504.0
"""Of float16, in which these models are: a scale is the largest weight of its block or row."""


def is_bnb_file(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file holds layers of bitsandbytes, by its header alone.

    So does one shard of a model where another one does, and the index of its shards.
    """
    try:
        names = {name for file in _files(os.fspath(path)) for name in read_header(file)[1]}
    except QuantTuneError:
        return SHARD.fullmatch(os.path.basename(path)) is not None and _packed(path)
    return any(STATE in key or key.endswith(SCB) for key in names)


def _packed(path: str | os.PathLike[str]) -> bool:
    """`is_bnb_file` of one file alone."""
    try:
        return any(STATE in key or key.endswith(SCB) for key in read_header(path)[1])
    except QuantTuneError:
        return False


def _files(path: str) -> list[str]:
    """The files of a model: this one, or all shards when it is one of them or their index.

    Raises:
        QuantTuneError: a shard without its index, or an index whose files are not all there.
    """
    name = os.path.basename(path)
    index = index_of(Path(path))
    if index is None and not is_index(path):
        return [path]
    own, index = index is not None, index or Path(path)
    files, trouble = shards(index)
    if trouble is None and own and name not in {file.name for file in files}:
        trouble = f"{index.name} does not name this file"
    if trouble := trouble or incomplete(index, files):
        raise QuantTuneError(f"The file {name} is a part of a model whose parts are not whole: "
                             f"{trouble}; put all of them and their index into one folder.")
    return [os.fspath(file) for file in files]


def read_bnb(path: str | os.PathLike[str]) -> QuantizedCheckpoint:
    """The UNet of such a file, its codes as they are.

    Scales that were quantized themselves (double quantization) become floats, to the same values.
    What no shape tells comes from diffusers' ``config.json`` beside the file, and from the
    scheduler of its pipeline, as for float models (`unet_source`).

    Raises:
        QuantTuneError: a damaged file or layer, or a model that this ComfyUI does not know.
    """
    path = os.fspath(path)
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        found = read_with_strings(file)[1]
        if twice := sorted(found.keys() & tensors.keys()):
            raise QuantTuneError(f"The file {os.path.basename(file)} has '{brief(twice[0])}', "
                                 f"which another part of {path} has, too; download or save the "
                                 "model again.")
        tensors |= found
    prefix, kind = find_unet(tensors) or (
        comfy.model_detection.unet_prefix_from_state_dict(tensors), "")
    if not any(key.startswith(prefix) for key in tensors):
        prefix = ""
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    layers = {}
    for key in list(own):
        if STATE in key:
            name, _, form = key.partition(STATE)
            layers[name] = _four_bit(path, name, form, own)
        elif key.endswith(SCB):
            name = key.removesuffix(SCB)
            layers[name] = _int8(path, name, own)
    for name, value in own.items():
        if name not in PREDICTION_MARKS and (
                not value.is_floating_point() or value.element_size() < 2):
            raise QuantTuneError(
                f"The file {os.path.basename(path)} holds '{name}' as {value.dtype} without saying "
                "how it is quantized; save the model again.")
        # A mark of what a model predicts may be infinite.
        if name not in PREDICTION_MARKS and not is_finite(value):
            raise QuantTuneError(f"The file {path} has NaN or infinite values in "
                                 f"'{brief(name)}'; download or save it again.")
    if kind == DIFFUSERS:
        names = host_names([*own, *(f"{n}.weight" for n in layers)])
        marks = {n: own.pop(n) for n in PREDICTION_MARKS & own.keys()}
        if unknown := sorted({*own, *(f"{n}.weight" for n in layers)} - names.keys()):
            raise QuantTuneError(f"The file {os.path.basename(path)} holds a tensor "
                                 f"'{unknown[0]}' that is no part of such a UNet; save the model "
                                 "again.")
        own = {names[n]: v for n, v in own.items()} | marks
        layers = {names[f"{n}.weight"].removesuffix(".weight"): w for n, w in layers.items()}
    metadata = _metadata(Path(path), own, layers, kind)
    for mark in PREDICTION_MARKS & own.keys():
        del own[mark]
    return QuantizedCheckpoint(metadata, layers, own)


def _metadata(path: Path, own: Mapping[str, Tensor], layers: Mapping[str, BnbWeight],
              kind: str) -> UNetMetadata:
    """What our files say of such a UNet; ``kind`` is that of `unet_names.find_unet` or nothing."""
    provenance = {"source": path.name, "bits": 8, "symmetric": True}
    full = {f"{name}.weight": torch.empty(w.shape, device="meta") for name, w in layers.items()}
    if not kind:  # no UNet of Stable Diffusion; ComfyUI may know it all the same
        config = comfy.model_detection.model_config_from_unet({**own, **full}, "")
        if config is None:
            raise QuantTuneError(f"The file {path.name} holds no whole model that this ComfyUI "
                                 "knows; download it again or choose another file.")
        return describe_config(config, own, path.name, provenance)
    shapes = {name: tuple(value.shape) for name, value in {**own, **full}.items()
              if name not in PREDICTION_MARKS}
    config = settings_beside(path.parent)
    family, unet_config = detect(shapes, f"The UNet in {path}", config)
    told = {name: own[name] for name in (*PREDICTION_MARKS, V_SIGN) if name in own}
    folder = path.parent
    pipeline = folder.parent if folder.name == "unet" else None
    made = unet_metadata(shapes, family, unet_config, told, config, folder, pipeline)
    return replace(made, provenance=provenance)


def _four_bit(path: str, name: str, kind: str, tensors: dict) -> BnbWeight:
    """Take a layer's tensors out of ``tensors``."""
    wrong = _wrong(path, name)
    raw = tensors.pop(f"{name}{STATE}{kind}")
    data, absmax, code, nested, nested_code = (
        tensors.pop(f"{name}.weight{part}", None)
        for part in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"))
    try:
        facts = json.loads(bytes(raw.tolist()))
        shape, block = tuple(facts["shape"]), facts.get("blocksize", BLOCK)
        nested_block = facts.get("nested_blocksize", 256)
        offset = float(facts.get("nested_offset", 0.0))
        if not all(type(n) is int for n in (*shape, block, nested_block)):
            raise ValueError("sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise wrong("with an unreadable description") from None
    told = facts.get("quant_type", kind)
    if kind not in FOUR_BIT or told != kind:
        raise wrong(f"of the kind {str(kind if told == kind else told)[:40]}, which this pack does "
                    "not know")
    blocks = 64 <= block <= LARGEST_BLOCK and 0 < nested_block <= LARGEST_BLOCK
    if len(shape) != 2 or min(shape) < 1 or not blocks or block & (block - 1):
        raise wrong(f"of shape {brief(list(shape), 60)} in blocks of {brief(block, 30)}")
    count = shape[0] * shape[1]
    if data is None or data.dtype != torch.uint8 or data.numel() != (count + 1) // 2:
        raise wrong("whose codes do not have the number that its shape says")
    groups = -(-count // block)
    if absmax is None or absmax.numel() != groups:
        raise wrong("without a scale for each block")
    if code is None or not code.is_floating_point() or code.numel() != 16 or not _is_standard(
            code, kind):
        raise wrong("with a table of values that is not bitsandbytes' own")
    if nested is not None:
        if (absmax.dtype != torch.uint8 or nested_code is None or nested_code.numel() != 256
                or nested.numel() != -(-groups // nested_block)
                or not (nested.is_floating_point() and nested_code.is_floating_point())):
            raise wrong("whose scales of scales do not fit")
        # What bitsandbytes' dequantize_blockwise computes.
        each = nested.float().flatten().repeat_interleave(nested_block)[:groups]
        absmax = nested_code.float()[absmax.flatten().long()] * each + offset
    elif not absmax.is_floating_point():
        raise wrong("whose scales of scales are missing")
    scale = _scale(absmax, wrong)
    return BnbWeight(data.reshape(-1, 1), scale, kind, shape, block)


def _int8(path: str, name: str, tensors: dict) -> BnbWeight:
    wrong = _wrong(path, name)
    scale, data = tensors.pop(f"{name}{SCB}"), tensors.pop(f"{name}.weight", None)
    form = tensors.pop(f"{name}{FORMAT}", None)
    if form is not None and (form.numel() != 1 or form.item() not in ROW):
        raise wrong("in a layout that only an old bitsandbytes wrote, for one graphics card")
    if data is None or data.dtype != torch.int8 or data.dim() != 2 or not data.numel():
        raise wrong("without int8 weights")
    if not scale.is_floating_point() or scale.numel() != data.shape[0]:
        raise wrong("without a scale for each row")
    scale = _scale(scale, wrong)
    if float(scale.min()) < 0:
        raise wrong("whose scale is below 0")
    return BnbWeight(data, scale, "int8", tuple(data.shape))


def _scale(scale: Tensor, wrong) -> Tensor:
    """Scales as float32, none of which is beyond a weight of a model."""
    scale = scale.float().flatten()
    if not is_finite(scale):
        raise wrong("whose scale is not finite")
    if float(scale.abs().max()) > LARGEST_SCALE:
        raise wrong("whose scale is that of no model")
    return scale


def _is_standard(code: Tensor, kind: str) -> bool:
    from ..training.bitsandbytes_library import bitsandbytes

    library = bitsandbytes("A file of bitsandbytes", "load the float model")
    table = library.functional.get_4bit_type(kind, device="cpu")
    return bool(torch.allclose(code.float().flatten(), table.float(), atol=1e-4))


def _wrong(path: str, name: str):
    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(f"The file {os.path.basename(path)} has a layer '{name[:100]}' "
                              f"{what}; download or save it again.")
    return wrong
