"""A LoRA that a training begins from: what trains on, with which ranks, and what is kept of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import comfy.lora_convert
import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..training.lora_config import PATTERN, TARGETS, LoraTraining
from ..training.lora_layer import LoraLayer
from .lora_file import import_lora
from .lora_fit import of_encoder
from .lora_keys import ALPHA, DOWN, KOHYA, UP, by_layer, key_map
from .lora_peft import normalised, peft_alpha, peft_config
from .quantize import PREFIX

MOST = 12
"""Names in a pattern that a message proposes; with more of them it is no help."""


@dataclass(frozen=True)
class Start:
    """What a training begins from. Made by `read_start`.

    Attributes:
        name: of the LoRA, for messages.
        unet: adapters by the name of their layer in the diffusion model.
        text: those of text encoders, by the names of their state dict; empty if they do not train.
        kept: tensors of text encoders that do not train, which belong to the result as they are.
    """

    name: str
    unet: Mapping[str, LoraLayer]
    text: Mapping[str, LoraLayer]
    kept: Mapping[str, Tensor]

    def check(self, config: LoraTraining, names: Iterable[str]) -> None:
        """Raise QuantTuneError, with what to set, when the targets or the rank are not its own.

        names: all layers of the diffusion model that could take adapters.
        """
        names = list(names)
        chosen = set(config.chosen(names))
        if odd := sorted(chosen ^ self.unet.keys()):
            where = "not" if odd[0] in chosen else "also"
            raise QuantTuneError(
                f"'{self.name}' cannot be trained on with these targets: it is {where} on the "
                f"layer '{odd[0]}' ({len(odd)} such differences); choose "
                f"{own_targets(set(self.unet), names) or 'the targets it was trained with'}.")
        ranks = Counter(layer.rank for layer in self.unet.values())
        if config.rank not in ranks:
            (usual, _), = ranks.most_common(1)
            raise QuantTuneError(f"'{self.name}' has rank {usual}, but {config.rank} is set; "
                                 "choose its rank to train on.")

    def note(self, rank: int) -> list[str]:
        """What the report says of it, a sentence each."""
        notes = []
        others = [layer for layer in (*self.unet.values(), *self.text.values())
                  if layer.rank != rank]
        if others:
            low, high = min(v.rank for v in others), max(v.rank for v in others)
            span = f"{low}" if low == high else f"{low} to {high}"
            notes.append(f"{len(others)} layers keep the rank that they have in '{self.name}' "
                         f"({span}).")
        if self.kept:
            notes.append(f"{len(by_layer(self.kept))} layers of the text encoder are those of "
                         f"'{self.name}', unchanged.")
        return notes


def read_start(lora: Mapping[str, Tensor], model, clip, with_text: bool) -> Start:
    """A LORA_MODEL as something to begin from.

    Args:
        lora: a `lora_file.LoraWeights` or the host's own LORA_MODEL.
        model: MODEL.
        clip: CLIP or None.
        with_text: whether the text encoder trains.

    Raises:
        QuantTuneError: as `lora_file.import_lora`.
    """
    name = getattr(lora, "name", "") or "the LoRA to begin with"
    layers = import_lora(lora, model, clip if with_text else None, name, notes=with_text)
    unet = {n.removeprefix(PREFIX): v for n, v in layers.items() if n.startswith(PREFIX)}
    text = {n: v for n, v in layers.items() if not n.startswith(PREFIX)}
    return Start(name, unet, text, {} if with_text else text_tensors(lora, clip))


def text_tensors(lora: Mapping[str, Tensor], clip=None) -> dict[str, Tensor]:
    """The tensors of a LoRA that change text encoders, bit for bit, copied from their file.

    With a CLIP those of peft's and diffusers' savers get the names that every loader knows.
    Scalings that were beside the file are in it then.
    """
    config = peft_config(getattr(lora, "metadata", {}))
    keys = key_map(None, clip)
    readable = normalised(comfy.lora_convert.convert_lora(dict(lora)), keys, config)
    found = {}
    for layer, tensors in by_layer(readable).items():
        if layer not in keys and not of_encoder(layer):
            continue
        found |= {key: readable[key].detach().clone() for key in tensors.values()}
        if config and ALPHA not in tensors and {DOWN, UP} <= tensors.keys():
            rank = readable[tensors[DOWN]].shape[0]
            found[f"{layer}.{KOHYA[ALPHA]}"] = torch.tensor(peft_alpha(layer, rank, config))
    return found


def own_targets(layers: set[str], names: list[str]) -> str:
    """Which settings name exactly ``layers`` among ``names``, in words; "" if none are known."""
    for targets in TARGETS if layers else ():
        if targets != PATTERN and _named(LoraTraining(targets=targets), names) == layers:
            return f"targets = '{targets}'"
    for parts in (1, 2, 3) if layers else ():
        tails = sorted({_tail(name, parts) for name in layers})
        pattern = ", ".join(re.escape(tail) + "$" for tail in tails)
        if len(tails) <= MOST and _named(LoraTraining(targets=PATTERN, pattern=pattern),
                                         names) == layers:
            return f"targets = '{PATTERN}' and the pattern '{pattern}'"
    return ""


def _named(config: LoraTraining, names: list[str]) -> set[str]:
    try:
        return set(config.chosen(names))
    except QuantTuneError:
        return set()


def _tail(name: str, parts: int) -> str:
    """The last so many parts of a name, and one more where the last is a number."""
    pieces = name.split(".")
    return ".".join(pieces[-parts - pieces[-1].isdigit():])
