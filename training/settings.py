"""What every training of a diffusion model is told, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..quant import QuantTuneError

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
"""Names of diffusers' learning-rate schedules that need nothing but a warm-up and a length."""
OPTIMIZERS = ("adamw", "adamw8bit", "lion", "lion8bit")
PRECISIONS = ("auto", "fp32", "bf16")
SHORTEST = 0.001
"""Share of T that a range of timesteps has to have."""
Settings = TypeVar("Settings", bound="DenoisingTraining")


@dataclass(frozen=True)
class DenoisingTraining:
    """Settings of a training of a diffusion model, whatever it is that learns.

    Attributes:
        steps: optimizer steps.
        batch_size: examples a process takes at once.
        gradient_accumulation: such batches a step.
        learning_rate: of what learns.
        stratified: draw timesteps evenly, all experts in a step if it has enough samples and else
            in turn, instead of each timestep on its own (`sampling.TimestepSampler`).
        timestep_range: ``(first, last)`` as shares of T, to train a part of the timesteps only.
        optimizer: one of `OPTIMIZERS`; those of 8 bits and Lion come from bitsandbytes.
        weight_decay: decoupled, towards 0.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        scheduler: one of `SCHEDULERS`.
        warmup_steps: of the scheduler.
        min_snr_gamma: clamps the loss weight by the signal-to-noise ratio (Hang et al. 2023);
            0 for none. 5 is usual.
        prior_weight: weight of class images (prior preservation, DreamBooth).
        caption_dropout: share of the examples that are trained without their caption.
        precision: ``"auto"`` (bfloat16 on a GPU that has it, else float32), ``"fp32"``, ``"bf16"``.
        checkpointing: recompute activations in the backward pass, which costs a third more time
            and saves most of the memory.
        save_every: steps between two checkpoints of the run; 0 saves at the end only.
        preview_every: steps between two rounds of validation pictures; 0 for none.
        seed: of everything random.
    """

    steps: int = 400
    batch_size: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    stratified: bool = True
    timestep_range: tuple[float, float] = (0.0, 1.0)
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    warmup_steps: int = 10
    min_snr_gamma: float = 0.0
    prior_weight: float = 1.0
    caption_dropout: float = 0.0
    precision: str = "auto"
    checkpointing: bool = True
    save_every: int = 100
    preview_every: int = 100
    seed: int = 0

    WHOLE: ClassVar[dict[str, int]] = {
        "steps": 1, "batch_size": 1, "gradient_accumulation": 1, "warmup_steps": 0,
        "save_every": 0, "preview_every": 0, "seed": 0}
    """Whole numbers and the least that each may be."""
    FLAGS: ClassVar[tuple[str, ...]] = ("stratified", "checkpointing")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "learning_rate": (0, 1), "weight_decay": (0, 1), "max_grad_norm": (0, math.inf),
        "min_snr_gamma": (0, math.inf), "prior_weight": (0, math.inf), "caption_dropout": (0, 1)}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "optimizer": OPTIMIZERS, "scheduler": SCHEDULERS, "precision": PRECISIONS}
    PRESETS: ClassVar[Mapping[str, Any]]
    """Settings by name, ``"recommended"`` among them; each subclass has its own."""

    def __post_init__(self) -> None:
        for name, low in self.WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
                raise wrong(name, value, f"a whole number of at least {low}")
        for name in self.FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, getattr(self, name), "true or false")
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise wrong(name, value, f"a number from {low} to {high}" if high < math.inf
                            else f"a number of at least {low}")
        if self.learning_rate == 0:
            raise wrong("learning_rate", 0, "above 0")
        for name, choices in self.CHOICES.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise wrong(name, getattr(self, name), f"one of {', '.join(choices)}")
        span = self.timestep_range
        if (not isinstance(span, tuple) or len(span) != 2 or not all(_is_number(v) for v in span)
                or not 0 <= span[0] < span[1] <= 1 or span[1] - span[0] < SHORTEST):
            raise wrong("timestep_range", span, "two shares, 0 <= first < last <= 1, at least "
                        f"{SHORTEST} apart")

    def replace(self: Settings, **changes: Any) -> Settings:
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return {**dataclasses.asdict(self), "timestep_range": list(self.timestep_range)}

    @classmethod
    def from_dict(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
        """Settings from a configuration file, over those of its ``preset`` if it names one.

        Raises QuantTuneError for an unknown name or a value out of range.
        """
        values = dict(values)
        preset = values.pop("preset", "recommended")
        if not isinstance(preset, str) or preset not in cls.PRESETS:
            raise wrong("preset", preset, f"one of {', '.join(cls.PRESETS)}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise QuantTuneError(f"There is no setting '{name}'; the settings are "
                                     f"{', '.join(sorted(known))}.")
        if isinstance(values.get("timestep_range"), list):
            values["timestep_range"] = tuple(values["timestep_range"])
        return cls.PRESETS[preset].replace(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (
        -math.inf < value < math.inf)


def wrong(name: str, value: Any, expected: str) -> QuantTuneError:
    """The error for a setting that is not what it has to be."""
    try:
        told = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        told = "a number of thousands of digits"
    told = told if len(told) <= 100 else f"{told[:97]}..."
    return QuantTuneError(f"The setting {name} is {told}, but it has to be {expected}.")
