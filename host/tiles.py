"""Where overlapping tiles lie on a picture, and how their results become one: plain geometry.

The tiles' results are averaged with smooth weights at every denoising step, as MultiDiffusion does
(Bar-Tal et al., ICML 2023, arXiv:2302.08113), so that no step ever sees a border.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi

import torch


@dataclass(frozen=True)
class Strip:
    """Pieces of one length that cover one side of a picture.

    Attributes:
        size: of the side.
        length: of every piece.
        starts: where each piece begins, rising; the first is 0, the last ends with the side.
        windows: ``[pieces, length]`` float32, what each piece weighs at its own places. At every
            place of the side the weights of the pieces there sum to one; towards a border inside
            of the picture a weight falls to zero, at the picture's own ends it does not.
    """

    size: int
    length: int
    starts: tuple[int, ...]
    windows: torch.Tensor


@dataclass(frozen=True)
class Tile:
    """One tile of a `Tiling`: a row's piece times a column's.

    Attributes:
        rows, columns: what it covers.
        row_weights, column_weights: ``[rows, 1]`` and ``[columns]``; its weight is their product.
    """

    rows: slice
    columns: slice
    row_weights: torch.Tensor
    column_weights: torch.Tensor

    def crop(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of ``whole`` ``[..., height, width]`` under the tile, as a view."""
        return whole[..., self.rows, self.columns]

    def add(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Add the tile's result ``part`` to the sum ``whole`` by its weight.

        ``whole`` may end before the tile does; what sticks out is dropped.
        """
        rows, columns = (w.to(part.device, part.dtype) for w in (self.row_weights,
                                                                 self.column_weights))
        inside = self.crop(whole)
        part = (part * rows).mul_(columns)[..., :inside.shape[-2], :inside.shape[-1]]
        inside.add_(part.to(whole.device, whole.dtype))


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size that cover a picture: iterate over it to get each `Tile`, row by row."""

    vertical: Strip
    horizontal: Strip

    def __len__(self) -> int:
        return len(self.vertical.starts) * len(self.horizontal.starts)

    def __iter__(self) -> Iterator[Tile]:
        v, h = self.vertical, self.horizontal
        for top, rows in zip(v.starts, v.windows):
            for left, columns in zip(h.starts, h.windows):
                yield Tile(slice(top, top + v.length), slice(left, left + h.length),
                           rows[:, None], columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of every tile."""
        return self.vertical.length, self.horizontal.length


def tiling(height: int, width: int, tile: int, overlap: int, grid: int = 1) -> Tiling:
    """Cover ``height`` x ``width`` with tiles; the arguments are those of `strip`."""
    return Tiling(strip(height, tile, overlap, grid), strip(width, tile, overlap, grid))


def strip(size: int, tile: int, overlap: int, grid: int = 1) -> Strip:
    """Cover a side with as few pieces as do, spread evenly, none shorter than the others.

    Pieces are made as short as their number allows, so that as little as possible is computed
    twice.

    Args:
        size: of the side, a multiple of ``grid``.
        tile: the longest a piece may be (``grid`` at least).
        overlap: the least that neighbours share, smaller than ``tile``.
        grid: pieces begin and end at its multiples, so that a network which halves a picture
            several times halves it at the same places in every tile.

    Raises ValueError for sizes that cannot be covered so.
    """
    if size < grid or size % grid or tile < grid or not 0 <= overlap < tile:
        raise ValueError(f"no tiles of {tile} with overlap {overlap} on {size} in steps of {grid}")
    units, longest = size // grid, tile // grid
    shared = min(-(-overlap // grid), longest - 1)
    if longest >= units:
        return Strip(size, size, (0,), torch.ones(1, size))
    count = -(-(units - shared) // (longest - shared))
    length = -(-(units + (count - 1) * shared) // count)
    starts = tuple(i * (units - length) // (count - 1) * grid for i in range(count))
    return Strip(size, length * grid, starts, _windows(size, length * grid, starts))


def _windows(size: int, length: int, starts: tuple[int, ...]) -> torch.Tensor:
    """Raised-cosine flanks over each overlap, made to sum to one where three or more meet."""
    raw = torch.ones(len(starts), length, dtype=torch.float64)
    for i in range(len(starts) - 1):
        shared = starts[i] + length - starts[i + 1]
        if shared > 0:
            rise = ((torch.arange(shared, dtype=torch.float64) + 0.5) / shared * pi / 2).sin() ** 2
            raw[i + 1, :shared] *= rise
            raw[i, length - shared:] *= rise.flip(0)
    total = torch.zeros(size, dtype=torch.float64)
    for start, window in zip(starts, raw):
        total[start:start + length] += window
    for start, window in zip(starts, raw):
        window /= total[start:start + length]
    return raw.float()


def padded(size: int, grid: int) -> int:
    """The next multiple of ``grid``."""
    return -(-size // grid) * grid


def mirrored(size: int, target: int) -> torch.Tensor:
    """Indices that lengthen a side from ``size`` to ``target`` by mirroring it at its end.

    The last place is not repeated; a side of one place is. ``[target]`` int64 in 0..size-1.
    """
    there_and_back = max(2 * size - 2, 1)
    index = torch.arange(target) % there_and_back
    return torch.minimum(index, there_and_back - index).clamp_(max=size - 1) if size > 1 else index
