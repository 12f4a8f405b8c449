"""Reading PyTorch's own checkpoints (.pth, .pt, .ckpt) safely, and a few rows at a time.

Such a file is a zip archive: one record with the structure, pickled, and a record
for the numbers of each storage. The structure is read by torch's restricted reader, which runs no
code, onto the meta device, so that no number is read. Numbers are then read at the place where the
archive's directory says they lie.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
import zipfile
from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import QuantTuneError
from .limits import MOST_SIDES
from .paging import page_out
from .safe_file import first_line, refuse_pipe
from .torch_checks import ZIP_START, record_begin, weights_among
from .torch_structure import check_structure
from .whole_file import tensor_bytes

SUFFIXES = (".pth", ".pt", ".ckpt")
OLD_START, LFS_START = b"\x80", b"version "
"""How files from before torch 1.6 begin, and those that Git leaves where it did not fetch one."""
LARGEST_STRUCTURE = 256 * 2**20
"""Bytes of the record with the structure: a thousand times that of a large model."""
BLOCK = 2**20
"""Weights read at once by `StoredTensor.blocks`."""
NOT_TENSORS = (
    "Weights only load failed",
    "Unsupported global",
    "Unsupported class",
    "Unsupported operand",
    "weights_only",
)


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a zip archive does; False where it cannot be read."""
    try:
        refuse_pipe(path)
        with open(path, "rb") as file:
            return file.read(4) == ZIP_START
    except (OSError, ValueError):
        return False


class StoredTensor:
    """A tensor of a checkpoint that is still in its file.

    Attributes:
        name: its key.
        shape, dtype: of the tensor.
    """

    def __init__(self, archive: TensorArchive, name: str, tensor: Tensor, offset: int | None):
        self.name, self.shape, self.dtype = name, tuple(tensor.shape), tensor.dtype
        self._archive, self._offset = archive, offset
        # Of the meta device (only sizes and strides count), or mapped.
        self._tensor = tensor

    @property
    def path(self) -> str:
        """Of the file that it is in."""
        return self._archive.path

    @property
    def numel(self) -> int:
        """Number of values."""
        return self._tensor.numel()

    def read(self) -> Tensor:
        """The whole tensor, float32 and contiguous."""
        if not self.shape:
            return self._read(self._tensor.reshape(1)).reshape(())
        return self._read(self._tensor)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after the other, about ``size`` values at once: slices and float32 tensors."""
        rows = self.shape[0]
        step = max(1, size // max(1, self.numel // rows))
        for start in range(0, rows, step):
            block = slice(start, min(rows, start + step))
            yield block, self._read(self._tensor[block])

    def rows(self, block: slice) -> Tensor:
        """Some rows, float32 and contiguous."""
        return self._read(self._tensor[block])

    def _read(self, view: Tensor) -> Tensor:
        if self._offset is None:
            values = view.float().clone(memory_format=torch.contiguous_format)
            page_out(view)
            return values
        size = view.element_size()
        # What lies between the first and the last value; all of it the tensor's, unless a stride
        # skips something.
        span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride()))
        raw = torch.empty(span, dtype=self.dtype)
        self._archive.read_into(raw, self._offset + view.storage_offset() * size)
        return raw.as_strided(view.shape, view.stride()).float().contiguous()


class TensorArchive:
    """The tensors of a checkpoint that holds nothing but tensors by name.

    The file stays open until nothing refers to the archive or its tensors any more.

    Attributes:
        path: of the file.
        tensors: name to `StoredTensor`. Entries that are no tensors are left out.

    Raises:
        QuantTuneError: the file is missing, no archive, damaged, or holds code.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        try:
            refuse_pipe(self.path)
            self._file = open(self.path, "rb", buffering=0)
        except FileNotFoundError:
            raise QuantTuneError(
                f"The file {self.path} does not exist; choose another file or put it there."
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise QuantTuneError(
                f"The file {self.path!r} cannot be read ({reason}); choose another file."
            ) from error
        weakref.finalize(self, self._file.close)
        self._state = self._stat()
        records = self._records()
        self.tensors = {}
        for name, tensor in _structure(self.path).items():
            if isinstance(name, str) and isinstance(tensor, Tensor):
                self.tensors[name] = self._stored(name, tensor.detach(), records)

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes at ``offset`` of the file.

        Raises:
            QuantTuneError: the file has been changed since it was opened, or cannot be read.
        """
        left = tensor_bytes(target)
        try:
            with self._lock:
                if self._stat() != self._state:
                    raise QuantTuneError(
                        f"The file {self.path} was changed while it was being read; load it again."
                    )
                self._file.seek(offset)
                while left:
                    count = self._file.readinto(left[: 2**30])
                    if not count:
                        raise self._damaged("is cut short")
                    left = left[count:]
        except OSError as error:
            raise self._damaged(f"cannot be read ({error.strerror or error})") from error

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def _damaged(self, how: str) -> QuantTuneError:
        return QuantTuneError(f"The file {self.path} {how}; download or copy it again.")

    def _records(self) -> dict[int, int]:
        """Where the records of the archive begin, and their sizes."""
        try:
            start = self._file.read(8)
        except OSError as error:
            raise self._damaged(f"cannot be read ({error.strerror or error})") from error
        if not start.startswith((ZIP_START, OLD_START)):
            pointer = "; it is a Git LFS pointer in place of one" if start == LFS_START else ""
            raise QuantTuneError(
                f"The file {self.path} is no checkpoint of PyTorch{pointer}; download it again or "
                "choose another file."
            )
        if not start.startswith(ZIP_START):
            raise QuantTuneError(
                f"The file {self.path} is no checkpoint of a PyTorch since 1.6; load it with torch "
                "and save it again, or choose another file."
            )
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = archive.infolist()
                order = [
                    archive.read(e)
                    for e in entries
                    if e.filename.endswith("/byteorder") and e.file_size < 16
                ]
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            OSError,
            ValueError,
            EOFError,
            RuntimeError,
        ) as error:
            raise self._damaged(f"is cut short or damaged ({first_line(error)})") from error
        if order and order[0].decode("ascii", "replace") != sys.byteorder:
            raise QuantTuneError(
                f"The file {self.path} was written on a machine with another order of bytes; load "
                "it with torch and save it again."
            )
        records = {}
        if len({entry.filename for entry in entries}) != len(entries):
            raise self._damaged("is damaged (it has two records of one name)")
        # torch calculates where a record lies and does not ask for its name; a name that is
        # another is a damaged directory, though.
        data = f"{entries[0].filename.partition('/')[0]}/data/".lower() if entries else ""
        for entry in entries:
            pickled = entry.filename.endswith("data.pkl")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise QuantTuneError(
                    f"The file {self.path} is a compressed archive; load it with torch and save it "
                    "again."
                )
            if pickled and entry.file_size > LARGEST_STRUCTURE:
                raise self._damaged("describes more than any model holds")
            begin = record_begin(self._file, entry)
            if begin is None:
                raise self._damaged("is cut short or damaged (a record is not where it should be)")
            if begin + entry.file_size > self._state[0]:
                raise self._damaged("is cut short")
            if entry.filename.lower().startswith(data):
                records[begin] = entry.file_size
        return records

    def _stored(self, name: str, tensor: Tensor, records: dict[int, int]) -> StoredTensor:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise QuantTuneError(
                f"The file {self.path} holds '{name[:100]}' as a {tensor.layout} tensor, which no "
                "checkpoint of weights does; choose another file."
            )
        if tensor.dim() > MOST_SIDES:
            raise QuantTuneError(
                f"The file {self.path} holds '{name[:100]}' with {tensor.dim()} dimensions, which "
                "no checkpoint of weights does; choose another file."
            )
        if tensor.is_neg() or tensor.is_conj():
            raise QuantTuneError(
                f"The file {self.path} holds '{name[:100]}' as the negative or the conjugate of "
                "its numbers, which no checkpoint of weights does; choose another file."
            )
        if tensor.device.type != "meta":
            return StoredTensor(self, name, tensor, None)
        storage = tensor.untyped_storage()
        if tensor.numel() == 0:
            return StoredTensor(self, name, tensor, 0)
        offset = storage._checkpoint_offset
        last = tensor.storage_offset() + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.stride())
        )
        size = tensor.element_size()
        fits = records.get(offset) == storage.nbytes() >= (last + 1) * size
        if not fits or tensor.numel() * size > storage.nbytes() or tensor.storage_offset() < 0:
            raise self._damaged(
                f"is damaged: what the tensor '{name[:100]}' needs is not there or larger than its "
                "data"
            )
        return StoredTensor(self, name, tensor, offset)


def _structure(path: str) -> dict:
    """The mapping in a file, its tensors on the meta device, or mapped where torch is older."""
    try:
        check_structure(path)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise QuantTuneError(
            f"The file {path} is damaged or holds more than tensors ({first_line(error)}); choose "
            "one with a plain dictionary of tensors."
        ) from error
    try:
        found = _mapping(path, torch.load(path, map_location="meta", weights_only=True))
        if any(
            isinstance(t, Tensor)
            and t.numel()
            and getattr(t.untyped_storage(), "_checkpoint_offset", None) is None
            for t in found.values()
        ):
            found = _mapping(path, torch.load(path, "cpu", weights_only=True, mmap=True))
    except QuantTuneError:
        raise
    except Exception as error:  # torch raises whatever a hostile structure makes it meet
        text = str(error)
        if any(words in text for words in NOT_TENSORS):
            raise QuantTuneError(
                f"The file {path} holds more than tensors (pickled code, which could run when it "
                "is opened); choose one with a plain dictionary of tensors."
            ) from error
        raise QuantTuneError(
            f"The file {path} is cut short or damaged ({first_line(error).replace('. ', ' ')}); "
            "download or copy it again."
        ) from error
    return found


def _mapping(path: str, found: object) -> dict:
    """The tensors by name: what was saved itself, or the weights among other things."""
    found = weights_among(found)
    if not isinstance(found, dict):
        raise QuantTuneError(
            f"The file {path} holds a {type(found).__name__} and not a dictionary of tensors; "
            "choose another file."
        )
    return found
