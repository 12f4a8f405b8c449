"""What a training of LoRA adapters is told."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..quant import QuantTuneError
from ..quant.groups import group_of
from .settings import DenoisingTraining

ATTENTION = ("self-attention queries and keys", "self-attention",
             "cross-attention keys and values", "cross-attention", "transformer in and out",
             "single blocks")
FEED_FORWARD = ("feed-forward",)
CONVOLUTIONS = ("ResNet", "shortcuts", "down- and upsampling")
PATTERN = "pattern below"
TARGETS: dict[str, tuple[str, ...] | None] = {
    "attention": ATTENTION,
    "attention + feed-forward": (*ATTENTION, *FEED_FORWARD),
    "attention + feed-forward + convolutions": (*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS),
    "all layers": None,
    PATTERN: (),
}
"""Preset to the groups of layers (``quant.groups``) that take adapters; None for every layer."""


@dataclass(frozen=True)
class LoraTraining(DenoisingTraining):
    """Settings of a training of LoRA adapters (Hu et al. 2022), beside those of every training.

    Attributes:
        rank: r of ``W + scaling * up @ down``; a layer with fewer channels takes that many.
        alpha: ``scaling = alpha / rank``; 0 takes the rank, a scaling of 1.
        dropout: share of an adapter's inputs that are left out while training.
        rslora: ``scaling = alpha / sqrt(rank)`` (Kalajdzievski 2023), which lets high ranks learn.
        dora: learn each output's magnitude apart from its direction (Liu et al. 2024).
        targets: key of `TARGETS`.
        pattern: with ``targets`` = `PATTERN`, comma-separated regular expressions that are
            searched for in the names of layers.
        train_text_encoder: adapters on the text encoder's attention and feed-forward, too.
        text_encoder_learning_rate: of those; 0 takes half of ``learning_rate``.
    """

    learning_rate: float = 1e-4
    rank: int = 16
    alpha: float = 0.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: str = "attention"
    pattern: str = ""
    train_text_encoder: bool = False
    text_encoder_learning_rate: float = 0.0

    WHOLE: ClassVar = {**DenoisingTraining.WHOLE, "rank": 1}
    FLAGS: ClassVar = (*DenoisingTraining.FLAGS, "rslora", "dora", "train_text_encoder")
    RANGES: ClassVar = {**DenoisingTraining.RANGES, "alpha": (0, 1e6), "dropout": (0, 0.95),
                        "text_encoder_learning_rate": (0, 1)}
    CHOICES: ClassVar = {**DenoisingTraining.CHOICES, "targets": tuple(TARGETS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, str):
            raise QuantTuneError(f"The setting pattern is {self.pattern!r}, but it has to be a "
                                 "text.")
        if (self.targets == PATTERN) != bool(self.pattern.strip()):
            raise QuantTuneError(f"A pattern and targets = '{PATTERN}' go together; set both or "
                                 "neither.")

    @property
    def scaling(self) -> float:
        """Factor of ``up @ down`` at the full rank."""
        alpha = self.alpha or self.rank
        return alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def mode(self) -> str:
        """What the literature calls these settings."""
        return ("DoRA" if self.dora else "rsLoRA" if self.rslora else "LoRA") + (
            f", rank {self.rank}")

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The layers among ``names`` that take adapters.

        Raises QuantTuneError for a pattern that is none, or when no layer is chosen.
        """
        names = list(names)
        if self.targets == PATTERN:
            patterns = [p.strip() for p in self.pattern.split(",") if p.strip()]
            try:
                found = [n for n in names if any(re.search(p, n) for p in patterns)]
            except re.error as error:
                raise QuantTuneError(f"The pattern '{self.pattern}' is no regular expression "
                                     f"({error}); write for instance attn2, or to_[qv]$."
                                     ) from error
        else:
            groups = TARGETS[self.targets]
            found = [n for n in names if groups is None or group_of(n) in groups]
        if not found:
            what = f"pattern '{self.pattern}'" if self.targets == PATTERN else f"'{self.targets}'"
            raise QuantTuneError(f"The targets {what} name no layer of this model, which has for "
                                 f"instance '{names[len(names) // 2] if names else 'none'}'; "
                                 "choose other targets.")
        return found


LoraTraining.PRESETS = {"recommended": LoraTraining()}
