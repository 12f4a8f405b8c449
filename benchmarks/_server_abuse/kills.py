"""kill -9 of the server while it trains and while it saves; then it is started and asked again.

Each job trains or saves under names of its own. It runs once undisturbed; then it is queued, the
server is killed at a moment by chance within one stage, started again, and the same graph queued
again, as a user would.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .graphs import Graphs
from .notice import Notice

EVERY, STEPS = 2, 6
"""Steps between two states of the trainings here, and of all."""
SUFFIX = ".tmp"


@dataclass(frozen=True)
class Job:
    """A graph that writes.

    Attributes:
        make: its graph, given `Graphs` and a run's name.
        run: whether it has a run with a state, which is resumed.
        saves: folder below the output that it saves a file to, or "".
        stages: moments to kill it at, keys of `STAGES`.
    """

    make: Callable[[Graphs, str], dict[str, Any]]
    run: bool
    saves: str
    stages: tuple[str, ...]


@dataclass
class Kill:
    """One kill.

    Attributes:
        job, stage: which.
        moment: seconds after the stage's sign.
        steps, kept: steps that were in the list of losses, and in the state.
        parts: files that were half written, all of them with names of no model.
        wrong: what was not as it should be.
    """

    job: str
    stage: str
    moment: float
    steps: int = 0
    kept: int = 0
    parts: int = 0
    wrong: list[str] = field(default_factory=list)


TRAINING = ("preparing", "first step", "between states", "a state's write", "the last state",
            "saving")  # fmt: skip


def _scales(graphs: Graphs, name: str) -> dict[str, Any]:
    graph = graphs.trained("scales", name, STEPS, save_every=EVERY, checkpointing=False)
    graph["save"] = graphs.node(
        "QuantTuneSaveScales", scales=["train", 0], filename_prefix=f"quanttune_scales/{name}"
    )
    return graph


def _lora(graphs: Graphs, name: str) -> dict[str, Any]:
    graph = graphs.trained("lora", name, STEPS, save_every=EVERY, checkpointing=False, rank=4)
    graph["save"] = graphs.node(
        "QuantTuneSaveLora", lora=["train", 0], filename_prefix=f"loras/{name}"
    )
    return graph


def _qat(graphs: Graphs, name: str) -> dict[str, Any]:
    graph = graphs.trained("qat", name, STEPS, save_every=EVERY, checkpointing=False)
    graph["save"] = graphs.node(
        "QuantTuneSaveQuantizedUNet", model=["train", 0], filename_prefix=f"quanttune/{name}"
    )
    return graph


def _unet(graphs: Graphs, name: str) -> dict[str, Any]:
    graph = graphs.starter()
    graph["quantized"] = graphs.node(
        "QuantTuneQuantizeUNet", model=["starter", 0], bits="8", range="minmax"
    )
    graph["save"] = graphs.node(
        "QuantTuneSaveQuantizedUNet", model=["quantized", 0], filename_prefix=f"quanttune/{name}"
    )
    return graph


def _calibration(graphs: Graphs, name: str) -> dict[str, Any]:
    graph = graphs.starter()
    graph["calibrate"] = graphs.calibrated()
    graph["save"] = graphs.node(
        "QuantTuneSaveQuantizedUNet", model=["calibrate", 0], filename_prefix=f"quanttune/{name}"
    )
    return graph


JOBS = {
    "Train Scales": Job(_scales, True, "quanttune_scales", TRAINING),
    "LoRA Train": Job(_lora, True, "loras", TRAINING),
    "Train QAT": Job(_qat, True, "quanttune", TRAINING),
    "Calibrate INT8": Job(_calibration, False, "quanttune", ("working", "saving")),
    "Save Quantized UNet": Job(_unet, False, "quanttune", ("working", "saving")),
}
PLAN = {"Train Scales": 2, "LoRA Train": 2, "Train QAT": 1, "Calibrate INT8": 2,
        "Save Quantized UNet": 4}  # fmt: skip
"""Kills at each stage of each job: 42 in all."""


@contextmanager
def _watched(output: Path, job: Job, name: str) -> Iterator[tuple[Notice | None, Notice]]:
    run = Notice([output / "quanttune_runs" / name]) if job.run else None
    saves = Notice([output / job.saves])
    try:
        yield run, saves
    finally:
        for notice in (run, saves):
            if notice:
                notice.close()


def _rows(folder: Path) -> int:
    """Steps in a run's list of losses."""
    path = folder / "loss.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _until(ready: Callable[[], bool], timeout: float = 120.0) -> bool:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if ready():
            return True
        time.sleep(0.001)
    return False


def kill(
    server, job: Job, name: str, stage: str, chance: random.Random, seconds: dict[str, float]
) -> float:
    """Queue a job, kill the server in one of its stages; returns the seconds after the sign.

    Args:
        seconds: of "prepare" (from queueing to the first step), "step", "state" (its write) and
            "work" (the whole job).
    """
    client, output = server.client, server.folder / "output"
    run = output / "quanttune_runs" / name
    with _watched(output, job, name) as (states, saves):
        client.submit(job.make(Graphs(client.object_info()), name))
        spans = {"preparing": seconds.get("prepare", 1.0), "working": seconds["work"],
                 "first step": seconds.get("step", 0.2),
                 "between states": EVERY * seconds.get("step", 0.2)}  # fmt: skip
        moment = chance.random() * spans.get(stage, 0.012)
        signs = {
            "first step": lambda: _until((run / "loss.csv").exists),
            "between states": lambda: _until(lambda: _rows(run) > EVERY),
            "a state's write": lambda: states.wait(SUFFIX, chance.randint(1, 2), 120),
            "the last state": lambda: states.wait(SUFFIX, STEPS // EVERY, 120),
            "saving": lambda: saves.wait(SUFFIX, 1, 120),
        }
        if not signs.get(stage, lambda: True)():
            raise TimeoutError(
                f"{name}: the stage '{stage}' did not come\n{server.log_text()[-2000:]}"
            )
        time.sleep(moment)
        server.process.kill()
        server.process.wait()
    return moment


def saved(server, job: Job, name: str) -> list[Path]:
    """The files that a job has saved, by their names."""
    return sorted((server.folder / "output" / job.saves).glob(f"{name}_*.safetensors"))


def whole(path: Path) -> str:
    """What is wrong with a file that has the name of a whole one, or ""."""
    from quanttune.quant import QuantTuneError
    from quanttune.quant.safe_file import read_with_strings
    from quanttune.training.state import load_state

    try:
        if path.suffix == ".safetensors":
            read_with_strings(path)
        elif path.name == "checkpoint.pt":
            load_state(path.parent)
    except QuantTuneError as error:
        return str(error)
    return ""


def values(path: Path) -> dict[str, bytes]:
    """The values of a saved file, without what it says of itself."""
    from quanttune.quant.safe_file import read_with_strings
    from quanttune.quant.whole_file import tensor_bytes

    return {k: bytes(tensor_bytes(t.contiguous())) for k, t in read_with_strings(path)[1].items()}


@dataclass
class Undisturbed:
    """What a job gives when nobody kills the server: its losses, and the values it saves."""

    losses: bytes
    values: dict[str, bytes]
    seconds: dict[str, float]


def undisturbed(server, job: Job, name: str) -> Undisturbed:
    """Run a job to its end, and measure how long its stages take."""
    import threading

    run, begun = server.folder / "output" / "quanttune_runs" / name, time.monotonic()
    marks: dict[str, float] = {}

    def look():
        _until(lambda: (run / "loss.csv").exists() or "end" in marks)
        marks["first"] = time.monotonic()
        _until(lambda: _rows(run) >= STEPS or "end" in marks)
        marks["last"] = time.monotonic()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    server.client.run(job.make(Graphs(server.client.object_info()), name), timeout=300)
    marks["end"] = end = time.monotonic()
    thread.join()
    seconds = {"prepare": marks["first"] - begun, "work": end - begun,
               "step": (marks["last"] - marks["first"]) / STEPS}  # fmt: skip
    losses = (run / "loss.csv").read_bytes() if job.run else b""
    return Undisturbed(losses, values(saved(server, job, name)[0]), seconds)


def look(server, job: Job, name: str, found: Kill) -> None:
    """Compare what a kill has left with what it may leave."""
    output = server.folder / "output"
    run = output / "quanttune_runs" / name
    found.steps = _rows(run)
    for path in output.rglob("*"):
        if path.is_file() and path.suffix == SUFFIX:
            found.parts += name in str(path)
        elif path.is_file() and (problem := whole(path)):
            found.wrong.append(f"half written: {problem}")
    if job.run:
        from quanttune.training.state import load_state

        found.kept = (load_state(run) or {"step": 0})["step"]
        if found.steps - found.kept > EVERY:
            found.wrong.append(f"{found.steps - found.kept} steps lost")


def look_again(server, job: Job, name: str, found: Kill, expected: Undisturbed) -> None:
    """Queue the job again, on the server that was started again; compare what comes of it."""
    listed = str(server.client.object_info())
    if SUFFIX + "'" in listed or SUFFIX + '"' in listed:
        found.wrong.append("a half-written file is offered")
    had = saved(server, job, name)
    server.client.run(job.make(Graphs(server.client.object_info()), name), timeout=300)
    run = server.folder / "output" / "quanttune_runs" / name
    if job.run:
        if (run / "loss.csv").read_bytes() != expected.losses:
            found.wrong.append("other losses than undisturbed")
        if list(run.glob(f".*{SUFFIX}")):
            found.wrong.append("a half-written state stays")
    files = saved(server, job, name)
    if not files or files == had:
        found.wrong.append("nothing saved")
    found.wrong += [f"{p.name} holds other values" for p in files
                    if values(p) != expected.values]  # fmt: skip


def run(
    start: Callable[[Path], Any],
    folder: Path,
    plan: dict[str, int],
    seed: int = 0,
    stages: Callable[[str, str], bool] = lambda job, stage: True,
    say: Callable[[str], None] = print,
) -> tuple[list[Kill], dict[str, dict[str, float]]]:
    """Kill a server as planned; returns the kills and how long the stages took undisturbed.

    Args:
        start: starts a server over a folder and waits for it.
        plan: kills at each stage of a job of `JOBS`.
        stages: whether a job is killed at a stage.
    """
    chance, kills, times = random.Random(seed), [], {}
    server = start(folder)
    try:
        for title, count in plan.items():
            job, expected = JOBS[title], None
            for _ in range(count):
                for stage in job.stages:
                    if not stages(title, stage):
                        continue
                    if expected is None:
                        name = f"{title.split()[-1].lower()}-whole"
                        undisturbed(server, job, name)
                        # With what is loaded by then, as it is before each kill.
                        expected = undisturbed(server, job, f"{name}-2")
                        times[title] = expected.seconds
                    name = f"{title.split()[-1].lower()}-{len(kills)}"
                    moment = kill(server, job, name, stage, chance, expected.seconds)
                    found = Kill(title, stage, round(moment, 4))
                    kills.append(found)
                    look(server, job, name, found)
                    server.stop()
                    server = start(folder)
                    look_again(server, job, name, found, expected)
                    say(f"{len(kills):3} {found}")
    finally:
        server.stop()
    return kills, times
