"""A full disk under ComfyUI's output folder: a small file system, filled but for a little."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quanttune.devtools.client import RunFailed

from .graphs import Graphs

ROOMS = (6_000, 30_000)
"""Bytes that are left: enough for a folder, and for a header."""
SMALL = "96m"


class NoSmallDisk(Exception):
    """This user may not make a small file system."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of `SMALL` bytes at ``folder`` (Linux, as root). Raises `NoSmallDisk`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NoSmallDisk(str(error)) from error
    if made.returncode:
        raise NoSmallDisk(made.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass
class Full:
    """What one node did on a full disk.

    Attributes:
        node: its class.
        room: bytes that were free.
        told: what it said.
        wrong: what was not as it should be.
    """

    node: str
    room: int
    told: str = ""
    wrong: list[str] = field(default_factory=list)


def _base(graphs: Graphs, bits: str = "8") -> dict[str, Any]:
    return graphs.starter() | {
        "quantized": graphs.node(
            "QuantTuneQuantizeUNet", model=["starter", 0], bits=bits, range="minmax"
        )
    }


def export_source(models: Path) -> str:
    """A tiny SD1 UNet, random weights, among the models: what 'Load Diffusers UNet' calls it.

    diffusers has a name for every tensor of it, which it has not for the starter's.
    """
    from quanttune.tests.host import unets

    name = "tiny-sd"
    if not (models / "diffusers" / name).exists():
        unets.save_pipeline(unets.tiny_unet(), models / "diffusers" / name)
    return f"{name}/"


def savers(graphs: Graphs, models: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The nodes that write files, by a title: class and graph, with the saver at "save".

    Args:
        models: the server's folder of models, for what one of them saves.
    """
    trained = {
        k: graphs.trained(k, f"full-{k}", 2, checkpointing=False) for k in ("scales", "lora")
    }
    found = {}

    def add(title, kind, graph, **inputs):
        found[title] = kind, graph | {"save": graphs.node(kind, **inputs)}

    add("quantized UNet", "QuantTuneSaveQuantizedUNet", _base(graphs),
        model=["quantized", 0], filename_prefix="quanttune/full")  # fmt: skip
    add("stock INT8", "QuantTuneSaveForStock", _base(graphs),
        model=["quantized", 0], filename_prefix="diffusion_models/full")  # fmt: skip
    add("float UNet, ComfyUI file", "QuantTuneExportUNet", _base(graphs), model=["quantized", 0],
        format="ComfyUI file", filename_prefix="diffusion_models/full")  # fmt: skip
    tiny = {"tiny": graphs.node("QuantTuneLoadDiffusersUNet", unet=export_source(models))}
    add("float UNet, diffusers folder", "QuantTuneExportUNet", tiny, model=["tiny", 0],
        format="diffusers folder", filename_prefix="diffusion_models/full")  # fmt: skip
    add("scales", "QuantTuneSaveScales", trained["scales"],
        scales=["train", 0], filename_prefix="quanttune_scales/full")  # fmt: skip
    for form in ("ComfyUI / kohya", "diffusers", "peft"):
        add(
            f"LoRA, {form}",
            "QuantTuneSaveLora",
            trained["lora"],
            lora=["train", 0],
            model=["quantized", 0],
            format=form,
            filename_prefix="loras/full",
        )
    for form in ("HTML", "Markdown"):
        add(f"report, {form}", "QuantTuneSaveReport", _base(graphs), format=form,
            report_a="a report. " * 20_000, filename_prefix="reports/full")  # fmt: skip
    return found


class Filler:
    """Takes all of a disk but so many bytes."""

    def __init__(self, folder: Path):
        self.path, self.folder = folder / "filler", folder

    def leave(self, room: int) -> None:
        """Leave ``room`` bytes free, in whole pages."""
        import shutil

        self.empty()
        free = shutil.disk_usage(self.folder).free
        self.path.write_bytes(b"\0" * max(0, free - room // 4096 * 4096))

    def empty(self) -> None:
        """Free all of it."""
        self.path.unlink(missing_ok=True)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")
            if p.is_file() and "quanttune_runs" not in p.parts}  # fmt: skip


def run(server, titles: list[str] | None = None, say: Callable[[str], None] = print) -> list[Full]:
    """Fill the disk of a running server's output folder, and save with every node that saves."""
    client, output = server.client, server.folder / "output"
    graphs, filler, found = Graphs(client.object_info()), Filler(output), []
    for title, (kind, graph) in savers(graphs, server.folder / "models").items():
        if titles is not None and title not in titles:
            continue
        source = {k: v for k, v in graph.items() if k != "save"}
        if "train" in source:
            # What is learnt has to be in memory, and saved, before the disk is full.
            client.run(source)
        rooms = ROOMS if titles is None else ROOMS[:1]
        for room in rooms:
            one = Full(f"{kind} ({title})", room)
            found.append(one)
            before = _files(output)
            # Another name: the host does not run again what it has just run.
            name = f"{graph['save']['inputs']['filename_prefix']}-{room}"
            graph["save"]["inputs"]["filename_prefix"] = name
            filler.leave(room)
            try:
                client.run(graph, timeout=300)
                one.wrong.append("no error")
            except RunFailed as error:
                one.told = str(error).strip()
                sentence = one.told.split("): ", 1)[-1]
                if "\n" in sentence or "full" not in sentence or not sentence.endswith("."):
                    one.wrong.append("not one sentence that says that the disk is full")
                if "it takes" not in sentence:
                    one.wrong.append("does not say what room it takes")
            filler.empty()
            if left := _files(output) - before:
                one.wrong.append(f"left {sorted(left)}")
            try:
                events: list[dict] = []
                client.run(graph, timeout=300, on_event=events.append)
                ran = {e["data"].get("node") for e in events if e["type"] == "executing"}
                if "train" in ran and any(
                    e["type"] == "progress" and e["data"].get("node") == "train" for e in events
                ):
                    one.wrong.append("trained again")
            except RunFailed as error:
                one.wrong.append(f"with room again: {error}")
            say(f"{one}")
    return found


def training(server, kind: str, say: Callable[[str], None] = print) -> Full:
    """Train on a disk without any room for a state, make room, and save what was learnt."""
    client, output = server.client, server.folder / "output"
    graphs, filler = Graphs(client.object_info()), Filler(output)
    graph = graphs.trained(kind, f"in-memory-{kind}", 4, save_every=2, checkpointing=False)
    node, link, prefix = {
        "scales": ("QuantTuneSaveScales", "scales", "quanttune_scales/kept"),
        "lora": ("QuantTuneSaveLora", "lora", "loras/kept"),
        "qat": ("QuantTuneSaveQuantizedUNet", "model", "quanttune/kept"),
    }[kind]
    graph["save"] = graphs.node(node, **{link: ["train", 0]}, filename_prefix=prefix)
    graph["report"] = graphs.node("PreviewAny", source=["train", 2 if kind == "qat" else 4])
    one = Full(graph["train"]["class_type"], ROOMS[0])
    filler.leave(ROOMS[0])
    events: list[dict] = []
    try:
        client.run(graph, timeout=300, on_event=events.append)
        one.wrong.append("no error")
    except RunFailed as error:
        one.told = str(error)
        if error.node_id != "save":
            one.wrong.append("the training itself failed")
    said = [str(e["data"]["output"]) for e in events
            if e["type"] == "executed" and e["data"]["node"] == "report"]  # fmt: skip
    if said and "it takes" not in said[0]:
        one.wrong.append(f"the report does not tell of the state: {said[0][:300]}")
    filler.empty()
    events.clear()
    client.run(graph, timeout=300, on_event=events.append)
    if any(e["type"] == "progress" and e["data"].get("node") == "train" for e in events):
        one.wrong.append("trained again")
    if not list(output.glob(f"{prefix}*.safetensors")):
        one.wrong.append("nothing saved")
    say(f"{one}")
    return one
