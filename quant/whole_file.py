"""Writing files so that a bad disk never hurts anyone: whole, or not at all.

Writing goes to a temporary file beside the target, which replaces it only when every byte is on
the disk. Reading is in `safe_file`.
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
from torch import Tensor

from .errors import QuantTuneError
from .safe_file import DTYPE_NAMES, METADATA_KEY

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
        if (cause := _of_the_system(error)) is not None:
            raise unwritten(path, cause, size) from error
        raise


def _of_the_system(error: BaseException) -> OSError | None:
    """The error of the system that an error is, or that it hides: torch's writer of archives meets
    a full disk, wants to end its archive all the same, and tells that it could not."""
    if isinstance(error, OSError):
        return error
    hidden = error.__context__ if isinstance(error, RuntimeError) else None
    return hidden if isinstance(hidden, OSError) else None


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
