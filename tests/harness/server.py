"""A real ComfyUI server with the pack installed, one for the whole test run."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quanttune.devtools.client import Client, Event, Graph, images_of
from quanttune.devtools.environment import DEV, Environment
from quanttune.devtools.host_process import HostProcess


def host_environment() -> Environment:
    """The host and the Python that this test run uses."""
    host = Path(os.environ.get("QUANTTUNE_HOST") or DEV / "ComfyUI")
    return Environment(host, Path(sys.executable), DEV / "site", managed=False)


class ComfyServer(HostProcess):
    """A running server; `client` has `run`, `submit`, `interrupt`, `upload_image`, `object_info`.

    Attributes:
        folder: its own base folder with `models/…`, `input`, `output`, `temp`, `user`.
    """

    client: Client

    def queue(self, graph: Graph, timeout: float = 300.0) -> tuple[dict[str, Any], list[Event]]:
        """Run a graph (API format) to its end; returns its history entry and all its events."""
        events: list[Event] = []
        return self.client.run(graph, timeout=timeout, on_event=events.append), events

    def forget_jobs(self) -> None:
        """Wait until nothing runs, and empty the list of what ran.

        A frontend that opens reads that list, and what hostile graphs of other tests leave there
        (NaN, which is no JSON) would be an error of its page.
        """
        while any(self.client.get("/queue").values()):  # a job is listed after its last event
            time.sleep(0.05)
        self.client.post("/history", {"clear": True})

    def forget_results(self) -> None:
        """Let the next graph compute all of its nodes.

        The host keeps results between graphs, so that what a node says of its work (progress,
        reports, badges) is missing when a test before this one has asked for the same.
        """
        self.client.post("/free", {"free_memory": True})
        # The host does so between two graphs, before the second or before the third.
        empty = {"width": 16, "height": 16, "batch_size": 1, "color": 0}
        self.client.run(
            {
                "1": {"class_type": "EmptyImage", "inputs": empty},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            }
        )

    def pictures(self, history: dict[str, Any]) -> dict[str, list[Any]]:
        """Pictures of a finished graph by node id, float arrays [height, width, channels]."""
        import numpy as np
        from PIL import Image

        def decode(entry: dict[str, str]) -> Any:
            with Image.open(io.BytesIO(self.client.image(entry))) as image:
                return np.asarray(image, dtype=np.float32) / 255.0

        return {n: [decode(e) for e in entries] for n, entries in images_of(history).items()}


def check_pictures(pictures: dict[str, list[Any]], nodes: list[str]) -> None:
    """Assert that each of these nodes left at least one picture and that none is of one colour."""
    import numpy as np

    for node in nodes:
        assert pictures.get(node), f"node {node} left no picture"
        for picture in pictures[node]:
            assert np.isfinite(picture).all(), f"a picture of node {node} is not finite"
            spread = float(picture[..., :3].std())
            assert spread > 0.01, f"a picture of node {node} is of one colour (spread {spread:.4f})"


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory) -> Iterator[ComfyServer]:
    """The real server on the CPU, in a folder of its own, the pack its only custom node."""
    server = ComfyServer(host_environment(), tmp_path_factory.mktemp("comfyui"))
    try:
        server.wait(timeout=300)
        assert not server.failed_imports(), server.pack_problem() or server.log_text()[-4000:]
        yield server
    finally:
        server.stop()
