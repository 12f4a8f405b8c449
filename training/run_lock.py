"""One run is trained by one program at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..quant import QuantTuneError
from .processes import from_first


@contextmanager
def alone(folder: Path, accelerator=None) -> Iterator[None]:
    """Keep every other program out of a run while it is trained here.

    Two programs in one folder would save over each other's state. The lock is a hidden file beside
    the folder, which may itself be put aside meanwhile; the system lets go of it when a program
    ends, however it ends. Where no such file can be written, or the file system knows no locks,
    nothing is kept out.

    Args:
        folder: of the run; need not exist.
        accelerator: an `accelerate.Accelerator` whose first process holds the lock for all, or
            None for this process.

    Raises:
        QuantTuneError: another program trains this run; in every process.
    """
    from filelock import FileLock

    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    if accelerator is None:
        _take(lock, folder)
    else:
        from_first(accelerator, lambda: _take(lock, folder))
    try:
        yield
    finally:
        if lock.is_locked and not os.path.exists(folder):  # nothing was begun
            with suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()


def _take(lock, folder: Path) -> None:
    from filelock import Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise QuantTuneError(
            f"The run '{folder.name}' in {folder.parent} is being trained by another program; "
            "wait until that has ended, or give this training another name.") from None
    except (OSError, NotImplementedError):
        pass
