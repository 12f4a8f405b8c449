"""A file that a model's tensors are views of, and whether it is still the same.

Who replaces a file by another of that name (a browser, ``mv``, every save of ours) leaves the
mapped one alone. Who writes into the file itself (``cp`` onto it) changes the tensors of a model
that is in use, and one that is cut short ends the process at the next read: the system offers no
way to keep it, short of a copy of the whole model in memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import QuantTuneError


@dataclass(frozen=True)
class MappedFile:
    """A mapped file as it was when it was opened.

    Attributes:
        path: its name.
        identity: which file that was (device, number).
        state: its size in bytes, and when it was changed, in nanoseconds.
    """

    path: str
    identity: tuple[int, int]
    state: tuple[int, int]

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> MappedFile:
        """A file as it is now. Raises OSError when there is none."""
        found = os.stat(path)
        return cls(
            os.fspath(path), (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
        )

    def check(self) -> None:
        """Take a few microseconds to see whether somebody has written into the file.

        Raises:
            QuantTuneError: the tensors are not what was loaded any more.
        """
        try:
            now = MappedFile.of(self.path)
        except OSError:
            return  # deleted, which takes only its name
        if now.identity == self.identity and now.state != self.state:
            raise QuantTuneError(
                f"The file {self.path} was written to while its model was in use; queue again to "
                "load it as it is now, and next time put the new file in its place by renaming it."
            )
