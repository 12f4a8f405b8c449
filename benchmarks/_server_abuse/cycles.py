"""A thousand times: queue a graph, cancel it at a random moment, look at the server's memory."""

from __future__ import annotations

import io
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from . import probe
from .graphs import OTHER_SCALES, SCALES, Graphs

LIMIT = 0.01
"""Growth of the server's memory, relative, that is still none."""
WINDOW = 100
"""Cycles of which the median counts."""


@dataclass
class Cycles:
    """What came of it.

    Attributes:
        ended: how many were refused nothing and ended so: "interrupted", "success", "deleted",
            "error".
        rss, anonymous: MiB of the server after each cycle: all that is resident, and what no file
            stands behind.
        errors: what nodes said, where anything failed.
        freed: every so many cycles, their number and the MiB before and after `/free`.
        in_use: what the probe told then, with the number of cycles; nothing of a server without it.
        same: whether a run afterwards gives the picture of the run before, bit for bit.
    """

    ended: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    rss: list[float] = field(default_factory=list)
    anonymous: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    freed: list[tuple[int, float, float]] = field(default_factory=list)
    in_use: list[dict[str, float]] = field(default_factory=list)
    same: bool = False
    seconds: float = 0.0


def memory(pid: int) -> tuple[float, float]:
    """MiB of a process that are resident, and those among them that no file stands behind."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            found[name] = int(value.split()[0]) / 1024
    return found["VmRSS"], found["RssAnon"]


def growth(samples: list[float], warm: int, window: int = WINDOW) -> float:
    """Of the median of the last ``window`` over that of the ``window`` after ``warm``, minus 1."""
    window = min(window, max(1, (len(samples) - warm) // 2))
    return statistics.median(samples[-window:]) / statistics.median(samples[warm:][:window]) - 1


def growth_in_use(samples: list[dict[str, float]], warm: int) -> dict[str, float]:
    """Of what the probe told, relative, from the first after ``warm`` cycles to the last."""
    after = [told for told in samples if told["cycles"] >= warm]
    names = ("given_out", "python_blocks") if after else ()
    return {name: after[-1][name] / after[0][name] - 1 for name in names}


def ours(graphs: Graphs, chance: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    """A graph of ours, of a kind and with inputs by chance."""
    seed = chance.randrange(2**32)
    scales = chance.choice([SCALES, OTHER_SCALES, None])
    steps = chance.choice([2, 3, 20])
    kind = chance.choices(
        ["quantized", "loaded", "int8", "upscaled", "scales", "lora"], [4, 4, 3, 2, 1, 1]
    )[0]
    if kind == "quantized":
        return kind, graphs.quantized(seed, chance.choice("8432"), scales, steps)
    if kind in ("loaded", "int8"):
        return kind, graphs.loaded(seed, scales=scales, steps=steps, int8=kind == "int8")
    if kind == "upscaled":
        return kind, graphs.upscaled(seed)
    return kind, graphs.trained(kind, f"cycle-{kind}", if_run_exists="start anew")


def stock(graphs: Graphs, chance: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    """The float starter with the host's own sampler."""
    return "stock", graphs.stock(chance.randrange(2**32), chance.choice([2, 3, 20]))


def run(
    server,
    count: int,
    seed: int = 0,
    warm: int = 200,
    make: Callable = ours,
    longest: float = 0.9,
    probed: bool = False,
    say: Callable[[str], None] = print,
) -> Cycles:
    """Queue and cancel ``count`` graphs on a running server, and look whether it is unharmed.

    Ctrl-C ends it early; what was measured until then counts.

    Args:
        server: a `HostProcess`.
        warm: cycles before memory counts.
        make: gives the graphs.
        longest: seconds at most before one is cancelled.
        probed: whether the server has the `probe`.
    """
    client, chance = server.client, random.Random(seed)
    graphs, found = Graphs(client.object_info()), Cycles()
    sample = graphs.quantized(7) if make is ours else graphs.stock(7)
    before = picture(client, sample)
    began = time.monotonic()
    try:
        for number in range(count):
            kind, graph = make(graphs, chance, number)
            found.kinds[kind] += 1
            _cycle(client, graph, chance, longest, found)
            rss, anonymous = memory(server.process.pid)
            found.rss.append(rss)
            found.anonymous.append(anonymous)
            if (number + 1) % WINDOW == 0 or number + 1 == count:
                _measure(server, probed, found)
            if (number + 1) % 50 == 0:
                say(
                    f"{number + 1:5} cycles, {time.monotonic() - began:6.0f} s, {rss:7.0f} MiB "
                    f"({anonymous:.0f} anonymous), {dict(found.ended)}"
                )
    except KeyboardInterrupt:
        say(f"stopped after {len(found.rss)} cycles, which count")
        if found.rss:
            _measure(server, probed, found)
    found.same = picture(client, sample) == before
    found.seconds = time.monotonic() - began
    return found


def _measure(server, probed: bool, found: Cycles) -> None:
    """What the server holds once nothing is loaded and its history is empty."""
    cycles = len(found.rss)
    found.freed.append((cycles, found.rss[-1], free(server)))
    # The host keeps every graph it has run, up to 10,000: its history is not a leak.
    server.client.post("/history", {"clear": True})
    if probed:
        found.in_use.append({"cycles": cycles, **server.client.get(probe.ROUTE)})


def _cycle(client, graph: dict, chance: random.Random, longest: float, found: Cycles) -> None:
    """Queue one graph, or one behind another, and cancel it."""
    way = chance.choices(["interrupt", "delete", "both", "leave"], [12, 3, 3, 2])[0]
    wait = longest * chance.random() ** 1.5
    running = [client.submit(graph)]
    if way in ("delete", "both"):
        # Behind it and gone before it begins.
        behind = client.submit({**graph, "again": graph["image" if "image" in graph else "show"]})
        client.post("/queue", {"delete": [behind]})
        found.ended["deleted"] += 1
        assert behind not in client.get(f"/history/{behind}")
    if way != "leave":
        time.sleep(wait)
        if way == "both":
            client.post("/queue", {"clear": True})
        client.post("/interrupt", {"prompt_id": running[0]})
    for prompt in running:
        _end(client, prompt, found)


def _end(client, prompt: str, found: Cycles, timeout: float = 120.0) -> None:
    """Wait until a graph has ended; an interrupt that came before its start meets it again."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        entry = client.get(f"/history/{prompt}").get(prompt)
        if entry:
            break
        queue = client.get("/queue")
        listed = [item[1] for part in queue.values() for item in part]
        if prompt not in listed and not client.get(f"/history/{prompt}"):
            found.ended["deleted"] += 1
            return
        time.sleep(0.02)
    else:
        raise TimeoutError(f"a cancelled graph did not end within {timeout:.0f} s")
    messages = dict(entry["status"]["messages"])
    if "execution_error" in messages:
        found.ended["error"] += 1
        found.errors.append(str(messages["execution_error"].get("exception_message")).strip()[:300])
    elif "execution_interrupted" in messages:
        found.ended["interrupted"] += 1
    else:
        found.ended["success"] += 1


def free(server, timeout: float = 30.0) -> float:
    """MiB of the server after everything was unloaded (`/free`), as its users can ask for."""
    server.client.post("/free", {"unload_models": True, "free_memory": True})
    end, least = time.monotonic() + timeout, memory(server.process.pid)[0]
    settled = time.monotonic()
    while time.monotonic() < end and time.monotonic() - settled < 3:
        now = memory(server.process.pid)[0]
        if now < least - 1:
            least, settled = now, time.monotonic()
        time.sleep(0.2)
    return least


def picture(client, graph: dict) -> bytes:
    """The pixels of what a graph gives at "image"."""
    # The host gives nothing for a graph that it has just run.
    client.post("/free", {"free_memory": True})
    entry = client.run(graph, timeout=120)["outputs"]["image"]["images"][0]
    return pixels(client.image(entry))


def pixels(file: bytes) -> bytes:
    """What a picture's file shows, without what it says of its graph."""
    with Image.open(io.BytesIO(file)) as image:
        return image.convert("RGB").tobytes()
