"""Changes of pictures that know the chunks of a PNG."""

from __future__ import annotations

import struct
import zlib
from random import Random

from .plain import NUMBERS, Change

START = b"\x89PNG\r\n\x1a\n"


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kinds and contents."""
    if not data.startswith(START):
        raise ValueError("no PNG")
    found, at = [], len(START)
    while at + 8 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def joined(found: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG with right checksums."""
    return START + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in found
    )


def sized(rng: Random, data: bytes) -> bytes:
    """Other sides, depths or kinds of pixels."""
    found = chunks(data)
    width, height, *rest = struct.unpack(">IIBBBBB", found[0][1])
    side = rng.choice((0, 1, 7, 16, 9999, 20_000, 2**31 - 1, 2**31, 2**32 - 1))
    if rng.random() < 0.6:
        width, height = rng.choice(((side, height), (width, side), (side, side)))
    else:
        rest[rng.randrange(5)] = rng.randrange(256)
    found[0] = found[0][0], struct.pack(">IIBBBBB", width, height, *rest)
    return joined(found)


def shuffled(rng: Random, data: bytes) -> bytes:
    """A chunk left out, twice, elsewhere, or of another kind."""
    found = chunks(data)
    at, kind = rng.randrange(len(found)), rng.randrange(4)
    if kind == 0:
        del found[at]
    elif kind == 1:
        found.insert(rng.randrange(len(found)), found[at])
    elif kind == 2:
        rng.shuffle(found)
    else:
        found[at] = rng.choice((b"tRNS", b"PLTE", b"acTL", b"fdAT", b"iCCP", b"xxxx")), found[at][1]
    return joined(found)


def more(rng: Random, data: bytes) -> bytes:
    """A chunk of facts that are none, or that unpack to a great deal."""
    found = chunks(data)
    bomb = zlib.compress(bytes(80 * 2**20), 9)
    exif = (
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"
        + struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        + b"\0\0\0\0"
    )
    chunk = rng.choice(
        (
            (b"zTXt", b"x\0\0" + bomb),
            (b"iTXt", b"x\0\x01\0\0\0" + bomb),
            (b"iCCP", b"x\0\0" + bomb),
            (b"eXIf", exif),
            (b"eXIf", rng.randbytes(40)),
            (b"tRNS", rng.randbytes(6)),
            (b"gAMA", b""),
            (b"tEXt", b"\xff" * 99),
        )
    )
    found.insert(1, chunk)
    return joined(found)


PNG: tuple[Change, ...] = (sized, sized, shuffled, more)
