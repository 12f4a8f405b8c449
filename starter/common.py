"""What the stages of the recipe share: the work folder, budgets, logs and seeds."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
"""The folder of the starter model, where the shipped files lie."""

SEED = 20240
"""Seed of every stage."""


def prepare_host(device: str) -> None:
    """Set the host's options as its command line would; call it before anything imports comfy."""
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = True


class Run:
    """One stage's place on disk and its time budget.

    work: folder for pictures, latents, checkpoints and logs; stage: name of the stage;
    minutes: budget of this stage, earlier runs that were resumed included; device: torch device.
    """

    def __init__(self, work: Path, stage: str, minutes: float, device: str = "cpu"):
        self.work, self.stage, self.minutes = Path(work), stage, minutes
        self.device = torch.device(device)
        self.work.mkdir(parents=True, exist_ok=True)
        self.used = 0.0
        self.last = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        """Where this stage keeps its resumable state."""
        return self.work / f"{self.stage}.ckpt"

    def tick(self) -> float:
        """Count the time since the last tick and return the used share of the budget, 0..1.

        A gap of over a minute between two ticks counts as one minute, so a machine that slept
        does not use the budget up.
        """
        now = time.monotonic()
        self.used += min(now - self.last, 60.0)
        self.last = now
        return min(self.used / (self.minutes * 60), 1.0)

    def save(self, state: dict) -> None:
        """Write the state whole or not at all."""
        part = self.checkpoint.with_suffix(".part")
        torch.save({**state, "used": self.used}, part)
        os.replace(part, self.checkpoint)

    def load(self) -> dict | None:
        """The saved state, or None at a first start."""
        if not self.checkpoint.exists():
            return None
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.used = state["used"]
        self.last = time.monotonic()
        return state

    def log(self, **values: float) -> None:
        """Append one line of JSON to the stage's log and print it."""
        line = json.dumps({"minutes": round(self.used / 60, 2), **values})
        print(self.stage, line, flush=True)
        with open(self.work / f"{self.stage}.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def learning_rate(share: float, peak: float, warm: float = 0.04) -> float:
    """Linear warm-up over the first `warm` share of the budget, then a cosine to 1 % of `peak`."""
    if share < warm:
        return peak * max(share, 1e-3) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (share - warm) / (1 - warm))))
