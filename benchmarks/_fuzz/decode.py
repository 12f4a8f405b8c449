"""What files hold, by readers of their own that share nothing with the pack's."""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .archives import repaired
from .headers import SIZES


class Unreadable(Exception):
    """A file that breaks the rules of its form."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its type's name, shape, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def same(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one, bit for bit."""
        if tuple(tensor.shape) != self.shape or TYPES.get(self.dtype) != tensor.dtype:
            return False
        flat = tensor.detach().contiguous().flatten()
        raw = flat.view(torch.uint8) if flat.numel() else flat
        return raw.numpy().tobytes() == self.data if flat.numel() else not self.data

    def floats(self) -> np.ndarray:
        """Its numbers as float64; NaN and infinities stay."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").astype(np.float64)
        if self.dtype in ("F8_E4M3", "F8_E5M2"):
            raw = (
                torch.frombuffer(bytearray(self.data), dtype=TYPES[self.dtype])
                if self.data
                else torch.zeros(0)
            )
            return raw.float().numpy().astype(np.float64)
        return np.frombuffer(self.data, NUMPY[self.dtype]).astype(np.float64)


TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "BOOL": "?",
}
WIDTHS = {**SIZES, "U16": 2, "U32": 4, "U64": 8}
"""Bytes of a number of each type that the format knows; files are only made of `SIZES`' types."""


def _once(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable("a key twice")
    return found


def safetensors(data: bytes) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors by the format's own rules.

    Raises:
        Unreadable: anything that the format forbids.
    """
    if len(data) < 8:
        raise Unreadable("no length")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8 or length > 100_000_000:
        raise Unreadable("a header longer than the file")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Unreadable("no JSON") from error
    if not isinstance(header, dict):
        raise Unreadable("no object")
    strings = header.pop("__metadata__", None) or {}
    if not isinstance(strings, dict) or not all(isinstance(v, str) for v in strings.values()):
        raise Unreadable("metadata")
    body, tensors, ends = data[8 + length :], {}, []
    for name, entry in header.items():
        tensors[name] = _stored(entry, body)
        ends.append(tuple(entry["data_offsets"]))
    at = 0
    for start, end in sorted(ends):
        if start != at:
            raise Unreadable("bytes of two tensors or of none")
        at = end
    if at != len(body):
        raise Unreadable("more or fewer bytes than are told")
    return strings, tensors


def _stored(entry: object, body: bytes) -> Stored:
    if not isinstance(entry, dict):
        raise Unreadable("an entry")
    shape, places = entry.get("shape"), entry.get("data_offsets")
    for numbers in (shape, places):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise Unreadable("numbers")
    if len(places) != 2 or entry.get("dtype") not in WIDTHS or places[1] > len(body):
        raise Unreadable("offsets or a type")
    if places[1] - places[0] != math.prod(shape) * WIDTHS[entry["dtype"]]:
        raise Unreadable("a shape of another size")
    return Stored(entry["dtype"], tuple(shape), body[places[0] : places[1]])


def pickled(data: bytes) -> object:
    """What torch itself reads from a file in memory; a wrong checksum of a record is passed over.

    Raises:
        Unreadable: torch does not read it.
    """
    reason = ""
    for form in (repaired, bytes) if data.startswith(b"PK\x03\x04") else (bytes,):
        try:
            return torch.load(io.BytesIO(form(data)), map_location="cpu", weights_only=True)
        except Exception as error:
            reason = reason or str(error)[:200]
    raise Unreadable(reason)
