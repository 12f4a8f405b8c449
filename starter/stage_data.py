"""Stage 1: draw the training pictures and store them as one uint8 array."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .common import SEED
from .generator import SIZE, Scene, render, sample


def scene_of(index: int) -> Scene:
    """Training scene number `index`; never a held-out triple."""
    return sample(SEED * 1_000_003 + index)


def draw(first: int, last: int) -> np.ndarray:
    """Training pictures first..last-1: uint8 (n, SIZE, SIZE, 3)."""
    return np.stack([render(scene_of(i)) for i in range(first, last)])


def pictures(work: Path, count: int, workers: int | None = None) -> np.ndarray:
    """The first `count` training pictures, memory-mapped; drawn if they are not there yet."""
    path = Path(work) / f"pictures-{count}.npy"
    if not path.exists():
        part = path.with_suffix(".part")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (count, SIZE, SIZE, 3))
        starts = list(range(0, count, 256))
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            ends = [min(s + 256, count) for s in starts]
            for start, block in zip(starts, pool.map(draw, starts, ends)):
                out[start : start + len(block)] = block
        out.flush()
        del out
        os.replace(part, path)
    return np.load(path, mmap_mode="r")
