"""A custom node of the benchmark's own servers: what the process holds, told from within.

The memory that is resident also holds the holes between what is in use, which come and go. Here is
what is in use: blocks that malloc has given out (tensors are among them) and those of Python. The
file is linked into a server's custom_nodes and imports nothing of the pack.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

ROUTE = "/abuse/in_use"
NODE_CLASS_MAPPINGS: dict = {}
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
          "fordblks", "keepcost")  # fmt: skip


class _Malloc(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def in_use() -> dict[str, float]:
    """MiB that malloc has given out and that it keeps free, and blocks of Python's allocator."""
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2  # glibc 2.33 or later
    ask.restype = _Malloc
    told = ask()
    return {
        "given_out": (told.uordblks + told.hblkhd) / 2**20,
        "free": told.fordblks / 2**20,
        "python_blocks": sys.getallocatedblocks(),
    }


def install(folder: Path) -> None:
    """Put this file among the custom nodes of a server's folder, before it starts."""
    nodes = folder / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    (nodes / "abuse_probe.py").symlink_to(Path(__file__).resolve())


def _serve() -> None:
    from aiohttp import web
    from server import PromptServer

    async def answer(request):
        return web.json_response(in_use())

    PromptServer.instance.routes.get(ROUTE)(answer)


if __name__.endswith("abuse_probe"):  # as the host imports it
    _serve()
