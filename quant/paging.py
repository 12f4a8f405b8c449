"""Memory that the system gets back: weights it can read again from a file, and what is free.

A layer that multiplies integers keeps them in the order its processor wants; the packed ones, which
everything else reads, then wait for the next save, LoRA or change of layers. Kept in a mapped file
they take no memory meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import shutil
import sys
import tempfile
import weakref

import torch
from torch import Tensor

PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4 and later: the caller will not need these pages soon. Whatever has no
file or swap to come back from stays."""

TRIM_AFTER = 64 * 2**20
"""Bytes of large blocks let go between two calls to the C library that it give back what is free.
Bringing a model's weights into another form leaves a hole beside each of them: glibc kept as much
free memory as an 8-bit SD1.5 is large."""
LEFT_FREE = 2**30
"""Bytes of a disk that are left to others."""
_let_go = 0
_ended = 0


class PagedStore:
    """Copies of tensors in temporary files that no folder shows and that end with the tensors.

    Args:
        folder: on the disk to use; made if need be.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = folder

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in a file, or the tensor itself where no file can hold it (no
        disk space, or a system without `page_out`)."""
        if _advise() is None or tensor.numel() == 0 or tensor.device.type != "cpu":
            return tensor
        data = tensor.detach().contiguous()
        size = data.numel() * data.element_size()
        try:
            os.makedirs(self._folder, exist_ok=True)
            if shutil.disk_usage(self._folder).free < size + LEFT_FREE:
                return tensor
            # A file each: one of all would have to be held open, or mapped whole every time.
            handle, name = tempfile.mkstemp(dir=self._folder)
            try:
                with open(handle, "wb") as file:
                    file.write(data.view(-1).view(torch.uint8).numpy().data)
                    file.flush()
                    # Pages that are not on the disk yet could not be dropped.
                    os.fdatasync(file.fileno())
                mapped = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
            finally:
                os.unlink(name)
        except (OSError, RuntimeError):
            return tensor
        return mapped.view(data.dtype).view(data.shape)


def page_out(tensor: Tensor) -> None:
    """Tell the system that nothing will read a CPU tensor soon.

    Its values stay what they are. The memory of one that lies in a mapped file (`PagedStore`, or a
    safetensors file that this user may write) is free at once and the next access reads the file.
    Any other stays, or goes to swap where there is some.
    """
    advise = _advise()
    if advise is None or tensor.device.type != "cpu":
        return
    size = tensor.numel() * tensor.element_size()
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(PAGEOUT))


def let_go(size: int) -> None:
    """Count ``size`` bytes of blocks that were freed among others that stay; see `TRIM_AFTER`."""
    global _let_go
    _let_go += size
    if _let_go >= TRIM_AFTER and (trim := _trim()) is not None:
        _let_go = 0
        trim(0)


def give_back() -> None:
    """Hand what the C library keeps of freed memory back to the system, at the end of a stage.

    A stage of many blocks of other sizes than the next one's leaves hundreds of MiB that the next
    one may not find a use for.
    """
    if (trim := _trim()) is not None:
        trim(0)


def give_back_after(model: object) -> None:
    """`give_back` once ``model`` has ended and the garbage was collected.

    The host's models refer to themselves, so that their weights are free when Python's whole
    collection has run, which the host asks for after a graph. Holes that glibc would keep from then
    on were a tenth of a server's memory, more with every model.
    """
    if _collected not in gc.callbacks:
        gc.callbacks.append(_collected)
    weakref.finalize(model, _count_ended).atexit = False


def _count_ended() -> None:
    global _ended
    _ended += 1


def _collected(phase: str, info: dict) -> None:
    """Python's garbage collector tells that it begins or has ended."""
    global _ended
    if _ended and phase == "stop" and info["generation"] == 2:
        _ended = 0
        give_back()


@functools.cache
def _trim():
    """glibc's malloc_trim, or None with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


@functools.cache
def _advise():
    """The system's madvise, or None where it knows no PAGEOUT."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
