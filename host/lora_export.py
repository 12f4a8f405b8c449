"""A LoRA in the official formats of diffusers and peft, which load it without any conversion."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.whole_file import write_safetensors
from ..training.lora_layer import LoraLayer, peft_magnitude
from .diffusers_unet import diffusers_names
from .export_unet import write_json, written_folder
from .float_weights import weight_of
from .folders import output_path
from .lora_file import DTYPES, as_dtype, import_lora, save_to_output
from .lora_keys import PEFT_MAGNITUDE
from .lora_peft import CONFIG_FILE, CONFIG_KEY, WRAPPER
from .quantize import PREFIX

KOHYA, DIFFUSERS, PEFT = "ComfyUI / kohya", "diffusers", "peft"
FORMATS = (KOHYA, DIFFUSERS, PEFT)
DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
UNET = "unet"
ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
"""The host's text encoders, and what a pipeline of diffusers calls the same."""
INNER = ".transformer."
"""What stands between the host's name of a text encoder and transformers' names of its layers."""


def save_in_format(lora: Mapping[str, Tensor], form: str, prefix: str, dtype: str, model=None,
                   clip=None) -> tuple[str, str]:
    """Write a LoRA into the output folder in one of `FORMATS`.

    Args:
        lora, prefix, dtype: as `lora_file.save_to_output`.
        model: MODEL of the family it is for; needed for all but `KOHYA`, since diffusers and peft
            know layers by the names in its UNet. DoRA needs the very weights it was trained on.
        clip: CLIP, for a LoRA with layers of text encoders.

    Returns:
        ``(path, summary)``: of a file, or of a folder for diffusers and peft.

    Raises:
        QuantTuneError: an unknown choice, no MODEL, one that diffusers has no names for, what
            `import_lora` raises, or a folder that cannot be written.
    """
    if form not in FORMATS:
        raise QuantTuneError(f"format is '{form}', but it has to be one of {', '.join(FORMATS)}.")
    if form == KOHYA:
        return save_to_output(lora, prefix, dtype)
    if dtype not in DTYPES:
        raise QuantTuneError(f"dtype is '{dtype}', but it has to be one of {', '.join(DTYPES)}.")
    if model is None:
        raise QuantTuneError(f"The {form} format names layers as they are in the model; connect "
                             "the MODEL that the LoRA is for.")
    parts = by_part(import_lora(lora, model, clip, train=False), model, clip)
    path = output_path(prefix, "", example="loras/my_lora")
    with written_folder(path) as folder:
        write = _write_diffusers if form == DIFFUSERS else _write_peft
        files = write(folder, parts, DTYPES[dtype])
    count = ", ".join(f"{len(layers)} layers of the {part}" for part, layers in parts.items())
    return path, f"Saved {path}: {', '.join(files)}\n{count} in {dtype}"


def by_part(layers: Mapping[str, LoraLayer], model, clip=None) -> dict[str, dict[str, LoraLayer]]:
    """Layers of the host as diffusers knows them: part of a pipeline to name to layer.

    All layers of a part get one rank, and an alpha that equals it (smaller ones are filled with
    zeros), so that every reader computes the same without further settings. Magnitudes of a DoRA
    are those of peft.

    Raises:
        QuantTuneError: a layer that diffusers has no name for.
    """
    names = diffusers_names(model.model)
    parts: dict[str, dict[str, LoraLayer]] = defaultdict(dict)
    for layer, lora in layers.items():
        if lora.dora_scale is not None:
            lora = _with_peft_magnitude(layer, lora, model, clip)
        if layer.startswith(PREFIX):
            name = names.get(f"{layer.removeprefix(PREFIX)}.weight")
            part, name = UNET, name and name.removesuffix(".weight")
        else:
            encoder, _, name = layer.partition(INNER)
            part = ENCODERS.get(encoder)
        if not name or part is None:
            raise QuantTuneError(f"diffusers has no name for the layer '{layer}'; save the LoRA "
                                 f"in the format '{KOHYA}'.")
        parts[part][name] = lora
    return {part: _of_one_rank(own) for part, own in sorted(parts.items(), reverse=True)}


def _with_peft_magnitude(layer: str, lora: LoraLayer, model, clip) -> LoraLayer:
    patcher = model if layer.startswith(PREFIX) else clip.patcher
    if lora.dora_scale.shape[0] != lora.up.shape[0]:
        raise QuantTuneError(f"The layer '{layer}' has DoRA's magnitudes by input, which diffusers "
                             f"and peft cannot read; save the LoRA in the format '{KOHYA}'.")
    delta = lora.delta()
    weight = weight_of(patcher, f"{layer}.weight").view(delta.shape)
    return replace(lora, dora_scale=peft_magnitude(lora.dora_scale, weight, delta))


def _of_one_rank(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    rank = max(lora.rank for lora in layers.values())
    result = {}
    for name, lora in layers.items():
        more, rest = rank - lora.rank, lora.down.dim() - 1
        down = F.pad(lora.down, [0, 0] * rest + [0, more])
        up = F.pad(lora.up * (lora.alpha / lora.rank), [0, 0] * (rest - 1) + [0, more])
        result[name] = LoraLayer(down, up, rank, lora.dora_scale)
    return result


def _tensors(layers: Mapping[str, LoraLayer], prefix: str, dtype: torch.dtype
             ) -> dict[str, Tensor]:
    tensors = {}
    for name, lora in layers.items():
        values = {"lora_A.weight": lora.down, "lora_B.weight": lora.up}
        if lora.dora_scale is not None:
            # As peft keeps them: of a Linear one axis, of a convolution the channels' second.
            scale = lora.dora_scale
            values[PEFT_MAGNITUDE] = (scale.flatten() if scale.dim() == 2
                                      else scale.transpose(0, 1))
        tensors |= {f"{prefix}{name}.{role}": as_dtype(value, dtype, name).contiguous()
                    for role, value in values.items()}
    return tensors


def _config(layers: Mapping[str, LoraLayer]) -> dict:
    """peft's settings, as its own class writes them."""
    from peft import LoraConfig

    first = next(iter(layers.values()))
    config = LoraConfig(r=first.rank, lora_alpha=first.rank, target_modules=sorted(layers),
                        use_dora=any(v.dora_scale is not None for v in layers.values()),
                        inference_mode=True).to_dict()
    config = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in config.items()}
    return json.loads(json.dumps(config, default=str))


def _write_diffusers(folder: Path, parts, dtype: torch.dtype) -> list[str]:
    tensors, config = {}, {}
    for part, layers in parts.items():
        tensors |= _tensors(layers, f"{part}.", dtype)
        config |= {f"{part}.{key}": value for key, value in _config(layers).items()}
    _write(folder / DIFFUSERS_FILE, tensors, {CONFIG_KEY: json.dumps(config, sort_keys=True)})
    return [DIFFUSERS_FILE]


def _write_peft(folder: Path, parts, dtype: torch.dtype) -> list[str]:
    files = []
    for part, layers in parts.items():
        # One adapter a network: that of the UNet on top, where tools look for it.
        own = folder if part == UNET or len(parts) == 1 else folder / part
        own.mkdir(exist_ok=True)
        _write(own / PEFT_FILE, _tensors(layers, WRAPPER, dtype), {})
        write_json(own / CONFIG_FILE, _config(layers))
        files += [str((own / name).relative_to(folder)) for name in (PEFT_FILE, CONFIG_FILE)]
    return files


def _write(path: Path, tensors: dict[str, Tensor], strings: dict[str, str]) -> None:
    write_safetensors(path, tensors, {"format": "quanttune.lora"},
                      strings={"format": "pt", **strings})
