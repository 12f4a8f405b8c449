"""Changes of PyTorch's files that know their form: records of a zip archive, and what they hold."""

from __future__ import annotations

import io
import struct
import zipfile
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from .plain import CHANGES as PLAIN
from .plain import NUMBERS, Change
from .texts import ODD

HOSTILE = (
    b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch hacked\x85R.",
    b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor\n).",
    b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    b"\x80\x02c__builtin__\ngetattr\n(K\x01X\x01\x00\x00\x00atR.",
    b"\x80\x02" + b"(" * 20_000 + b".",
    b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    b"\x80\x02}q\x00.",
    b"\x80\x02N.",
    b"\x80\x02K\x01.",
    b"\x80\x02]q\x00.",
    b".",
    b"",
    b"\x80\x02X\xff\xff\xff\x7fab.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
    b"\x80\x02K\x01q\x00h\x00h\x00h\x05.",
)
"""Streams that call something, recurse, or promise what is not there."""
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.int32,
)
BOMB = 64 * 2**20
"""Bytes that a few thousand compressed ones become."""


def records(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents; raises whatever a damaged archive makes it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(i.filename, archive.read(i)) for i in archive.infolist()]


def zipped(
    found: list[tuple[str, bytes]], packed: int = zipfile.ZIP_STORED, only: str | None = None
) -> bytes:
    """An archive with right checksums; compressed, or just the record ``only``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", allowZip64=True) as archive:
        for name, content in found:
            kind = packed if only is None or name == only else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return buffer.getvalue()


def structure(found: list[tuple[str, bytes]]) -> int:
    """Place of the record with the pickled structure."""
    return next(i for i, (name, _) in enumerate(found) if name.endswith("data.pkl"))


def stream(rng: Random, data: bytes) -> bytes:
    """Other bytes in the structure, with a right checksum."""
    found = records(data)
    at = structure(found)
    name, content = found[at]
    if rng.random() < 0.3:
        content = rng.choice(HOSTILE)
    elif rng.random() < 0.2:
        place = rng.randrange(len(content))
        content = content[:place] + rng.choice(HOSTILE)[2:-1] + content[place:]
    else:
        for _ in range(rng.choice((1, 1, 3))):
            content = rng.choice(PLAIN)(rng, content)
    found[at] = name, content
    return zipped(found)


def storages(rng: Random, data: bytes) -> bytes:
    """Numbers that are missing, too short, too long, or another tensor's."""
    found = records(data)
    places = [i for i, (name, _) in enumerate(found) if "/data/" in name]
    at = rng.choice(places)
    name, content = found[at]
    kind = rng.randrange(6)
    if kind == 0:
        del found[at]
    elif kind == 1:
        found[at] = name, content[: rng.randrange(len(content) + 1)]
    elif kind == 2:
        found[at] = name, content + b"\0" * rng.choice((1, 4, 4096))
    elif kind == 3:
        other = rng.choice(places)
        found[at], found[other] = (name, found[other][1]), (found[other][0], content)
    elif kind == 4:
        found[at] = name, rng.choice((b"\xff", b"\0", b"\x7f"))[:1] * len(content)
    else:
        found.append((name, content[::-1]))  # a second record of the same name
    return zipped(found)


def compressed(rng: Random, data: bytes) -> bytes:
    """Records that are compressed, one of them to a thousandth."""
    found = records(data)
    only = rng.choice((None, rng.choice(found)[0]))
    if rng.random() < 0.08:
        at = rng.randrange(len(found))
        only = found[at][0]
        found[at] = only, found[at][1] + bytes(BOMB)
    return zipped(
        found, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)), only
    )


def renamed(rng: Random, data: bytes) -> bytes:
    """Records of other names, in another order, or with another account of the bytes' order."""
    found = records(data)
    kind = rng.randrange(5)
    if kind == 0:
        prefix = rng.choice(("../", "/", "C:\\", "\0", "é", "a/b/c/", "x" * 3000))
        found = [(prefix + name, content) for name, content in found]
    elif kind == 1:
        rng.shuffle(found)
    elif kind == 2:
        at = rng.randrange(len(found))
        found[at] = (
            rng.choice(("../../x", "data.pkl", "x/data.pkl", "", "x/byteorder")),
            found[at][1],
        )
    elif kind == 3:
        top = found[0][0].partition("/")[0]
        found = [f for f in found if not f[0].endswith(("/byteorder", "/version"))]
        found.append(
            (
                f"{top}/{rng.choice(('byteorder', 'version', '.format_version'))}",
                rng.choice((b"big", b"little", b"", b"\xff" * 9, b"0", b"99999999999")),
            )
        )
    else:
        found.append(("more/data.pkl", found[structure(found)][1]))
    return zipped(found)


def directory(rng: Random, data: bytes) -> bytes:
    """Another number in a header of the archive's directory."""
    starts = [
        m
        for sign in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06")
        for m in _all(data, sign)
    ]
    at = rng.choice(starts) + rng.choice((4, 6, 8, 10, 14, 18, 20, 22, 24, 26, 28, 30, 34, 42))
    size = rng.choice((2, 4))
    return (
        data[:at] + (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little") + data[at + size :]
    )


def _all(data: bytes, sign: bytes) -> list[int]:
    found, at = [], data.find(sign)
    while at >= 0:
        found.append(at)
        at = data.find(sign, at + 1)
    return found


@lru_cache(maxsize=64)
def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def saved(value: Any, legacy: bool = False) -> bytes:
    """What torch writes of it."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def content(rng: Random, data: bytes) -> bytes:
    """A file that torch wrote itself, of another content."""
    return saved(altered(rng, _loaded(data)), not data.startswith(b"PK"))


def altered(rng: Random, value: Any) -> Any:
    """A copy of mappings, lists and tensors with one thing in it changed."""
    if isinstance(value, Tensor):
        return _tensor(rng, value)
    if isinstance(value, dict) and value:
        new = dict(value)
        key = rng.choice(list(new))
        kind = rng.randrange(12)
        if kind == 0:
            del new[key]
        elif kind == 1:
            name = rng.choice((f"{key}.x", str(key)[1:], 7, None, "", "a\nb", "\u202e", "x" * 3000))
            new[name] = new.pop(key)
        elif kind == 2:
            other = rng.choice(list(new))
            new[key], new[other] = new[other], new[key]
        elif kind == 3:
            new[key] = _strange(rng)
        else:
            new[key] = altered(rng, new[key])
        return new
    if isinstance(value, (list, tuple)) and value:
        new = list(value)
        at = rng.randrange(len(new))
        kind = rng.randrange(6)
        if kind == 0:
            del new[at]
        elif kind == 1:
            new.append(new[at])
        else:
            new[at] = altered(rng, new[at])
        return type(value)(new)
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return value * rng.choice((-1, 2, 10**9, 0.5)) + rng.choice((0, 1, -1))
    return _strange(rng)


def _strange(rng: Random) -> Any:
    plain = [v for v in ODD if not isinstance(v, str) or "\ud800" not in v]
    return rng.choice((*plain, torch.ones(2), torch.tensor(3), (), {1: 2}))


def _tensor(rng: Random, value: Tensor) -> Tensor:
    kind = rng.randrange(10)
    if kind == 0:
        return value.to(rng.choice(DTYPES))
    if kind == 1:
        return value.reshape(rng.choice(((-1,), (1, *value.shape), (*value.shape, 1))))
    if kind == 2:
        return value.transpose(0, -1) if value.dim() > 1 else value[:, None].expand(-1, 3)
    if kind == 3:
        return (
            rng.choice((value[:0], value[:-1], torch.cat([value, value])))
            if value.dim()
            else (value.repeat(2))
        )
    if kind == 4:
        return rng.choice(
            (
                value.to_sparse(),
                torch.tensor([]),
                value.new_zeros(()),
                value.new_zeros(0, 3),
                value.flatten()[:1].expand(10**9),
            )
        )
    new = value.clone()
    if new.numel():
        at = rng.randrange(new.numel())
        numbers = (
            (float("nan"), float("inf"), -1.0, 0.0, 3e38, 0.5)
            if new.is_floating_point()
            else (0, 1, 127, -1 if new.dtype != torch.uint8 and new.dtype != torch.bool else 1)
        )
        new.view(-1)[at] = rng.choice(numbers)
    return new


def struck(rng: Random, data: bytes) -> bytes:
    """A legacy file with a hostile stream in front."""
    return rng.choice(HOSTILE) + data[rng.choice((0, 10, 64)) :]


CHANGES: tuple[Change, ...] = (
    stream,
    stream,
    stream,
    storages,
    storages,
    compressed,
    renamed,
    directory,
    directory,
    content,
    content,
    content,
    content,
)
LEGACY: tuple[Change, ...] = (struck, content, content)


def repaired(data: bytes) -> bytes:
    """The same records with right checksums: a flipped number is another number.

    Contents are taken where the archive's directory says, whatever their checksums.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    found = []
    for entry in entries:
        at = entry.header_offset
        name, extra = struct.unpack("<HH", data[at + 26 : at + 30])
        begin = at + 30 + name + extra
        found.append((entry.filename, data[begin : begin + entry.file_size]))
    return zipped(found)
