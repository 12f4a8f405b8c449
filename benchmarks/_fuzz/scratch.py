"""Files as bytes, for readers' seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def written(name: str, write: Callable[[Path], Any]) -> bytes:
    """What ``write`` leaves in a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path)
        return path.read_bytes()


def folder_files(write: Callable[[Path], Any]) -> dict[str, bytes]:
    """What ``write`` leaves in a folder, by path in it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(Path(folder).rglob("*"))
            if p.is_file()
        }
