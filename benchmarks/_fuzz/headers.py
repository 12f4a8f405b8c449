"""Changes of safetensors files that know their form."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

from .plain import NUMBERS, Change
from .texts import ODD, altered, dumped, nested, twice

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
STRANGE = ("F4", "F8_E8M0", "U16", "U32", "U64", "C64", "f32", "", "F32 ", "X" * 300, None, 1, [])
METADATA = "__metadata__"
VALUES = {
    "F64": [struct.pack("<d", v) for v in (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300)],
    "F32": [struct.pack("<f", v) for v in (math.nan, math.inf, -math.inf, 0.0, -1.0, 3e38, 0.5)],
    "F16": [struct.pack("<e", v) for v in (math.nan, math.inf, -math.inf, 0.0, -1.0, 65504.0)],
    "BF16": [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\0\0", b"\x80\xbf", b"\x7f\x7f"],
    "F8_E4M3": [b"\x7f", b"\xff", b"\0", b"\x7e"],
    "F8_E5M2": [b"\x7f", b"\x7c", b"\xfc", b"\x7d", b"\0"],
}
"""NaN, infinities and edges of each kind of number."""


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data; raises whatever a damaged file makes it."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError
    return header, data[8 + length :]


def whole(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    """A file of both."""
    text = header if isinstance(header, bytes) else dumped(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def entries(header: dict[str, Any]) -> list[str]:
    """Names of the tensors."""
    return [k for k, v in header.items() if k != METADATA and isinstance(v, dict)]


def packed(header: dict[str, Any], pieces: dict[str, bytes]) -> bytes:
    """A file whose offsets agree with its data, whatever else is wrong with it."""
    at, new = 0, {k: v for k, v in header.items() if k == METADATA}
    for name, piece in pieces.items():
        new[name] = {**header[name], "data_offsets": [at, at + len(piece)]}
        at += len(piece)
    return whole(new, b"".join(pieces.values()))


def pieces_of(header: dict[str, Any], body: bytes) -> dict[str, bytes]:
    """The bytes of each tensor."""
    return {n: body[slice(*header[n]["data_offsets"])] for n in entries(header)}


def wrong_length(rng: Random, data: bytes) -> bytes:
    """Another length of the header."""
    (length,) = struct.unpack("<Q", data[:8])
    new = rng.choice((length + rng.randint(-9, 9), rng.choice(NUMBERS), length * 2, 100_000_000))
    return struct.pack("<Q", new % 2**64) + data[8:]


def wrong_entry(rng: Random, data: bytes) -> bytes:
    """A type, shape or offset that the data do not agree with."""
    header, body = parts(data)
    entry = header[rng.choice(entries(header))]
    kind = rng.randrange(5)
    if kind == 0:
        entry["dtype"] = rng.choice((*SIZES, *STRANGE))
    elif kind == 1:
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            (
                [*shape, 0],
                [-n for n in shape],
                [2**62, *shape],
                [*shape, 2**32, 2**32],
                shape[1:],
                [n + 1 for n in shape],
                [float(n) for n in shape],
                ["2"],
                rng.choice(ODD),
                [True] * len(shape),
                shape * 20,
                [1] * 3000,
            )
        )
    elif kind == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [start + 4, end + 4],
                [start, end + 1],
                [end, start],
                [-4, end],
                [start, 2**63],
                [start],
                [start, end, end],
                [float(start), float(end)],
                [0, end - start],
                [start, start],
                rng.choice(ODD),
                [2**64 - 4, 2**64],
            )
        )
    elif kind == 3:
        entry[rng.choice(("dtype", "shape", "data_offsets", "more"))] = rng.choice(ODD)
    else:
        entry.pop(rng.choice(list(entry)))
    return whole(header, body)


def wrong_header(rng: Random, data: bytes) -> bytes:
    """Something anywhere in the header changed as JSON."""
    header, body = parts(data)
    return whole(dumped(altered(rng, header)), body)


def repeated(rng: Random, data: bytes) -> bytes:
    """A key of the header a second time, or a header deeper than a stack."""
    (length,) = struct.unpack("<Q", data[:8])
    text = rng.choice((twice, twice, nested))(rng, data[8 : 8 + length])
    return whole(text, data[8 + length :])


def fitting(rng: Random, data: bytes) -> bytes:
    """A whole file with a tensor of another type, shape, name or length, or without one."""
    header, body = parts(data)
    pieces = pieces_of(header, body)
    name = rng.choice(list(pieces))
    entry, piece = header[name], pieces[name]
    kind = rng.randrange(7)
    if kind == 0:
        del pieces[name]
    elif kind == 1:
        new = rng.choice(
            (
                f"{name}.x",
                name.upper(),
                name[1:],
                "",
                "\0",
                "a\nb",
                "é" * 500,
                "\u202e" + name,
                name.rpartition(".")[2],
                "../" + name,
                METADATA + "x",
            )
        )
        header[new], pieces[new] = entry, pieces.pop(name)
    elif kind == 2:  # another type of the same width
        width = SIZES[entry["dtype"]]
        entry["dtype"] = rng.choice([d for d, size in SIZES.items() if size == width])
    elif kind == 3:  # the same numbers in another shape
        shape, count = entry["shape"], math.prod(entry["shape"])
        entry["shape"] = rng.choice(([count], [1, *shape], [*shape, 1], shape[::-1], [count, 1]))
    elif kind == 4:  # some rows less or more
        shape = entry["shape"] or [1]
        row = len(piece) // max(1, shape[0])
        rows = rng.choice((0, shape[0] - 1, shape[0] + 1, 2 * shape[0]))
        entry["shape"] = [max(0, rows), *shape[1:]]
        pieces[name] = (piece * 3)[: max(0, rows) * row]
    elif kind == 5:  # another type, its data as long as that needs
        entry["dtype"] = rng.choice(tuple(SIZES))
        size = min(2**20, SIZES[entry["dtype"]] * math.prod(entry["shape"]))
        pieces[name] = (piece * 9)[:size].ljust(size, b"\0")
    else:  # the tensors of two names exchanged
        other = rng.choice(list(pieces))
        pieces[name], pieces[other] = pieces[other], pieces[name]
        header[name], header[other] = header[other], header[name]
    return packed(header, pieces)


def overlapping(rng: Random, data: bytes) -> bytes:
    """Two tensors on the same bytes, or bytes that belong to none."""
    header, body = parts(data)
    pieces = pieces_of(header, body)
    first, second = rng.choice(list(pieces)), rng.choice(list(pieces))
    if rng.random() < 0.5:
        start = header[first]["data_offsets"][0]
        header[second]["data_offsets"] = [start, start + len(pieces[second])]
        return whole(header, body)
    gap = rng.choice((1, 8, 4096))
    edge = header[first]["data_offsets"][1]
    for name in pieces:
        if header[name]["data_offsets"][0] >= edge:
            header[name]["data_offsets"] = [n + gap for n in header[name]["data_offsets"]]
    return whole(header, body[:edge] + b"\0" * gap + body[edge:])


def odd_metadata(rng: Random, data: bytes) -> bytes:
    """Metadata that are no texts, or texts in them that are other JSON."""
    header, body = parts(data)
    texts = header.get(METADATA)
    kind = rng.randrange(6)
    if kind == 0 or not isinstance(texts, dict) or not texts:
        header[METADATA] = rng.choice(ODD)
        return whole(header, body)
    inner = [k for k, v in texts.items() if isinstance(v, str) and v.startswith(("{", "["))]
    key = rng.choice(inner or list(texts))
    if kind == 1:
        texts[key] = rng.choice(ODD)
    elif kind == 2 and inner:
        text = texts[key].encode()
        texts[key] = rng.choice((twice, nested))(rng, text).decode("utf-8", "replace")
    elif inner:
        value = json.loads(texts[key])
        for _ in range(rng.choice((1, 1, 2))):
            value = altered(rng, value)
        texts[key] = json.dumps(value)
    else:
        texts[key] = rng.choice(("", "null", "[1]", "{}", "\0", '{"format": 1}', "x" * 10_000))
    return whole(header, body)


def odd_values(rng: Random, data: bytes) -> bytes:
    """NaN, an infinity or another edge among the numbers of a tensor."""
    header, body = parts(data)
    names = [
        n
        for n in entries(header)
        if header[n]["dtype"] in VALUES
        and header[n]["data_offsets"][1] > header[n]["data_offsets"][0]
    ]
    entry = header[rng.choice(names)]
    start, end = entry["data_offsets"]
    size = SIZES[entry["dtype"]]
    at = start + size * rng.randrange((end - start) // size)
    value = rng.choice(VALUES[entry["dtype"]])
    return whole(header, body[:at] + value + body[at + size :])


CHANGES: tuple[Change, ...] = (
    wrong_length,
    wrong_entry,
    wrong_entry,
    wrong_entry,
    wrong_header,
    wrong_header,
    repeated,
    fitting,
    fitting,
    fitting,
    overlapping,
    odd_metadata,
    odd_metadata,
    odd_metadata,
    odd_values,
    odd_values,
)
