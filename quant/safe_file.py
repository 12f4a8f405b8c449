"""Reading files so that a bad file never hurts anyone.

Reading maps the file: tensors are views of the map, and nothing is copied. Writing is in
`whole_file`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import QuantTuneError
from .limits import MOST_SIDES

METADATA_KEY = "quanttune"
"""Key of the header's string metadata under which our own JSON object is stored."""

FLOAT_UNET = "quanttune.float_unet"
"""What our metadata says of a UNet written for other programs: an ordinary float file."""

MAX_HEADER_BYTES, MAX_TENSORS = 2**25, 100_000
"""Of a header. The largest UNets have a few thousand tensors, whose names take less than 1 MB; some
trainers add megabytes of captions. More would only take seconds and memory to be read."""
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def own_format(strings: Mapping[str, str]) -> str | None:
    """The format of a file of ours by its header's strings: None for one of other programs, and
    for a float UNet, which is as theirs; "" when our metadata is unreadable."""
    if METADATA_KEY not in strings:
        return None
    try:
        told = strict_json(strings[METADATA_KEY])["format"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""
    return None if told == FLOAT_UNET else str(told)


def strict_json(text: str | bytes) -> Any:
    """JSON by its standard: no NaN, no infinity, and no key that stands twice in an object.

    Of a key with two values each program takes another one.

    Raises:
        ValueError: anything else.
        RecursionError: brackets deeper than any file of ours has.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that stands there twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} in place of a number")


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Map a safetensors file.

    Returns:
        Our metadata object, or None if the file carries none, and name to tensor. The tensors are
        views of the mapped file: reading them reads the disk, writing them does not write it.

    Raises:
        QuantTuneError: missing, empty, truncated, damaged or pickled files, and any other kind.
    """
    path = os.fspath(path)
    strings, tensors = read_with_strings(path)
    text = strings.get(METADATA_KEY)
    if text is None:
        return None, tensors
    try:
        metadata = strict_json(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise damaged(path, "has unreadable QuantTune metadata")
    return metadata, tensors


def read_with_strings(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """As `read_safetensors`, with all metadata as it stands in the file in place of ours."""
    path = os.fspath(path)
    strings, entries, begin = read_entries(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # checks the header
            storage = torch.UntypedStorage.from_file(path, False, os.path.getsize(path))
            tensors = {}
            for name in file.keys():
                known = _tensor(storage, entries[name], begin)
                tensors[name] = file.get_tensor(name) if known is None else known
            return strings, tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        if is_cut_short(path):
            raise damaged(path, "is cut short") from error
        raise damaged(path, f"has a damaged header ({first_line(error)})") from error


def _tensor(storage: torch.UntypedStorage, entry: dict[str, Any], begin: int) -> Tensor | None:
    """A view of a mapped file, as safetensors makes it; None for what it has to make itself.

    Its own `get_tensor` keeps two numbers of each tensor it gives (release 0.8), for good: 56
    bytes, 28 MB of a server that loads a model of a thousand tensors five hundred times.
    """
    dtype = DTYPES.get(entry["dtype"])
    first, last = entry["data_offsets"]
    if dtype is None or first == last:
        return None
    data = storage[begin + first : begin + last]
    return torch.asarray(data, dtype=torch.uint8).view(dtype).reshape(entry["shape"])


def read_header(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """What a safetensors file says of itself, without reading any of its data.

    Returns:
        All metadata as it stands in the file, and name to shape of the tensors.

    Raises:
        QuantTuneError: missing, empty, pickled files, a damaged header, and any other kind. Data
            that is cut short is no error here, see `is_cut_short`.
    """
    strings, entries, _ = read_entries(path)
    return strings, {name: tuple(entry["shape"]) for name, entry in entries.items()}


def read_entries(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, dict[str, Any]], int]:
    """The header of a safetensors file as it stands there; as `read_header`.

    Returns:
        All metadata, name to ``{"dtype", "shape", "data_offsets"}``, and where the data begin. Of
        the entries only the shapes have been looked at.
    """
    path = os.fspath(path)
    _check_start(path)
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            entries = strict_json(file.read(length))
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"{len(entries)} tensors, more than any model has")
        strings = entries.pop("__metadata__", None)
        strings = {} if strings is None else strings
        if not all(isinstance(text, str) for text in strings.values()):
            raise ValueError("metadata that is no text")
        for shape in [entry["shape"] for entry in entries.values()]:
            # An empty tensor may have sides, too, that no program counts to.
            if (
                not isinstance(shape, list)
                or len(shape) > MOST_SIDES
                or not all(type(n) is int and n >= 0 for n in shape)
                or math.prod(n or 1 for n in shape) >= 2**62
            ):
                raise ValueError("a shape that is none")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"has a damaged header ({first_line(error)})") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "has a damaged header (an entry that is none)") from error
    return dict(strings), entries, 8 + length


def refuse_pipe(path: str | os.PathLike[str]) -> None:
    """Raise OSError for a pipe, a socket or a device, whose reading may never end.

    Files and folders pass, and so does what is not there: opening them tells what is wrong.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # the latter for a NUL in the name
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file")


def _check_start(path: str) -> None:
    """Recognise by their first bytes the files that safetensors cannot explain in user terms."""
    try:
        refuse_pipe(path)
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise QuantTuneError(
            f"The file {path} does not exist; choose another file or put it there."
        ) from None
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise QuantTuneError(
            f"The file {path!r} cannot be read ({reason}); choose another file."
        ) from error
    if size == 0:
        raise damaged(path, "is empty")
    length = struct.unpack("<Q", start.ljust(9, b"\0")[:8])[0]
    # A header may be just as many bytes long as the first two of a pickle say.
    headed = start[8:9] == b"{" and length + 8 <= size
    if start.startswith(PICKLE_STARTS) and not headed:
        raise QuantTuneError(
            f"The file {path} is a pickled checkpoint, which can run code when it is opened; "
            "convert it to safetensors first."
        )
    if size < 9:
        raise damaged(path, "is cut short")
    if start[8:9] != b"{":
        raise QuantTuneError(
            f"The file {path} is not a safetensors file; choose one that ends in .safetensors."
        )
    if length > MAX_HEADER_BYTES:
        raise damaged(path, f"has a damaged header (it claims {length} bytes)")
    if length + 8 > size:
        raise damaged(path, "is cut short")


def is_cut_short(path: str) -> bool:
    """Whether a header that can be read promises more data than there is."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not length <= os.path.getsize(path) - 8:
                return False  # no header that can be read
            entries = json.loads(file.read(length))
        ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
        return 8 + length + max(ends) > os.path.getsize(path)
    except (OSError, struct.error, ValueError, RecursionError):
        return False
    except (TypeError, KeyError, AttributeError, IndexError):  # of a header that is none
        return False


def damaged(path: str | os.PathLike[str], how: str) -> QuantTuneError:
    """The error for a file that is not whole; ``how`` says what of it, "is cut short"."""
    return QuantTuneError(f"The file {os.fspath(path)} {how}; download or save it again.")


def first_line(error: BaseException) -> str:
    """What an error of another program says, short enough for a sentence of ours."""
    lines = str(error).splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
