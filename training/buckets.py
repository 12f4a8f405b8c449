"""Aspect-ratio buckets: the few shapes that pictures of any shape are trained at.

The list is that of the trainers of Stable Diffusion and SDXL (kohya-ss): sides in steps of 64
pixels, no more pixels than a square of the resolution has, and of all shapes with one short side
the longest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

LONGEST = 3
"""Most that a long side is of its short one; longer pictures lose their ends."""


@lru_cache
def bucket_shapes(resolution: int) -> tuple[tuple[int, int], ...]:
    """``(width, height)`` of all buckets, from the tallest to the widest.

    resolution: side of the square, at least 64; the steps are 64 pixels, and 8 below 256.
    """
    unit = 64 if resolution >= 256 else 8
    side = resolution // unit * unit
    found = {(side, side)}
    for short in range(side, 0, -unit):
        long = resolution * resolution // short // unit * unit
        if long > LONGEST * short:
            break
        found |= {(long, short), (short, long)}
    return tuple(sorted(found, key=lambda shape: shape[0] / shape[1]))


def bucket_of(width: int, height: int, resolution: int) -> tuple[int, int]:
    """``(width, height)`` of the bucket whose shape is nearest to a picture's."""
    shape = math.log(width / height)
    return min(bucket_shapes(resolution), key=lambda s: abs(math.log(s[0] / s[1]) - shape))


def told(pictures: Iterable[Tensor]) -> str:
    """How many of the pictures ``[H, W, 3]`` are of each shape, the most frequent first.

    Empty when there is one shape only.
    """
    counts = Counter(f"{p.shape[1]}x{p.shape[0]}" for p in pictures)
    if len(counts) < 2:
        return ""
    return "buckets: " + ", ".join(f"{shape}: {n}" for shape, n in counts.most_common())
