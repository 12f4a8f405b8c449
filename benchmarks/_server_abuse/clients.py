"""Two clients queue at once: each has to get its own pictures, the same as when it is alone."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from quanttune.devtools.client import Client, WebSocket

from .cycles import picture, pixels
from .graphs import OTHER_SCALES, SCALES, Graphs

QUIET = 120.0
"""Seconds without a message after which a client gives up."""


@dataclass
class Clients:
    """What came of it.

    Attributes:
        jobs: how many pictures each client asked for.
        wrong: what was not as it should be.
    """

    jobs: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def jobs(graphs: Graphs, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Graphs of two clients: other seeds, bits, scale files and ways to compute."""
    chance, found = random.Random(seed), [[], []]
    for number in range(2 * count):
        noise, scales = chance.randrange(2**32), chance.choice([SCALES, OTHER_SCALES, None])
        kind = chance.choice(["quantized", "loaded", "int8", "stock"])
        if kind == "quantized":
            graph = graphs.quantized(noise, chance.choice("843"), scales)
        elif kind == "stock":
            graph = graphs.stock(noise)
        else:
            graph = graphs.loaded(noise, scales=scales, int8=kind == "int8")
        found[number % 2].append(graph)
    return found


class _Listener(threading.Thread):
    """One client with its own websocket: queues its graphs, and keeps what it is told."""

    def __init__(self, server, graphs: list[dict], together: threading.Barrier):
        super().__init__(daemon=True)
        self.client = Client("127.0.0.1", server.port)
        self.graphs, self.together = graphs, together
        self.got: dict[int, bytes] = {}
        self.wrong: list[str] = []

    def run(self) -> None:
        """Queue all at once, then listen until all have ended."""
        try:
            self._run()
        except Exception as error:  # told by the main thread
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        client = self.client
        socket = WebSocket(client.host, client.port, f"/ws?clientId={client.client_id}")
        try:
            self.together.wait(60)
            mine = {client.submit(graph): n for n, graph in enumerate(self.graphs)}
            left = set(mine)
            while left:
                message = socket.receive(QUIET)
                if not isinstance(message, str):
                    continue
                event = json.loads(message)
                data = event.get("data") or {}
                prompt = data.get("prompt_id")
                if event["type"] == "executed" and prompt not in mine:
                    self.wrong.append("told of the other client's result")
                if event["type"] in ("execution_error", "execution_interrupted"):
                    self.wrong.append(str(data.get("exception_message", event["type"])))
                    left.discard(prompt)
                if event["type"] == "executed" and "images" in (data.get("output") or {}):
                    self.got[mine[prompt]] = pixels(client.image(data["output"]["images"][0]))
                if event["type"] == "execution_success":
                    left.discard(prompt)
        finally:
            socket.close()


def run(server, count: int = 12, seed: int = 0, say: Callable[[str], None] = print) -> Clients:
    """Let two clients queue ``count`` graphs each, and then each graph again alone."""
    graphs, found = Graphs(server.client.object_info()), Clients()
    together = threading.Barrier(2)
    listeners = [_Listener(server, mine, together) for mine in jobs(graphs, count, seed)]
    for listener in listeners:
        listener.start()
    for number, listener in enumerate(listeners):
        listener.join(600)
        found.jobs.append(len(listener.got))
        found.wrong += listener.wrong
        if len(listener.got) != count:
            found.wrong.append(f"client {number} got {len(listener.got)} of {count} pictures")
    seen = set()
    for number, listener in enumerate(listeners):
        for job, got in listener.got.items():
            seen.add(got)
            if picture(server.client, listener.graphs[job]) != got:
                found.wrong.append(f"client {number}: picture {job} is not the one alone")
    if len(seen) < sum(found.jobs):
        found.wrong.append("two jobs gave one picture")
    say(f"{found}")
    return found
