"""Reading and writing files so that a bad disk or a bad file never hurts anyone.

Writing goes to a temporary file beside the target, which replaces it only when every byte is on
the disk. Reading maps the file: tensors are views of the map, and nothing is copied.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import QuantTuneError

METADATA_KEY = "quanttune"
"""Key of the header's string metadata under which our own JSON object is stored."""

FLOAT_UNET = "quanttune.float_unet"
"""What our metadata says of a UNet written for other programs: an ordinary float file."""
MAX_HEADER_BYTES = 100_000_000
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
CURES = {
    errno.ENOSPC: "the disk is full{}; free some space or choose another folder",
    # Not every system has quotas.
    getattr(errno, "EDQUOT", -1): "the quota is used up{}; choose another folder",
    errno.EROFS: "the folder is read-only; choose another folder",
    # Windows says so too of a file that is still mapped, as a loaded model is.
    errno.EACCES: "writing there is not permitted or the file is in use; choose another name",
    errno.EPERM: "writing there is not permitted; choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "there is a folder of that name; choose another name",
}
PART = re.compile(r".+\.[0-9a-f]{8}\.tmp")
"""Names of files that are being written; see `written_whole`."""
PART_SECONDS = 24 * 3600
"""Age at which nobody can be writing one any more."""


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written to a file, so that none but it is in memory.

    Attributes:
        dtype, shape: what ``make`` will give.
        make: gives the tensor; called once for each time it is written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def element_size(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Later],
    metadata: Mapping[str, Any],
    overwrite: bool = True,
    strings: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and our metadata to ``path``, completely or not at all.

    Tensors are written one by one from where they are; no second copy of the model is made.

    Args:
        path: target; its folder is created if need be.
        tensors: name to tensor on any device, or to one that is made meanwhile.
        metadata: JSON-able object stored under `METADATA_KEY`.
        overwrite: False refuses to replace an existing file.
        strings: metadata for other programs, beside ours.

    Raises:
        QuantTuneError: the file exists already, or cannot be written; nothing is left behind.
    """
    path = os.fspath(path)
    if not overwrite and os.path.exists(path):
        raise QuantTuneError(
            f"The file {path} exists already; choose another name or allow overwriting."
        )
    names = stored_order(tensors)
    try:
        texts = {**(strings or {}), METADATA_KEY: json.dumps(metadata, allow_nan=False)}
        header = stored_header(names, tensors, texts)
    except (TypeError, ValueError) as error:
        if isinstance(error, QuantTuneError):
            raise
        raise QuantTuneError(
            f"The metadata for {path} cannot be written as JSON ({error}); "
            "use numbers, strings, lists and mappings."
        ) from error
    size = len(header) + sum(t.numel() * t.element_size() for t in tensors.values())
    with written_whole(path, size) as file:
        file.write(header)
        for name in names:
            _write_tensor(file, tensors[name])


def stored_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in the order in which a file holds them.

    Wide types first keeps every tensor aligned in the map; names make the order reproducible.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


@contextmanager
def written_whole(path: str | os.PathLike[str], size: int | None = None) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends without an error.

    Its folder is created if need be. On an error, an interrupt or a full disk nothing is left
    behind, and what stood at ``path`` is still there. A process that is killed leaves a file that
    no list shows; the next one that is written to that folder a day later removes it.

    Args:
        size: bytes that the file will take, where they are known, to be told if the disk is full.

    Raises:
        QuantTuneError: the file cannot be written.
    """
    path = os.fspath(path)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        remove_old_parts(folder)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        if isinstance(error, OSError):
            raise unwritten(path, error, size) from error
        raise


def remove_old_parts(folder: str | os.PathLike[str]) -> None:
    """Delete what processes that were killed have left of files that they wrote here.

    Only what has not grown for a day: another process may be writing, and even computes between.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if PART.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > PART_SECONDS:
                        os.unlink(entry.path)
    except OSError:
        pass  # one that cannot be read or deleted stays


def unwritten(
    path: str | os.PathLike[str], error: OSError, size: int | None = None
) -> QuantTuneError:
    """What to tell the user of a file or folder of ``size`` bytes that could not be written."""
    cure = CURES.get(error.errno)
    if cure is None:
        cure = f"{error.strerror or error}; choose another folder"
    else:
        needed = "" if size is None else f" ({room(os.path.dirname(os.fspath(path)), size)})"
        cure = cure.format(needed)
    return QuantTuneError(f"The file {os.fspath(path)} could not be written because {cure}.")


def room(folder: str | os.PathLike[str], size: int) -> str:
    """For a sentence about a disk: "it takes 12.0 MB and 3.0 MB are free"."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        return f"it takes {_bytes(size)} and {_bytes(shutil.disk_usage(folder).free)} are free"
    except OSError:
        return f"it takes {_bytes(size)}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def stored_header(
    names: list[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> bytes:
    """The length-prefixed JSON header, padded so that the data starts at a multiple of 8.

    Args:
        names: of the tensors in the order of their data, see `stored_order`.
        tensors: name to tensor; the values do not matter, meta tensors will do.
        texts: the metadata.
    """
    # "format" is what other readers of safetensors files look at.
    entries: dict[str, Any] = {"__metadata__": {**texts, "format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise QuantTuneError(
                f"The tensor {name} has type {tensor.dtype}, which a safetensors file cannot "
                "hold; convert it to float first."
            )
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


def stored_places(names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Where each tensor begins among the data of a file that holds them in this order."""
    places, offset = {}, 0
    for name in names:
        places[name] = offset
        offset += tensors[name].numel() * tensors[name].element_size()
    return places


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy. Keep the tensor alive meanwhile."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B")


def _write_tensor(file: BinaryIO, tensor: Tensor | Later) -> None:
    if isinstance(tensor, Later):
        promised, tensor = tensor, tensor.make()
        assert (tensor.dtype, tuple(tensor.shape)) == (promised.dtype, tuple(promised.shape))
    tensor = tensor.detach().cpu().contiguous()
    file.write(tensor_bytes(tensor))


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
    read_entries(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            strings = dict(file.metadata() or {})
            return strings, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        if is_cut_short(path):
            raise damaged(path, "is cut short") from error
        raise damaged(path, f"has a damaged header ({first_line(error)})") from error


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
        strings = entries.pop("__metadata__", None)
        strings = {} if strings is None else strings
        if not all(isinstance(text, str) for text in strings.values()):
            raise ValueError("metadata that is no text")
        shapes = [tuple(entry["shape"]) for entry in entries.values()]
        for shape in shapes:
            # An empty tensor may have sides, too, that no program counts to.
            if not all(type(n) is int and n >= 0 for n in shape) or (
                math.prod(n or 1 for n in shape) >= 2**62
            ):
                raise ValueError("a shape that is none")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"has a damaged header ({first_line(error)})") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "has a damaged header (an entry that is none)") from error
    return dict(strings), entries, 8 + length


def _check_start(path: str) -> None:
    """Recognise by their first bytes the files that safetensors cannot explain in user terms."""
    try:
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
