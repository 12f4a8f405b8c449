"""What a training of scales is told, with the presets of the literature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import QuantTuneError
from .settings import DenoisingTraining


@dataclass(frozen=True)
class ScaleTraining(DenoisingTraining):
    """Settings of a training of scales, beside those of every training.

    Attributes:
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
        ema_decay: of an average of the scales that is the result then; 0 for none.
    """

    learning_rate: float = 5e-3
    num_experts: int = 2
    train_s_in: bool = True
    s_in_learning_rate: float = 0.0
    absolute: bool = False
    s_in_noise: float = 0.0
    shared_share: float = 0.0
    separate_experts: bool = True
    ema_decay: float = 0.0

    WHOLE: ClassVar = {**DenoisingTraining.WHOLE, "num_experts": 1}
    FLAGS: ClassVar = (*DenoisingTraining.FLAGS, "train_s_in", "absolute", "separate_experts")
    RANGES: ClassVar = {**DenoisingTraining.RANGES, "s_in_learning_rate": (0, 1),
                        "s_in_noise": (0, 1), "shared_share": (0, 1), "ema_decay": (0, 0.999999)}

    def __post_init__(self) -> None:
        super().__post_init__()
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


RECOMMENDED = ScaleTraining()
PAPER = ScaleTraining(
    num_experts=4, learning_rate=3e-6, absolute=True, separate_experts=False, stratified=False,
    weight_decay=1e-2, scheduler="constant", warmup_steps=0,
)
"""The settings of the authors' published code: AdamW at 3e-6, 400 steps of one picture."""
PRESETS = {"recommended": RECOMMENDED, "paper": PAPER,
           "peqa": RECOMMENDED.replace(num_experts=1, train_s_in=False)}
ScaleTraining.PRESETS = PRESETS
