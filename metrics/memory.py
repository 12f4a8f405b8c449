"""Peak memory of a piece of work: of the graphics card, or resident in the process."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
INTERVAL = 0.005
"""Seconds between two looks at the resident size where the system keeps no peak."""


class Peak:
    """What `peak_memory` found.

    Attributes:
        before: bytes in use when the work began.
        peak: the most that were in use, at least ``before``.
    """

    def __init__(self, before: int):
        self.before = self.peak = before

    @property
    def extra(self) -> int:
        """Bytes above what was in use before."""
        return self.peak - self.before


@contextmanager
def peak_memory(device: torch.device):
    """Measure the work inside; yields a `Peak` that is complete afterwards.

    On CUDA the allocator's own peak; on a processor the resident set's, which Linux keeps and lets
    one reset, and which is looked at all the time elsewhere. Other threads of the process count,
    too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        found = Peak(torch.cuda.memory_allocated(device))
        yield found
        torch.cuda.synchronize(device)
        found.peak = max(found.before, torch.cuda.max_memory_allocated(device))
        return
    if _reset():
        found = Peak(_field("VmRSS"))
        yield found
        found.peak = max(found.before, _field("VmHWM"))
        return
    found = Peak(_resident())
    over = threading.Event()
    watch = threading.Thread(target=_look, args=(found, over), daemon=True)
    watch.start()
    try:
        yield found
    finally:
        over.set()
        watch.join()


def _reset() -> bool:
    """Set Linux' peak back to the present size; False where there is no such thing."""
    with suppress(OSError):
        RESET.write_text("5")
        return STATUS.exists()
    return False


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _resident() -> int:
    import psutil  # a requirement of the host

    return psutil.Process().memory_info().rss


def _look(found: Peak, over: threading.Event) -> None:
    while not over.is_set():
        found.peak = max(found.peak, _resident())
        time.sleep(INTERVAL)
