"""What a configuration file says beyond single words: what excludes what, and what to look at."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..quant import SUPPORTED_BITS, QuantTuneError

VALIDATION: dict[str, type] = {"prompts": list, "size": int, "steps": int, "cfg": float}
"""The words of [validation] and what they are."""
LIMITS = {"size": (64, 4096), "steps": (1, 1000), "cfg": (0, 30)}
"""Of its numbers, those of the nodes."""


def check_base(path, base: Mapping[str, Any], scales: bool) -> None:
    """Raise QuantTuneError where a part of [base] would be ignored.

    Args:
        path: of the configuration, for messages.
        base: the section.
        scales: for ``train-scales``, which trains on integers only; else for ``train-lora``.
    """
    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(f"The configuration {path} has {what}.")

    if base.get("starter") and "checkpoint" in base:
        raise wrong("both 'starter = true' and 'checkpoint' in [base]; keep one of them")
    if "bits" in base and base["bits"] not in SUPPORTED_BITS:
        widths = ", ".join(map(str, sorted(SUPPORTED_BITS, reverse=True)))
        floats = "" if scales else ", or be left away to train on floats"
        raise wrong(f"bits = {base['bits']} in [base]; it has to be one of {widths}{floats}")
    if "quantized_unet" in base:
        for word in ("bits", "keep_float"):
            if word in base:
                raise wrong(f"'{word}' beside 'quantized_unet' in [base], a file that is quantized "
                            "already; remove one of them")
    if not scales and "keep_float" in base and "bits" not in base:
        raise wrong("'keep_float' in [base], which says what is not quantized, and no 'bits'; add "
                    "them, or remove it")
    if scales and (others := [word for word in ("nf4", "lora") if base.get(word)]):
        raise wrong(f"'{others[0]}' in [base], which train-lora alone takes; remove it")


def check_validation(path, config: Mapping[str, Any]) -> None:
    """Raise QuantTuneError for a [validation] of no use, and for previews without one."""
    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(f"The configuration {path} has {what}.")

    section = config.get("validation")
    if section is None:
        if config.get("training", {}).get("preview_every"):
            raise wrong("'preview_every' in [training] and nothing to look at; add a section "
                        "[validation] with prompts = [\"...\"], or remove it")
        return
    prompts = section.get("prompts", [])
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise wrong("no prompts in [validation]; write prompts = [\"...\"], each a text in quotes")
    for word, (low, high) in LIMITS.items():
        value = section.get(word, low)
        if not low <= value <= high:
            raise wrong(f"{word} = {value} in [validation]; it has to be from {low} to {high}")
    if section.get("size", 8) % 8:
        raise wrong(f"size = {section['size']} in [validation]; it has to be a multiple of 8")


def validation_of(config: Mapping[str, Any], seed: int, clip, vae):
    """The `run.Validation` of [validation]; None without one."""
    from .pictures import SamplingSettings
    from .run import Validation

    section = config.get("validation")
    if section is None:
        return None
    size = section.get("size", 512)
    look = SamplingSettings(size, size, section.get("steps", 20), float(section.get("cfg", 5.0)),
                            seed=seed)
    return Validation([prompt.strip() for prompt in section["prompts"]], look, clip, vae)


def run_watched(trainer, watcher, console):
    """``trainer.run`` with lines on the console, and pictures in the run's folder.

    Args:
        trainer: of scales or of adapters.
        watcher: a `run.PictureWatcher`, or None for no pictures: not every process looks.
        console: a `command.Console`.

    Returns:
        What the trainer returns.
    """
    if watcher is None:
        return trainer.run(console)

    def told(progress) -> bool:
        asked = watcher(progress)
        return console(progress) or asked

    watcher.start(trainer)
    result = trainer.run(told)
    if missed := watcher.end(trainer):
        print(missed, file=sys.stderr)
    return result
