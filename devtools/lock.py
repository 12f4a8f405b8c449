"""One set-up at a time: a second dev.py on the same checkout waits for the first."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .console import say


def _take(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it also when the process is killed."""
    with path.open("a") as file:
        told = False
        while True:
            try:
                _take(file.fileno())
                break
            except OSError:
                if not told:
                    say("  another dev.py is setting things up here: waiting for it")
                    told = True
                time.sleep(0.5)
        yield
