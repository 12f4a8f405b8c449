"""LoRA files of peft's and diffusers' own savers, brought into names the host reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..training.lora_layer import LoraLayer, stock_magnitude
from .lora_keys import (
    ALPHA,
    DOWN,
    KOHYA,
    MAGNITUDE,
    PEFT_BIAS,
    PEFT_MAGNITUDE,
    UP,
    brief,
    by_layer,
)

CONFIG_KEY = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in a file's metadata, each behind the part's name."""
CONFIG_FILE = "adapter_config.json"
"""Where peft keeps its settings, beside the file."""
LARGEST = 1e9
"""A larger alpha is no alpha but damage."""
WRAPPER = "base_model.model."
ENCODERS = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",),
            "text_encoder_3": ("lora_te3_",)}
"""What diffusers calls the text encoders of a pipeline, and kohya's names for them."""
BODIES = ("unet", "transformer", "diffusion_model")
"""What diffusers and the host call the model itself."""


def normalised(lora: Mapping[str, Tensor], keys: Mapping, config: Mapping,
               weight: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
    """A LoRA under names that ``comfy.lora.load_lora`` reads.

    What is no plain LoRA or DoRA, or fits no layer, stays as it is. Where a layer has no alpha, it
    gets that of peft's settings, and without them the rank, which is what the host would take.

    Args:
        lora: names and tensors of a file.
        keys: the host's names, of `lora_keys.key_map`.
        config: peft's settings, from `peft_config`; may be empty.
        weight: gives the float weight behind a value of ``keys``; DoRA magnitudes of peft are
            exact with it (`stock_magnitude`), and a little off without.
    """
    result = {}
    for layer, tensors in by_layer(lora).items():
        target = _target(layer, keys)
        if target is None or not {DOWN, UP} <= tensors.keys():
            result |= {key: lora[key] for key in tensors.values()}
            continue
        tensors = dict(tensors)
        made = {role: lora[tensors.pop(role)] for role in KOHYA if role in tensors}
        rank = made[DOWN].shape[0]
        if ALPHA not in made:
            made[ALPHA] = torch.tensor(peft_alpha(layer, rank, config))
        if PEFT_MAGNITUDE in tensors:
            values = lora[tensors.pop(PEFT_MAGNITUDE)]
            made[MAGNITUDE] = _magnitude(values, made, keys[target], weight)
        if PEFT_BIAS in tensors:
            bias = lora[tensors.pop(PEFT_BIAS)]
            result[f"{target}.diff_b"] = bias.float() * (made[ALPHA].item() / rank)
        result |= {f"{target}.{KOHYA[role]}": tensor for role, tensor in made.items()}
        result |= {key: lora[key] for key in tensors.values()}
    return result


def _target(layer: str, keys: Collection[str]) -> str | None:
    """The host's name for a layer of a file, or None."""
    if layer in keys:
        return layer
    return next((name for name in _candidates(layer) if name in keys), None)


def _candidates(layer: str) -> Iterator[str]:
    name = layer.removeprefix(WRAPPER)
    part, _, rest = name.partition(".")
    if part in ENCODERS:
        yield from _encoder_names(rest.removeprefix(WRAPPER), ENCODERS[part])
        return
    bare = rest.removeprefix(WRAPPER) if part in BODIES else name
    yield "lora_unet_" + bare.replace(".", "_")
    yield "diffusion_model." + bare
    yield "transformer." + bare
    yield from _encoder_names(bare, ENCODERS["text_encoder"])


def _encoder_names(name: str, prefixes: tuple[str, ...]) -> Iterator[str]:
    # transformers 5 has no "text_model" in between any more.
    for prefix in prefixes:
        for inner in ("", "text_model_"):
            yield prefix + inner + name.replace(".", "_")


def peft_config(metadata: Mapping[str, str]) -> dict:
    """peft's settings from a file's metadata; empty if it has none.

    Raises QuantTuneError when they cannot be read.
    """
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("they are no JSON object")
    except (ValueError, RecursionError) as error:
        raise QuantTuneError(f"The settings that came with the LoRA cannot be read ({error}); "
                             f"remove its {CONFIG_FILE}, or save it again.") from error
    return config


def peft_alpha(layer: str, rank: int, config: Mapping) -> float:
    """The stock alpha of a layer: peft's scale times the rank."""
    part, _, name = layer.partition(".")
    own = {k.removeprefix(f"{part}."): v for k, v in config.items() if k.startswith(f"{part}.")}
    own, name = (own, name) if own else (config, layer)
    alpha, patterns = own.get("lora_alpha", rank), own.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise QuantTuneError("The settings that came with the LoRA have an alpha_pattern that is "
                             "no table of names and alphas; save it again.")
    for pattern, value in patterns.items():
        if _matches(pattern, name.removeprefix(WRAPPER)):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (
            -LARGEST <= alpha <= LARGEST):
        raise QuantTuneError(f"The settings that came with the LoRA give '{brief(layer)}' an alpha "
                             f"of {brief(repr(alpha), 60)}, which is no number of use; save it "
                             "again.")
    return float(alpha) * (rank ** 0.5 if own.get("use_rslora") else 1.0)


def _matches(pattern: str, name: str) -> bool:
    try:
        return bool(re.match(rf"(.*\.)?({pattern})$", name))
    except (re.error, RecursionError, OverflowError):
        return False


def _magnitude(values: Tensor, made: Mapping[str, Tensor], target, weight) -> Tensor:
    delta = LoraLayer(made[DOWN].flatten(1), made[UP].flatten(1), made[ALPHA].item()).delta()
    own = None if weight is None else weight(target)
    if own is None or own.shape[0] != delta.shape[0] or own.numel() != delta.numel():
        return values.reshape(-1, *[1] * (made[DOWN].ndim - 1))
    return stock_magnitude(values, own, delta.reshape(own.shape))
