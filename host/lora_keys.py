"""What a layer of the host is called in a LoRA file, by the host's own maps of names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import comfy.lora
import comfy.model_base
from torch import Tensor

from ..quant import QuantTuneError

DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "dora_scale"
PEFT_MAGNITUDE = "lora_magnitude_vector"
PEFT_BIAS = "lora_B.bias"
PLAIN = {DOWN, UP, ALPHA, MAGNITUDE, PEFT_MAGNITUDE, PEFT_BIAS}
"""What the tensors of a plain LoRA or DoRA are for, whatever they are called."""
KOHYA = {DOWN: "lora_down.weight", UP: "lora_up.weight", ALPHA: "alpha", MAGNITUDE: "dora_scale"}
"""What follows the name of a layer in the files that every program reads."""
_PAIR = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?\.(down|up)|\.lora_(down|up|[AB]))"
                   r"(?:(?:\.[^.]+)?\.weight)?")
_MAGNITUDE = re.compile(rf"(.+)\.{PEFT_MAGNITUDE}(?:\.[^.]+)?(?:\.weight)?")
_BIAS = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.bias")
_OTHER = re.compile(
    r"(.+?)(\.(?:(?:hada|lokr|oft)_\w+|[wb]_norm|diff|diff_b|set_weight|reshape_weight|rescale|"
    r"[ab][12]\.weight)|[._]lora(?:_\w+)?(?:\..+)?)")


def brief(text: object, most: int = 100) -> str:
    """What a file says, for a message: in one line of no more than ``most`` characters."""
    line = " ".join(str(text)[:8 * most].split())
    return line if len(line) <= most else line[:most - 1] + "…"


def layer_and_role(key: str) -> tuple[str, str]:
    """A tensor's name in a file as the name of its layer and what it is for.

    The second is one of `PLAIN` for a plain LoRA as ComfyUI, kohya, diffusers and peft spell it,
    else what follows the layer's name.
    """
    if pair := _PAIR.fullmatch(key):
        return pair[1], UP if (pair[2] or pair[3]) in ("up", "B") else DOWN
    if magnitude := _MAGNITUDE.fullmatch(key):
        return magnitude[1], PEFT_MAGNITUDE
    if bias := _BIAS.fullmatch(key):
        return bias[1], PEFT_BIAS
    layer, _, last = key.rpartition(".")
    if layer and last in (ALPHA, MAGNITUDE):
        return layer, last
    other = _OTHER.fullmatch(key)
    return (other[1], other[2]) if other else (key, "")


def by_layer(lora: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The tensors' names in a file by the name of their layer and what they are for."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for key in lora:
        layer, role = layer_and_role(key)
        layers[layer][role] = key
    return dict(layers)


def key_map(model=None, clip=None) -> dict:
    """The host's map from every name a layer may have in a LoRA file to the key of its weight.

    Args:
        model: MODEL or None.
        clip: CLIP or None.

    Returns:
        Name to key; of a part of a weight, to a tuple of the key, the part (axis, start, length)
        and a function, as ``ModelPatcher.add_patches`` takes it.
    """
    keys: dict = {}
    if model is not None:
        keys = comfy.lora.model_lora_keys_unet(model.model, keys)
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    return keys


def file_names(layers: Iterable[str], model=None, clip=None) -> dict[str, str]:
    """What to call layers in a file so that ComfyUI and kohya's tools find them.

    kohya's tools name an SDXL UNet as its checkpoint does and SD1.x and SD2.x UNets as diffusers
    does; the text encoders of a model that has several are numbered.

    Args:
        layers: names in the host, those of its state dict without ``.weight``.
        model, clip: as in `key_map`.

    Raises:
        QuantTuneError: a layer that the host would not find in any file.
    """
    keys = key_map(model, clip)
    known: dict[str, list[str]] = defaultdict(list)
    for name, target in keys.items():
        if isinstance(target, str):
            known[target].append(name)
    as_checkpoint = model is not None and isinstance(
        model.model, (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner))
    numbered = any(name.startswith("lora_te2_") for name in keys)
    names = {}
    for layer in layers:
        found = known.get(f"{layer}.weight")
        if not found:
            raise QuantTuneError(f"ComfyUI has no name for the layer '{layer}' in a LoRA file; "
                                 "leave it out of the training.")
        own = "lora_unet_" + layer.removeprefix("diffusion_model.").replace(".", "_")
        encoder = "lora_te1_ lora_te2_ lora_te3_" if numbered else "lora_te_"
        preferred = [
            *([own] if as_checkpoint else []),
            *(n for n in found if n.startswith("lora_unet_") and n != own),
            *(n for n in found if n.startswith(tuple(encoder.split()))),
            own, *found]
        names[layer] = next(n for n in preferred if n in found)
    return names
