"""Pictures to measure: an IMAGE batch, a folder, or both, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from .images import folder_of
from .picture_file import UNREADABLE, left_out, open_picture, picture_files

BATCH, PIXELS = 16, 1 << 24
"""Most pictures, and most pixels of them together, in memory at a time."""


def pictures_of(batch: Tensor, name: str) -> Tensor:
    """The host's IMAGE ``[n, h, w, c]`` as ``[n, 3, h, w]``, alpha left away.

    name: of the input. Raises QuantTuneError when it is empty, no IMAGE, or not finite.
    """
    if batch.dim() != 4 or batch.shape[-1] not in (1, 3, 4) or not batch.numel():
        raise QuantTuneError(f"'{name}' has shape {list(batch.shape)}; connect an IMAGE with at "
                             "least one picture.")
    if not is_finite(batch):
        raise QuantTuneError(f"'{name}' holds NaN or infinite values; check what makes them.")
    pictures = batch.movedim(-1, 1)
    return pictures[:, :3] if pictures.shape[1] > 1 else pictures.expand(-1, 3, -1, -1)


class PictureStream:
    """Pictures of one set, read from disk only when their turn comes.

    Args:
        name: of the IMAGE input, for messages.
        batch: the host's IMAGE or None.
        folder: as `images.folder_of` knows it, or empty.

    Attributes:
        count: of pictures, unreadable files counted as well.
        warnings: a sentence for each file that was left out, once it was met; files that are
            ``other`` kinds of pictures from the start.
        places: of the pictures that were given out so far among all, to know their captions by.

    Raises:
        QuantTuneError: fewer than two pictures, values that are not finite, or no such folder.
    """

    def __init__(self, name: str, batch: Tensor | None, folder: str = ""):
        self.name = name
        self.batch = None if batch is None else pictures_of(batch, name)
        self.other: list[str] = []
        self.files = picture_files(folder_of(folder), self.other) if folder.strip() else []
        self.count = len(self.files) + (0 if batch is None else len(batch))
        self.warnings: list[str] = list(self.other)
        self.places: list[int] = []
        self.require(self.count)

    def require(self, count: int) -> None:
        """Raise QuantTuneError when ``count`` pictures are too few for a set."""
        if count < 2:
            there = "is only one picture" if count else "is no picture"
            cause = f" ({self.warnings[0]})" if self.warnings else ""
            raise QuantTuneError(f"There {there} for '{self.name}' that can be read{cause}; a set "
                                 "needs at least two: connect more, or name a folder of them.")

    def __iter__(self) -> Iterator[Tensor]:
        """Batches ``[any, 3, h, w]`` float32 in 0..1; pictures of one size share a batch."""
        self.warnings, self.places = list(self.other), []
        before = 0
        if self.batch is not None:
            before = len(self.batch)
            self.places += range(before)
            size = max(1, min(BATCH, PIXELS // self.batch[0, 0].numel()))
            yield from self.batch.float().split(size)
        waiting: list[Tensor] = []
        for place, path in enumerate(self.files, before):
            try:
                pixels = np.asarray(open_picture(path))
            except UNREADABLE as error:
                self.warnings.append(left_out(path.name, error))
                continue
            picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
            full = len(waiting) == BATCH or len(waiting) * picture[0].numel() >= PIXELS
            if waiting and (full or waiting[0].shape != picture.shape):
                yield torch.stack(waiting).float() / 255
                waiting = []
            waiting.append(picture)
            self.places.append(place)
        if waiting:
            yield torch.stack(waiting).float() / 255
