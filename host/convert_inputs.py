"""What a conversion reads, so that it never writes over it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..quant import QuantTuneError
from .diffusers_files import shards

INDEX = (".index.json", ".json")
UNET = "unet"


def check_apart(
    out: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str] | None]
) -> None:
    """Refuse a target that is one of the files that are read, by whatever name or link.

    Args:
        out: the file to write.
        sources: files, indices of shards and folders that are read; None for one not given.

    Raises:
        QuantTuneError: the target is one of them, or a file of their folders.
    """
    target = Path(out)
    if not os.path.exists(target):
        return
    for source in sources:
        for path in files_of(Path(source)) if source is not None else ():
            if _same(path, target):
                raise QuantTuneError(
                    f"The target {os.fspath(out)!r} is a file that is read for "
                    f"it ({os.fspath(path)!r}); choose another name."
                )


def files_of(source: Path) -> Iterator[Path]:
    """The files that may be read of a source: itself, its shards, those of a model's folder."""
    if os.path.isdir(source):
        for pattern in ("*", "*/*"):
            yield from source.glob(pattern)
        return
    yield source
    if source.name.lower().endswith(INDEX):
        yield from shards(source)[0]
    # Beside a state of TuneQDM lies the rest of its model.
    elif source.suffix.lower() == ".pt":
        yield from (source.parent / UNET).glob("*")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # of a link to nothing
        return False
