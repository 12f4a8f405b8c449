"""Model files of other programs, read tensor by tensor: safetensors, or PyTorch's own form.

Nothing but tensors is ever taken from a pickled file (``weights_only=True``), and no more than one
of them need be in memory at a time, whatever the size of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import QuantTuneError
from .paging import let_go, page_out
from .safe_file import DTYPE_NAMES, damaged, first_line, is_cut_short, read_entries, refuse_pipe
from .torch_checks import check_extent, check_listed, check_records, weights_among
from .torch_structure import check_structure

SAFETENSORS = (".safetensors", ".sft")
"""How the names of safetensors files end, in capitals or small letters, as all of these."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""How the names of PyTorch's files end."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorFile:
    """The tensors of one file.

    Attributes:
        path: of the file.
        strings: its metadata; none in a pickled file.
        shapes: name to shape.
        dtypes: name to dtype.
    """

    path: Path
    strings: Mapping[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own.

        Raises:
            QuantTuneError: the file has become shorter, or cannot be read any more.
        """
        raise NotImplementedError

    def view(self, name: str) -> Tensor:
        """One tensor as part of the mapped file where there is such a thing."""
        return self.read(name)


class SafetensorsFile(TensorFile):
    """A safetensors file; see `TensorFile`.

    Raises:
        QuantTuneError: missing, empty, damaged or pickled files, or data that are cut short.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.strings, entries, start = read_entries(path)
        size = self.path.stat().st_size
        self.shapes, self.dtypes, self._places = {}, {}, {}
        for name, entry in entries.items():
            dtype = DTYPES.get(str(entry.get("dtype")))
            if dtype is None:
                raise QuantTuneError(
                    f"The file {path} holds '{name[:100]}' as {str(entry.get('dtype'))[:40]}, "
                    "which this program does not read; choose an fp32, fp16, bf16 or fp8 file."
                )
            shape = tuple(entry["shape"])
            places = entry.get("data_offsets")
            if not isinstance(places, list) or len(places) != 2 or not all(
                    type(n) is int and n >= 0 for n in places) or (
                    places[1] - places[0] != math.prod(shape) * dtype.itemsize):
                raise damaged(path, f"has a damaged header (of '{name[:100]}')")
            if start + places[1] > size:
                raise damaged(path, "is cut short")
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._places[name] = start + places[0], places[1] - places[0]
        end = start
        for name, (place, length) in sorted(self._places.items(), key=lambda entry: entry[1]):
            if place != end:
                raise damaged(path, f"has a damaged header (of '{name[:100]}')")
            end += length
        if end != size:
            raise damaged(path, "has bytes that belong to no tensor")

    def read(self, name: str) -> Tensor:
        """As `TensorFile.read`."""
        start, size = self._places[name]
        if not size:
            return torch.empty(self.shapes[name], dtype=self.dtypes[name])
        data = torch.empty(size, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                # Unbuffered reads may be shorter than asked for.
                count = file.readinto(memoryview(data.numpy()))
        except OSError as error:
            raise damaged(self.path, f"cannot be read ({error.strerror or error})") from error
        if count != size:
            raise damaged(self.path, "is cut short")
        let_go(size)
        return data.view(self.dtypes[name]).view(self.shapes[name])

    def view(self, name: str) -> Tensor:
        """As `TensorFile.view`."""
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            how = "is cut short" if is_cut_short(os.fspath(self.path)) else (
                f"has a damaged header ({first_line(error)})")
            raise damaged(self.path, how) from error


class PickledFile(TensorFile):
    """A PyTorch file, mapped where its form allows that; see `TensorFile`.

    Raises:
        QuantTuneError: as `load_pickled`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.strings = Path(path), {}
        self._tensors = load_pickled(path)
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """As `TensorFile.read`; the part of the file is let go again."""
        tensor = self._tensors[name].clone(memory_format=torch.contiguous_format)
        page_out(self._tensors[name])
        let_go(tensor.numel() * tensor.element_size())
        return tensor

    def view(self, name: str) -> Tensor:
        """As `TensorFile.view`."""
        return self._tensors[name].contiguous()


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """A model file, by the ending of its name.

    Raises:
        QuantTuneError: as `SafetensorsFile` and `load_pickled`, and for any other ending.
    """
    suffix = Path(path).suffix.lower()
    if suffix in SAFETENSORS:
        return SafetensorsFile(path)
    if suffix in PICKLED:
        return PickledFile(path)
    raise QuantTuneError(
        f"The file {os.fspath(path)} is no model file that this program reads; choose one that "
        f"ends in .safetensors, {', '.join(PICKLED[:-1])} or {PICKLED[-1]}."
    )


def load_unpickled(path: str | os.PathLike[str], plain: bool = True) -> object:
    """What a PyTorch file holds: tensors, numbers, texts, lists and mappings, and nothing else.

    Its tensors are views of the mapped file where the file has today's form (a zip archive).

    Args:
        path: of the file.
        plain: refuse tensors that are not rows of numbers, which nothing here computes with; False
            to look at the names alone.

    Raises:
        QuantTuneError: missing, damaged, or with anything that would run code.
    """
    path = os.fspath(path)
    try:
        refuse_pipe(path)
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        check_structure(path)
        if mapped:
            check_records(path)
        # "mmap" is for the zip form alone.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        check_extent(found)
        if not mapped:
            check_listed(path, found)
    except FileNotFoundError:
        raise QuantTuneError(
            f"The file {path} does not exist; choose another file or put it there."
        ) from None
    except Exception as error:  # what a damaged or hostile file raises is not documented
        told = ("there may be code in it, which is never run"
                if type(error).__name__ == "UnpicklingError" else first_line(error)[:80])
        raise QuantTuneError(
            f"The file {path} is damaged or holds more than weights ({told}); "
            "download it again, or its .safetensors form."
        ) from error
    if plain and (odd := _odd(found)):
        raise QuantTuneError(
            f"The file {path} holds '{odd[:100]}', which is no plain tensor (sparse, quantized, "
            "negated or without numbers), as no file of weights does; choose another file."
        )
    return found


def _odd(found: object) -> str:
    """The name of a tensor that has no rows of numbers in memory, or nothing."""
    stack: list[tuple[str, object]] = [("", found)]
    seen: set[int] = set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, (dict, list, tuple)):
            if id(value) in seen:  # a hostile file may hold a list of itself
                continue
            seen.add(id(value))
        if isinstance(value, dict):
            stack.extend((str(key), entry) for key, entry in value.items())
        elif isinstance(value, (list, tuple)):
            stack.extend((name, entry) for entry in value)
        elif isinstance(value, Tensor) and (
            value.layout != torch.strided
            or value.is_quantized
            or value.is_nested
            or value.is_neg()
            or value.is_conj()
            or value.device.type != "cpu"
        ):
            return name or "a tensor"
    return ""


def load_pickled(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a PyTorch file by name; see `load_unpickled`.

    Raises:
        QuantTuneError: also for something else than the weights of a model.
    """
    state = load_unpickled(path)
    if (inner := weights_among(state)) is not state:
        state = {k: v for k, v in inner.items() if isinstance(v, Tensor)}
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise QuantTuneError(
            f"The file {os.fspath(path)} holds something else than the weights of a model; "
            "download it again, or its .safetensors form."
        )
    return state
