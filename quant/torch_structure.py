"""A look at the pickled structure of a PyTorch file before torch reads it.

torch's restricted reader runs no code, but what it says of a hostile structure takes it minutes to
hours (its own patterns look for a class in a name of a megabyte). So the stream is walked through
first, without computing anything: of the little language that such files are written in, only what
torch writes for tensors, numbers, texts, lists and mappings is let through.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile

LONGEST_NAME = 200
"""Characters of the module and of the name of a class or function."""
LEGACY_STREAMS = 5
"""Of a file from before PyTorch 1.6: a mark, a version, the system, the structure, storages' names;
the numbers follow."""
STOP, GLOBAL = b"."[0], b"c"[0]
PLAIN = dict.fromkeys(b"N)]}(tRbaseu0\x81\x85\x86\x87\x88\x89\x8f\x90Q", 0)
"""Operations without an argument."""
FIXED = {
    **PLAIN,
    **dict.fromkeys(b"Khq\x80", 1),
    b"M"[0]: 2,
    **dict.fromkeys(b"Jjr", 4),
    b"G"[0]: 8,
}
"""Operations and how many bytes follow."""
SIZED = {b"X"[0]: "<I", b"U"[0]: "<B", b"\x8a"[0]: "<B"}
"""Operations that are followed by a number of bytes, and by as many bytes."""
TEXTS = b"XU"


def check_structure(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose structure is more than a description of tensors.

    Raises:
        ValueError: an operation or a name that torch does not write.
        OSError, zipfile.BadZipFile: a file that cannot be read, a damaged archive.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if start == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:
                        # It could be a thousand times larger than the file.
                        raise ValueError("it is a compressed archive, which PyTorch does not write")
                    if entry.filename.endswith("data.pkl"):
                        walk(archive.read(entry), 0)
        elif start[:1] == b"\x80":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                place = 0
                for _ in range(LEGACY_STREAMS):
                    place = walk(data, place)
        else:
            raise ValueError("it is no file of PyTorch")


def listed_storages(path: str | os.PathLike[str]) -> set[bytes]:
    """The names of the storages whose numbers follow in a file from before PyTorch 1.6.

    Raises:
        ValueError, OSError: see `check_structure`.
    """
    names: list[bytes] = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = 0
        for _ in range(LEGACY_STREAMS - 1):
            place = walk(data, place)
        walk(data, place, names)
    return set(names)


def walk(data: bytes | mmap.mmap, place: int, texts: list[bytes] | None = None) -> int:
    """The end of the stream that begins at a place.

    Args:
        data: the file, or one record of it.
        place: where the stream begins.
        texts: the texts that are met are put here.

    Raises:
        ValueError: see `check_structure`, and a stream without an end.
    """
    size = len(data)
    while place < size:
        code = data[place]
        place += 1
        if code in FIXED:
            place += FIXED[code]
        elif code in SIZED:
            form = SIZED[code]
            if place + struct.calcsize(form) > size:
                break
            (length,) = struct.unpack_from(form, data, place)
            place += struct.calcsize(form) + length
            if texts is not None and code in TEXTS:
                texts.append(bytes(data[place - length : place]))
        elif code == GLOBAL:
            for _ in range(2):
                end = data.find(b"\n", place, place + LONGEST_NAME)
                if end < 0:
                    raise ValueError("its structure names something without an end")
                place = end + 1
        elif code == STOP:
            return place
        else:
            raise ValueError("its structure is more than that of tensors")
    raise ValueError("its structure is cut short")
