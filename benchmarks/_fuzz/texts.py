"""Changes of JSON, and of other texts with words and numbers."""

from __future__ import annotations

import copy
import json
import re
from random import Random
from typing import Any

from .plain import Change

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -0.0,
    1e308,
    2**31,
    2**53,
    2**63,
    -(2**63),
    10**40,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    " ",
    "\0",
    "a\nb",
    "NaN",
    "../../x",
    "/etc/passwd",
    "\ud800",
    "\u202etxt",
    "é" * 3000,
    [],
    [[]],
    {},
    [None],
    ["x"] * 5,
    [1] * 3,
    {"x": {}},
    [0, -1],
    [2**40, 2**40],
    {"": 0},
)
"""Values that a reader may not expect where they stand."""
DEEP = 30_000


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of keys and indices to everything in a value; the first is the value itself."""
    found = [path]
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:50])
        if isinstance(value, list)
        else ()
    )
    for key, entry in entries:
        found += places(entry, (*path, key))
    return found


def altered(rng: Random, value: Any) -> Any:
    """A copy of a JSON value with one thing in it changed."""
    value = copy.deepcopy(value)
    path = rng.choice(places(value))
    if not path:
        return rng.choice((rng.choice(ODD), [value], {"x": value}, value))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    kind = rng.randrange(8)
    if kind < 4:
        owner[key] = rng.choice(ODD)
    elif kind == 4:
        del owner[key]
    elif kind == 5 and isinstance(owner, dict):
        owner[rng.choice((f"{key} ", str(key).upper(), "", "__class__", "\ud800", "x" * 2000))] = (
            owner.pop(key)
        )
    elif kind == 6 and isinstance(owner[key], (int, float)):
        owner[key] = owner[key] * rng.choice((-1, 2, 10**6, 10**12, 0.5)) + rng.choice((0, 1, -1))
    elif kind == 6 and isinstance(owner[key], str):
        owner[key] = rng.choice((owner[key] * 50, owner[key][:-1], owner[key] + "\0", "x"))
    else:
        other = value
        for step in rng.choice(places(value)):
            other = other[step]
        owner[key] = copy.deepcopy(other)
    return value


def dumped(value: Any) -> bytes:
    """JSON as hostile as the value: NaN and halves of characters stand as they are."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def altered_json(rng: Random, data: bytes) -> bytes:
    """JSON with one or two values changed."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        value = altered(rng, value)
    return dumped(value)


def twice(rng: Random, data: bytes) -> bytes:
    """A JSON object that has a key a second time, with another value."""
    places_ = list(re.finditer(rb'[{,]\s*("[^"\\]*")\s*:', data))
    found = rng.choice(places_)
    value = json.dumps(rng.choice(ODD)).encode()
    return data[: found.start() + 1] + found[1] + b":" + value + b"," + data[found.start() + 1 :]


def nested(rng: Random, data: bytes) -> bytes:
    """Brackets in brackets, deeper than a stack."""
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    deep = opening * DEEP + b"1" + closing * rng.choice((DEEP, 0))
    numbers = list(re.finditer(rb"\d+|\"[^\"]*\"", data))
    if not numbers or rng.random() < 0.3:
        return deep
    found = rng.choice(numbers)
    return data[: found.start()] + deep + data[found.end() :]


def renumbered(rng: Random, data: bytes) -> bytes:
    """A number in a text replaced by what is none, or is too large."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    found = rng.choice(numbers)
    new = rng.choice(
        (
            b"NaN",
            b"Infinity",
            b"-1",
            b"0",
            b"1e999",
            b"9" * 5000,
            b"1.5",
            b"nan",
            b"true",
            b'"1"',
            b"0x10",
            b"\xd9\xa3",
            str(rng.getrandbits(70)).encode(),
        )
    )
    return data[: found.start()] + new + data[found.end() :]


def encoded(rng: Random, data: bytes) -> bytes:
    """The text in another encoding, or with bytes that are no text."""
    kind = rng.randrange(6)
    if kind == 0:
        return b"\xef\xbb\xbf" + data
    if kind == 1:
        return data.decode("utf-8", "replace").encode("utf-16")
    if kind == 2:
        return data.decode("utf-8", "replace").encode("utf-16-le")
    at = rng.randrange(len(data) + 1)
    piece = (b"\xff\xfe", b"\0", b"\xed\xa0\x80")[kind - 3]
    return data[:at] + piece + data[at:]


def relined(rng: Random, data: bytes) -> bytes:
    """Lines in another order, one of them twice or left out, or with another ending."""
    lines = data.splitlines(keepends=True) or [b""]
    kind = rng.randrange(5)
    if kind == 0:
        rng.shuffle(lines)
    elif kind == 1:
        lines.append(rng.choice(lines))
    elif kind == 2:
        lines.pop(rng.randrange(len(lines)))
    elif kind == 3:
        return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\x0b", b"\xe2\x80\xa8")))
    else:
        lines.insert(rng.randrange(len(lines) + 1), b"x" * rng.choice((1, 200_000)) + b"\n")
    return b"".join(lines)


def altered_line(rng: Random, data: bytes) -> bytes:
    """One line of JSON lines changed as JSON."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((altered_json, twice, renumbered))(rng, lines[at])
    return b"\n".join(lines)


def requoted(rng: Random, data: bytes) -> bytes:
    """A quote, comma, bracket or the like added or taken away."""
    marks = list(re.finditer(rb"[\"',\[\]{}=:#;|]", data))
    found = rng.choice(marks)
    new = rng.choice((b"", found[0] * 2, b'"', b"'", b",", b"[", b"]", b"=", b"#", b"\\"))
    return data[: found.start()] + new + data[found.end() :]


JSON: tuple[Change, ...] = (altered_json,) * 6 + (twice, renumbered, nested, encoded, requoted)
LINES: tuple[Change, ...] = (altered_line,) * 3 + (relined, encoded, requoted, renumbered, nested)
TEXT: tuple[Change, ...] = (relined, encoded, requoted, renumbered)
