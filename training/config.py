"""What a training of scales is told: one frozen dataclass, checked, with the two presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..quant import QuantTuneError

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
"""Names of diffusers' learning-rate schedules that need nothing but a warm-up and a length."""
SHORTEST = 0.001
"""Share of T that a range of timesteps has to have."""
OPTIMIZERS = ("adamw", "adamw8bit", "lion", "lion8bit")


@dataclass(frozen=True)
class ScaleTraining:
    """Settings of a training.

    Attributes:
        steps: optimizer steps.
        batch_size: examples a process takes at once.
        gradient_accumulation: such batches a step.
        num_experts: N of TuneQDM eq. 6; 1 for a single set of scales.
        train_s_in: False trains the output scales alone, which with N = 1 is PEQA.
        learning_rate: of the output scales.
        s_in_learning_rate: of the input scales; 0 takes the same.
        absolute: train ``s_out`` itself, as the paper does, so that a step is an absolute one;
            otherwise ``r_out = s_out / s0``, so that it is a relative one.
        s_in_noise: standard deviation of the input scales around 1 at the start (Alg. 1: 0.1,
            which is variance 0.01).
        shared_share: share of the steps, 0 to 1, in which all experts train as one.
        separate_experts: every expert has optimizer states of its own and moves only in the steps
            that sample it. False: one optimizer, whose momentum moves experts that were not
            sampled too (the paper's code).
        stratified: draw timesteps evenly, all experts in a step if it has enough samples and else
            in turn, instead of each timestep on its own (`sampling.TimestepSampler`).
        timestep_range: ``(first, last)`` as shares of T, to train a part of the timesteps only.
        optimizer: one of `OPTIMIZERS`; those of 8 bits and Lion come from bitsandbytes.
        weight_decay: decoupled, towards 0.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        scheduler: one of `SCHEDULERS`.
        warmup_steps: of the scheduler.
        ema_decay: of an average of the scales that is the result then; 0 for none.
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
    num_experts: int = 2
    train_s_in: bool = True
    learning_rate: float = 5e-3
    s_in_learning_rate: float = 0.0
    absolute: bool = False
    s_in_noise: float = 0.0
    shared_share: float = 0.0
    separate_experts: bool = True
    stratified: bool = True
    timestep_range: tuple[float, float] = (0.0, 1.0)
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    warmup_steps: int = 10
    ema_decay: float = 0.0
    min_snr_gamma: float = 0.0
    prior_weight: float = 1.0
    caption_dropout: float = 0.0
    precision: str = "auto"
    checkpointing: bool = True
    save_every: int = 100
    preview_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("gradient_accumulation", 1),
                          ("num_experts", 1), ("warmup_steps", 0), ("save_every", 0),
                          ("preview_every", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
                raise _wrong(name, value, f"a whole number of at least {low}")
        for name in ("train_s_in", "absolute", "separate_experts", "stratified", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        for name, low, high in (("learning_rate", 0, 1), ("s_in_learning_rate", 0, 1),
                                ("s_in_noise", 0, 1), ("shared_share", 0, 1),
                                ("weight_decay", 0, 1), ("max_grad_norm", 0, math.inf),
                                ("ema_decay", 0, 0.999999), ("min_snr_gamma", 0, math.inf),
                                ("prior_weight", 0, math.inf), ("caption_dropout", 0, 1)):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise _wrong(name, value, f"a number from {low} to {high}" if high < math.inf
                             else f"a number of at least {low}")
        if self.learning_rate == 0:
            raise _wrong("learning_rate", 0, "above 0")
        for name, choices in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS),
                              ("precision", ("auto", "fp32", "bf16"))):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise _wrong(name, getattr(self, name), f"one of {', '.join(choices)}")
        span = self.timestep_range
        if (not isinstance(span, tuple) or len(span) != 2 or not all(_is_number(v) for v in span)
                or not 0 <= span[0] < span[1] <= 1 or span[1] - span[0] < SHORTEST):
            raise _wrong("timestep_range", span, "two shares, 0 <= first < last <= 1, at least "
                         f"{SHORTEST} apart")
        if self.num_experts > self.steps:
            raise QuantTuneError(
                f"{self.num_experts} experts cannot all be trained in {self.steps} steps; train "
                "longer or use fewer experts.")

    @property
    def mode(self) -> str:
        """What the literature calls these settings."""
        if not self.train_s_in:
            return "PEQA" if self.num_experts == 1 else f"PEQA, {self.num_experts} experts"
        return f"TuneQDM, {self.num_experts} expert{'s' if self.num_experts > 1 else ''}"

    def replace(self, **changes: Any) -> ScaleTraining:
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return {**dataclasses.asdict(self), "timestep_range": list(self.timestep_range)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScaleTraining:
        """Settings from a configuration file, over those of its ``preset`` if it names one.

        Raises QuantTuneError for an unknown name or a value out of range.
        """
        values = dict(values)
        preset = values.pop("preset", "recommended")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise _wrong("preset", preset, f"one of {', '.join(PRESETS)}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise QuantTuneError(f"There is no setting '{name}'; the settings are "
                                     f"{', '.join(sorted(known))}.")
        if isinstance(values.get("timestep_range"), list):
            values["timestep_range"] = tuple(values["timestep_range"])
        return PRESETS[preset].replace(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (
        -math.inf < value < math.inf)


def _wrong(name: str, value: Any, expected: str) -> QuantTuneError:
    return QuantTuneError(f"The setting {name} is {value!r}, but it has to be {expected}.")


RECOMMENDED = ScaleTraining()
PAPER = ScaleTraining(
    num_experts=4, learning_rate=3e-6, absolute=True, separate_experts=False, stratified=False,
    weight_decay=1e-2, scheduler="constant", warmup_steps=0,
)
"""The settings of the authors' published code: AdamW at 3e-6, 400 steps of one picture."""
PRESETS = {"recommended": RECOMMENDED, "paper": PAPER,
           "peqa": RECOMMENDED.replace(num_experts=1, train_s_in=False)}
