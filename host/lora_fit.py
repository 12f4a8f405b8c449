"""Whether a LoRA fits a MODEL: looked at before anything of it is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..training.lora_layer import largest_rank
from .around import weight_shapes
from .lora_change import LIMIT, largest_change
from .lora_keys import ALPHA, DOWN, UP, brief, by_layer, key_map
from .lora_peft import ENCODERS, WRAPPER, normalised, peft_config

ENOUGH = 0.5
"""A LoRA of which less than this share of layers fits is for another model."""
OTHER = "use a LoRA that was made for this model"
AGAIN = "download or save it again"


@dataclass(frozen=True)
class LoraFit:
    """A LoRA as the host reads it, and how much of it fits.

    Attributes:
        name: of the LoRA, for messages.
        patches: what ``ModelPatcher.add_patches`` takes, for the model and the text encoders.
        matched: number of its layers that the model and the text encoders have.
        layers: number of its layers, without those in ``encoders``.
        unknown: names of what found no place.
        encoders: number of its layers for text encoders, where no CLIP was given.
        ranks: rank to the number of layers that have it; plain LoRA and DoRA only.
        alphas: alpha to the number of layers that have it.
        kinds: what the others are, such as "loha", to their number.
        too_high: the first layer with more rank than its weight has, or "".
    """

    name: str
    patches: dict
    matched: int
    layers: int
    unknown: tuple[str, ...]
    encoders: int
    ranks: Counter
    alphas: Counter
    kinds: Counter
    too_high: str

    def __str__(self):
        facts = [f"{self.matched} of {self.layers} layers matched"]
        if self.ranks:
            facts += [f"rank {_span(self.ranks)}", f"alpha {_span(self.alphas)}"]
        facts += [f"{count} x {kind}" for kind, count in sorted(self.kinds.items())]
        return ", ".join(facts)

    def notes(self) -> list[str]:
        """What else the user should know, a sentence each."""
        notes = []
        if self.unknown:
            notes.append(f"Warning: {len(self.unknown)} parts of '{self.name}' have no place in "
                         "this model and are left out (first: "
                         f"'{brief(self.unknown[0])}').")
        if self.encoders:
            notes.append(f"It also changes {self.encoders} layers of the text encoder; connect a "
                         "CLIP to use them.")
        if self.too_high:
            notes.append(f"Its rank is higher than the layer '{self.too_high}' can use, which only "
                         "makes the file larger.")
        return notes


def fit_lora(lora: Mapping[str, Tensor], model=None, clip=None,
             name: str = "the LoRA", strength: float = 1.0) -> LoraFit:
    """Read a LoRA for a MODEL and a CLIP, and check it.

    Args:
        lora: names and tensors as files have them.
        model: MODEL or None.
        clip: CLIP or None; without one the layers of text encoders are left out.
        name: for messages.
        strength: the largest, without its sign, that it will be used at.

    Raises:
        QuantTuneError: no LoRA at all, NaN, half of a pair, less than half of the layers in this
            model, a shape that does not fit, what the host cannot compute, or changes of a weight
            above `LIMIT`.
    """
    check_tensors(lora, name)
    keys = key_map(model, clip)
    weights = _Weights(model, clip)
    try:
        readable = normalised(comfy.lora_convert.convert_lora(dict(lora)), keys,
                              peft_config(getattr(lora, "metadata", {})), weights)
        patches = comfy.lora.load_lora(readable, keys, log_missing=False)
    except QuantTuneError as error:
        raise QuantTuneError(f"'{name}': {error}") from error
    except Exception as error:  # of the host, which trusts a file to be whole
        raise QuantTuneError(f"'{name}' cannot be read ({_reason(error)}); {AGAIN}.") from error
    # Such as a bias of a layer that has none.
    placeless = [target for target in patches if weights.shape(target) is None]
    for target in placeless:
        del patches[target]
    found, encoders, unknown, biases = 0, 0, [], []
    for layer, tensors in by_layer(readable).items():
        # A name alone changes nothing: the host reads no adapter of less than its first part.
        if layer in keys and {keys[layer], f"{_layer(keys[layer])}.bias"} & patches.keys():
            found += 1
        elif clip is None and of_encoder(layer):
            encoders += 1
        elif layer.endswith(".bias") and tensors.keys() == {""}:
            biases.append(layer)  # peft's saver adds them to the layers' own with bias="all"
        else:
            unknown.append(layer)
    layers = found + len(unknown)
    if found < ENOUGH * layers or not found:
        raise QuantTuneError(_no_fit(name, found, layers, encoders, unknown, lora, model))
    ranks, alphas, kinds, too_high = Counter(), Counter(), Counter(), ""
    for target, patch in patches.items():
        layer, shape = _layer(target), weights.shape(target)
        if isinstance(patch, LoRAAdapter):
            up, down, alpha, *_ = patch.weights
            ranks[down.shape[0]] += 1
            alphas[down.shape[0] if alpha is None else alpha] += 1
            _check_shape(name, layer, patch, shape, lora)
            if down.shape[0] > largest_rank(shape) and not too_high:
                too_high = layer
        else:
            kinds[_kind(patch)] += 1
        try:
            change = largest_change(patch, _key(target), shape, strength)
        except Exception as error:  # as above
            raise QuantTuneError(f"'{name}' cannot be used on the layer '{layer}' "
                                 f"({_reason(error)}); {AGAIN}, or {OTHER}.") from error
        if not change <= LIMIT:
            raise QuantTuneError(f"'{name}' at strength {strength:g} changes the layer '{layer}' "
                                 f"by more than half precision holds ({LIMIT:g}); {AGAIN}, or use "
                                 "a lower strength.")
    unknown += [*biases, *map(_key, placeless)]
    return LoraFit(name, patches, found, layers, tuple(unknown), encoders, ranks, alphas, kinds,
                   too_high)


class _Weights:
    """The weights of a MODEL and a CLIP by the values of `lora_keys.key_map`, read when asked."""

    def __init__(self, model, clip):
        self._known: dict = {}
        for patcher in (model, None if clip is None else clip.patcher):
            if patcher is not None:
                self._known |= weight_shapes(patcher)
        self._patchers = [p for p in (model, clip and clip.patcher) if p is not None]

    def shape(self, target) -> tuple[int, ...] | None:
        """Shape of the weight, or of the part of it, behind ``target``."""
        whole = self._known.get(_key(target))
        if whole is None:
            return None
        shape = list(whole)
        if part := _part(target):
            shape[part[0]] = part[2]
        return tuple(shape)

    def __call__(self, target) -> Tensor | None:
        """The weight itself in float32 on the CPU, before any patch."""
        for patcher in self._patchers:
            entry = patcher.get_key_patches(_key(target)).get(_key(target))
            if entry is not None:
                weight, convert = entry[0]
                weight = convert(weight).to("cpu", torch.float32)
                part = _part(target)
                return weight.narrow(*part) if part else weight
        return None


def _key(target) -> str:
    return target if isinstance(target, str) else target[0]


def _part(target) -> tuple[int, int, int] | None:
    return None if isinstance(target, str) else target[1]


def _layer(target) -> str:
    return _key(target).removesuffix(".weight")


def _kind(patch) -> str:
    return getattr(patch, "name", None) or (patch[0] if isinstance(patch, tuple) else "patch")


def _span(counts: Counter) -> str:
    low, high = min(counts), max(counts)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def check_tensors(lora, name: str) -> None:
    """Raise QuantTuneError for what is no LoRA, or a damaged one, whatever the model."""
    if not isinstance(lora, Mapping) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in lora.items()):
        raise QuantTuneError(f"'{name}' is not a LoRA; connect the output of 'LoRA Train' or "
                             "'Train LoRA'.")
    if not lora:
        raise QuantTuneError(f"'{name}' holds no tensors; {AGAIN}.")
    for key, tensor in lora.items():
        if not is_finite(tensor):
            raise QuantTuneError(f"'{name}' holds NaN or infinite values in '{brief(key)}'; "
                                 f"{AGAIN}, or train it with a lower learning rate.")
    for layer, tensors in by_layer(lora).items():
        halves, short = {DOWN, UP} & tensors.keys(), brief(layer)
        if len(halves) == 1:
            (have,), (lack,) = halves, {DOWN, UP} - halves
            raise QuantTuneError(f"'{name}' has the {have} half of the layer '{short}' without its "
                                 f"{lack} half; {AGAIN}.")
        if halves:
            down, up = lora[tensors[DOWN]], lora[tensors[UP]]
            # The host multiplies by up as a matrix, but for Tucker's core in between.
            wide = not any("mid" in role for role in tensors) and math.prod(up.shape[2:]) != 1
            if (min(down.ndim, up.ndim) < 2 or up.shape[1] != down.shape[0] or wide
                    or not down.numel()):
                raise QuantTuneError(
                    f"'{name}' has halves of shapes {list(down.shape)} and {list(up.shape)} for "
                    f"the layer '{short}', which do not belong together; {AGAIN}.")
        if ALPHA in tensors and lora[tensors[ALPHA]].numel() != 1:
            raise QuantTuneError(f"'{name}' has {lora[tensors[ALPHA]].numel()} values for the one "
                                 f"number '{brief(tensors[ALPHA])}'; {AGAIN}.")


def of_encoder(layer: str) -> bool:
    """Whether the name of a layer in a file is one of a text encoder."""
    layer = layer.removeprefix(WRAPPER)
    return layer.startswith(("lora_te", "text_model.", "text_encoders.")) or (
        layer.partition(".")[0] in ENCODERS)


def _check_shape(name, layer, patch: LoRAAdapter, shape, lora) -> None:
    up, down, _, mid, magnitude, reshape = patch.weights
    sides = " x ".join(map(str, shape))
    if reshape is not None and reshape != list(shape):
        raise QuantTuneError(f"'{name}' makes the layer '{layer}' another shape than the {sides} "
                             f"it has in this model; {OTHER}.")
    inputs = down.shape[1] * math.prod(mid.shape[2:]) if mid is not None else (
        math.prod(down.shape[1:]))
    if (up.shape[0], inputs) != (shape[0], math.prod(shape[1:])):
        seems = family(lora)
        raise QuantTuneError(
            f"'{name}' does not fit this model: for '{layer}' it is made for a weight of "
            f"{up.shape[0]} x {inputs} values and the layer has {shape[0]} x "
            f"{math.prod(shape[1:])}{f' (it seems to be for {seems})' if seems else ''}; {OTHER}.")
    if magnitude is not None and not _along(magnitude, shape):
        raise QuantTuneError(f"'{name}' has a dora_scale of shape {list(magnitude.shape)} for the "
                             f"layer '{layer}' of {sides} values, which has to hold one for each "
                             f"output or input; {AGAIN}.")


def _along(magnitude: Tensor, shape) -> bool:
    """Whether the host multiplies each output or each input of a weight by one magnitude."""
    if not magnitude.ndim or len(shape) < 2:
        return False
    axis = int(magnitude.shape[0] != shape[0])
    own = axis + magnitude.ndim - len(shape)
    return own >= 0 and magnitude.shape[own] == shape[axis] == magnitude.numel()


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {brief(error)}"
    missing = isinstance(error, (AttributeError, TypeError))
    return "a part of it is missing" if missing else brief(error)


def _no_fit(name, found, layers, encoders, unknown, lora, model) -> str:
    own = "this text encoder" if model is None else (
        f"this {type(model.model.model_config).__name__} model")
    if not layers and encoders:
        return (f"'{name}' changes the text encoder only ({encoders} layers), and no CLIP is "
                "connected; connect one.")
    seems = family(lora)
    seems = f", it seems to be for {seems}" if seems else ""
    example = f", such as '{brief(unknown[0])}'" if unknown else ""
    none = "none" if not found else f"only {found}"
    return (f"'{name}' fits {none} of its {layers} layers to {own}{example}{seems}; {OTHER}.")


def family(lora: Mapping[str, Tensor]) -> str:
    """Which models a LoRA seems to be for, in words; "" where that is not easily known."""
    metadata = getattr(lora, "metadata", {})
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if metadata.get(key):
            return f"'{brief(metadata[key], 60)}'"
    layers = by_layer(lora)
    text = "\n".join(layers)
    for word, models in (("double_blocks", "Flux"), ("single_transformer_blocks", "Flux"),
                         ("joint_blocks", "SD3"), ("prior_unet", "Stable Cascade")):
        if word in text:
            return models
    for layer, tensors in layers.items():
        # What cross-attention reads has the width of the model's text encoder.
        if layer.endswith(("attn2_to_k", "attn2.to_k")) and DOWN in tensors:
            width = lora[tensors[DOWN]].shape[1]
            return {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "the SDXL refiner"}.get(
                width, "")
    return ""
