"""A changed file, the same for the same seed, whatever kind of file it is."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from . import archives, headers, pictures, plain, texts
from .plain import Change

STRUCTURED = 0.75
"""Share of the changes that know the file's form."""
SWAPPED = 0.02
"""Share of files that become another one, whole."""
LARGEST = 2**17
"""Bytes of other files that are put into one."""


def changes_for(name: str, data: bytes) -> tuple[Change, ...]:
    """The changes that know the form of a file, by its name and first bytes."""
    if data.startswith(b"PK\x03\x04"):
        return archives.CHANGES
    if name.endswith((".pt", ".pth", ".bin", ".ckpt")):
        return archives.LEGACY
    if name.endswith((".safetensors", ".sft")):
        return headers.CHANGES
    if name.endswith(".jsonl"):
        return texts.LINES
    if name.endswith(".json"):
        return texts.JSON
    if name.endswith((".toml", ".csv", ".txt")):
        return texts.TEXT
    if data.startswith(pictures.START):
        return pictures.PNG
    return ()


def mutated(rng: Random, name: str, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to three changes of a file; ``others`` are files of other kinds."""
    if others and rng.random() < SWAPPED:
        return rng.choice(others)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        known = changes_for(name, data) if rng.random() < STRUCTURED else ()
        change = rng.choice(known or plain.CHANGES)
        if rng.random() < 0.01:
            change = rng.choice(plain.RARE)
        try:
            data = change(rng, data)
        except Exception:  # what is damaged already has no form that could be changed
            data = rng.choice(plain.CHANGES)(rng, data)
    return data
