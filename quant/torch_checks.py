"""What torch reads from its own files, held against the files.

Of a damaged or hostile file torch gives more than it holds: numbers of another record, of no
record, or a few of them many times over.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from .limits import MOST_SIDES
from .torch_structure import listed_storages

ZIP_START = b"PK\x03\x04"
NESTED = ("state_dict", "model_state_dict", "model")
"""Where checkpoints of training programs keep the weights among other things."""
_LOCAL_HEADER = 30


def record_begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int | None:
    """Where the bytes of a record begin in a file; None where there is no such record."""
    if not 0 <= entry.header_offset < 2**62:
        return None
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(ZIP_START):
        return None
    name, extra = struct.unpack("<HH", header[26:30])
    return entry.header_offset + _LOCAL_HEADER + name + extra


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in mappings and sequences of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from tensors_in(entry)


def weights_among(found: object) -> object:
    """The mapping of weights in what a training program saved; what was saved if it has none."""
    if isinstance(found, dict):
        for key in NESTED:
            if isinstance(found.get(key), dict):
                return found[key]
    return found


def check_extent(value: object) -> None:
    """Refuse tensors that are larger than the numbers that a file holds.

    Raises:
        ValueError: a tensor that shows its numbers more than once: a few bytes could fill the
            memory when they are copied. Or one of more dimensions than any model's.
    """
    for tensor in tensors_in(value):
        if tensor.dim() > MOST_SIDES:
            raise ValueError(f"it holds a tensor of {tensor.dim()} dimensions")
        if tensor.layout != torch.strided or tensor.is_quantized:
            continue  # has no numbers in a row; whoever needs them refuses it
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError("it holds a tensor that is larger than its data")


def check_listed(path: str | os.PathLike[str], found: object) -> None:
    """Refuse a file from before torch 1.6 that lacks the numbers of a tensor.

    torch fills the storages that the file lists, and leaves in the others what happens to lie in
    the memory.

    Args:
        path: of the file.
        found: what torch read from it.

    Raises:
        ValueError: not as many storages are listed as the tensors have.
    """
    tensors = list(tensors_in(found))
    if all(t.layout == torch.strided for t in tensors):  # others are refused by whoever needs them
        own = {t.untyped_storage()._cdata for t in tensors}
        if len(own) != len(listed_storages(path)):
            raise ValueError("it has not the numbers of all its tensors")


def check_records(path: str | os.PathLike[str]) -> None:
    """Refuse an archive whose tensors are not just the records that it has.

    A mapped file is read where a record begins, as far as the structure says: without this the
    bytes that follow a short record would be taken for numbers.

    Raises:
        ValueError: a compressed record, or one of another size than its tensors.
        Exception: whatever a damaged archive makes torch or zipfile raise.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            # Mapped, its compressed bytes would be taken for numbers.
            raise ValueError("it is a compressed archive, which PyTorch does not write")
        if len({entry.filename for entry in entries}) != len(entries):
            raise ValueError("it has two records of one name")
        sizes = {record_begin(file, entry): entry.file_size for entry in entries}
    found = torch.load(path, map_location="meta", weights_only=True)
    check_extent(found)
    for tensor in tensors_in(found):
        if tensor.layout != torch.strided or tensor.is_quantized:
            continue
        storage = tensor.untyped_storage()
        # Older releases of torch do not say it.
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is not None and storage.nbytes() and sizes.get(offset) != storage.nbytes():
            raise ValueError("it holds a tensor of another size than its data")
