"""Changes of bytes that know nothing of a file's form."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

Change = Callable[[Random, bytes], bytes]
"""Takes a source of random numbers and a file, and gives the changed file."""
NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Where programs' arithmetic tends to break."""


def place(rng: Random, data: bytes) -> int:
    """A place in a file, often near one of its ends, where structure is."""
    size = max(1, len(data))
    kind = rng.random()
    if kind < 0.35:
        return rng.randrange(min(size, 64))
    if kind < 0.5:
        return size - 1 - rng.randrange(min(size, 64))
    return rng.randrange(size)


def flipped(rng: Random, data: bytes) -> bytes:
    """One to eight bits the other way."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 8)):
        changed[place(rng, changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: Random, data: bytes) -> bytes:
    """A number on the edge in place of some bytes."""
    at, size = place(rng, data), rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % 256**size
    return data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def shortened(rng: Random, data: bytes) -> bytes:
    """Cut off somewhere."""
    return data[: place(rng, data)]


def lengthened(rng: Random, data: bytes) -> bytes:
    """Something after its end."""
    return data + rng.choice((b"\0", b"\0" * 4096, b"\xff" * 8, data, rng.randbytes(33)))


def without(rng: Random, data: bytes) -> bytes:
    """A piece left out."""
    at = place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64, 1024)) :]


def inserted(rng: Random, data: bytes) -> bytes:
    """A piece from elsewhere, or noise, in between."""
    at, start = place(rng, data), place(rng, data)
    piece = rng.choice((data[start : start + rng.randint(1, 256)], rng.randbytes(16), b"\0" * 16))
    return data[:at] + piece + data[at:]


def spliced(rng: Random, data: bytes) -> bytes:
    """A piece from elsewhere in place of another."""
    at, start, size = place(rng, data), place(rng, data), rng.randint(1, 512)
    return data[:at] + data[start : start + size] + data[at + size :]


def blanked(rng: Random, data: bytes) -> bytes:
    """A stretch of one value, as a hole in a download leaves."""
    at, size = place(rng, data), rng.choice((1, 8, 64, 4096))
    size = min(size, len(data) - at)
    return data[:at] + bytes([rng.choice((0, 255, 32))]) * size + data[at + size :]


def nothing(rng: Random, data: bytes) -> bytes:
    """An empty file, or a few bytes of one."""
    return rng.choice((b"", data[:1], data[:8], b"\0" * 16, b"null", b"{}", struct.pack("<Q", 2)))


CHANGES: tuple[Change, ...] = (
    flipped,
    flipped,
    overwritten,
    overwritten,
    shortened,
    lengthened,
    without,
    inserted,
    spliced,
    blanked,
)
RARE: tuple[Change, ...] = (nothing,)
