"""Reusable CPU buffers for float weights that live only as long as one layer's product."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class ScratchPool:
    """One growing buffer per thread, dtype and device.

    A fresh 59 MB buffer for every layer would cost more in page faults than the dequantization
    that fills it. The buffer handed out by `get` is overwritten by the next `get` of the same
    thread, dtype and device, so it must not be kept, and not be saved for a backward pass.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def get(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An uninitialised contiguous tensor, valid until the next `get` of the same kind.

        Devices with a caching allocator of their own get an ordinary new tensor.
        """
        device = torch.device(device)
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        buffers = self._local.__dict__.setdefault("buffers", {})
        count = math.prod(shape)
        buffer = buffers.get(dtype)
        if buffer is None or buffer.numel() < count:
            buffers.pop(dtype, None)
            # An inference tensor could not be written to outside inference mode later on.
            with torch.inference_mode(False):
                buffer = buffers[dtype] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)

    def nbytes(self) -> int:
        """Bytes that this thread's buffers hold."""
        return sum(b.numel() * b.element_size() for b in self._buffers())

    def clear(self) -> None:
        """Give this thread's buffers back."""
        self._local.__dict__.pop("buffers", None)

    def _buffers(self) -> list[Tensor]:
        return list(self._local.__dict__.get("buffers", {}).values())


WEIGHTS = ScratchPool()
"""The pool that layers share for their dequantized weights."""
