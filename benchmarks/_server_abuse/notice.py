"""Learn at once that a file has begun to be written in one of some folders (Linux)."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from collections.abc import Iterable
from pathlib import Path

CREATED = 0x100
"""IN_CREATE of inotify."""


class Notice:
    """Watches folders, which it makes, for new files.

    A file is there for a few milliseconds while it is written: asking again and again would miss
    it, above all on a busy machine.
    """

    def __init__(self, folders: Iterable[Path]):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if self._libc.inotify_add_watch(self._handle, os.fsencode(folder), CREATED) < 0:
                raise OSError(ctypes.get_errno(), f"inotify_add_watch {folder}")

    def wait(self, suffix: str, count: int, timeout: float) -> bool:
        """Return when ``count`` files whose names end so have been made; False after a while."""
        end = time.monotonic() + timeout
        while count > 0:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._handle], [], [], left)[0]:
                return False
            count -= sum(name.endswith(suffix) for name in self._names())
        return True

    def _names(self) -> list[str]:
        data, names, place = os.read(self._handle, 1 << 16), [], 0
        while place < len(data):
            length = struct.unpack_from("I", data, place + 12)[0]
            names.append(data[place + 16 : place + 16 + length].rstrip(b"\0").decode())
            place += 16 + length
        return names

    def close(self) -> None:
        """Stop watching."""
        os.close(self._handle)
