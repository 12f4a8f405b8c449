"""A model's file is replaced while the model is loaded, and while it runs."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quanttune.devtools.client import RunFailed

from .graphs import UNET_4BIT, Graphs

NAME = "victim.safetensors"
LONG = 120
"""Steps of a run that is still going on when its file is replaced."""
STARTER = Path(__file__).resolve().parents[2] / "starter" / "quanttune" / UNET_4BIT
WAYS = ("renamed", "written into")
WHEN = ("idle", "running")


@dataclass
class Replaced:
    """What one replacement did.

    Attributes:
        way: how, of `WAYS`.
        by: "8 bits", "cut short" or "another architecture" (the small upscaler's UNet, which takes
            more channels and other texts and which the host's sampler runs all the same).
        when: of `WHEN`.
        running: what became of the run that was going on.
        then: what the next run gave.
        wrong: what was not as it should be.
    """

    way: str
    by: str
    when: str
    running: str = ""
    then: str = ""
    wrong: list[str] = field(default_factory=list)


def others(server, wanted: Callable[[str], bool] = lambda by: True) -> dict[str, bytes]:
    """What the file is replaced by, of those that are wanted."""
    client, output = server.client, server.folder / "output" / "quanttune"
    graphs = Graphs(client.object_info())
    models = {
        "8 bits": graphs.node(
            "QuantTuneQuantizeUNet", model=["starter", 0], bits="8", range="minmax"
        ),
        "another architecture": graphs.node("QuantTuneLoadUpscaler", precision="8-bit"),
    }
    found, whole = {}, STARTER.read_bytes()
    if wanted("cut short"):
        found["cut short"] = whole[: len(whole) // 3]
    for by, node in models.items():
        if wanted(by):
            name = by.replace(" ", "-")
            save = graphs.node(
                "QuantTuneSaveQuantizedUNet", model=["made", 0], filename_prefix=f"quanttune/{name}"
            )
            client.run(graphs.starter() | {"made": node, "save": save})
            found[by] = max(output.glob(f"{name}_*.safetensors")).read_bytes()
    return found


def _picture(server, graph: dict[str, Any]) -> bytes:
    from .cycles import picture

    return picture(server.client, graph)


def _alone(server, graphs: Graphs, path: Path, content: bytes) -> bytes | None:
    """The picture of a file that lay there before it was loaded, None where it cannot be loaded."""
    replace(path, content, WAYS[0])
    try:
        return _picture(server, graphs.loaded(3, NAME))
    except RunFailed:
        return None


def replace(path: Path, content: bytes, way: str) -> None:
    """Put ``content`` in the place of a file, or into the file itself, as `cp` does."""
    if way == WAYS[0]:
        fresh = path.with_name(path.name + ".part")
        fresh.write_bytes(content)
        os.replace(fresh, path)
    else:
        path.write_bytes(content)


def run(
    start: Callable[[Path], Any],
    folder: Path,
    cases: Callable[[str, str, str], bool] = lambda way, by, when: True,
    long: int = LONG,
    say: Callable[[str], None] = print,
) -> list[Replaced]:
    """Replace the file of a loaded model in every way; returns what came of each.

    Args:
        start: starts a server over a folder and waits for it.
        cases: which are tried, by way, content and moment.
        long: steps of a run during which a file is replaced.
    """
    server, found = start(folder), []
    path = folder / "models" / "quanttune" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        contents = others(server, lambda by: any(cases(w, by, n) for w in WAYS for n in WHEN))
        shutil.copyfile(STARTER, path)
        graphs = Graphs(server.client.object_info())
        undisturbed = _picture(server, graphs.loaded(3, NAME, steps=long))
        right = _alone(server, graphs, path, STARTER.read_bytes())
        expected = {by: _alone(server, graphs, path, content) for by, content in contents.items()}
        for way in WAYS:
            for by, content in contents.items():
                for when in WHEN:
                    if not cases(way, by, when):
                        continue
                    one = Replaced(way, by, when)
                    found.append(one)
                    replace(path, STARTER.read_bytes(), WAYS[0])
                    if _picture(server, graphs.loaded(3, NAME)) != right:
                        one.wrong.append("the picture before is another one")
                    if when == "running":
                        graph = graphs.loaded(3, NAME, steps=long)
                        _while_running(server, graph, path, content, way, one, undisturbed)
                    else:
                        replace(path, content, way)
                    if server.process.poll() is not None:
                        server.stop()
                        server = start(folder)
                    _after(server, graphs, one, expected[by])
                    say(f"{one}")
    finally:
        server.stop()
    return found


def _while_running(server, graph, path, content, way, one, undisturbed) -> None:
    client, told, sampling = server.client, [], threading.Event()
    client.post("/free", {"free_memory": True})

    def listen(event):
        data = event.get("data") or {}
        if event["type"] == "progress" and data.get("node") == "sample" and data["value"] > 4:
            sampling.set()

    def ask():
        try:
            told.append(client.run(graph, on_event=listen))
        except (RunFailed, OSError) as error:
            told.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert sampling.wait(120), "the run did not begin"
    replace(path, content, way)
    thread.join(300)
    if isinstance(told[0], RunFailed):
        one.running = str(told[0]).strip()
        if NAME not in one.running or "\n" in one.running:
            one.wrong.append("not one sentence that names the file")
    elif isinstance(told[0], OSError):
        code = server.process.wait(30)
        one.running = f"the server ended with signal {-code}"
        if way == WAYS[0]:
            one.wrong.append("a renamed file ended the server")
    else:
        same = _of(client, told[0]) == undisturbed
        one.running = "unharmed" if same else "another picture"
        if not same:
            one.wrong.append("a wrong picture without a word")


def _of(client, entry) -> bytes:
    from .cycles import pixels

    return pixels(client.image(entry["outputs"]["image"]["images"][0]))


def _after(server, graphs, one: Replaced, expected: bytes | None) -> None:
    """The next run has to see the new file: its picture, or a sentence about it."""
    try:
        got = server.client.run(graphs.loaded(3, NAME), timeout=120)
        same = expected is not None and _of(server.client, got) == expected
        one.then = "the new model's picture" if same else "a picture"
        if not same:
            one.wrong.append("not the new model")
    except RunFailed as error:
        one.then = str(error).strip()
        if expected is not None:
            one.wrong.append("the new model does not run")
        if "\n" in one.then:
            one.wrong.append("not one sentence")
