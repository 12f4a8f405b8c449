"""The commands of `dev.py`, one function each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .client import Event, Graph, RunFailed, images_of
from .console import Stop, say, wait_for
from .environment import DEV, ROOT, Environment
from .graph import NeedsFrontend, is_ui_format, load_workflow, set_value, to_api
from .host_process import HostProcess, check_port, free_port, has_accelerator, running_host

DEMO = ROOT / "workflows" / "02-timestep-routed-scales.json"
DEMO_OUTPUT = ROOT / "demo-output"
MOST_WORKERS = 4
"""Processes of tests at most: each may hold a ComfyUI, its server and a Chromium, 4 GB in all."""


class _Narrator:
    """Prints which node runs and how far it is, one line a node."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.last = ""
        self.shown = 0.0

    def _title(self, node_id: str) -> str:
        # Nodes of an expanded graph carry ids of the form "parent.child".
        node = self.graph.get(node_id) or self.graph.get(node_id.split(".")[0], {})
        return node.get("_meta", {}).get("title") or node.get("class_type", node_id)

    def __call__(self, event: Event) -> None:
        data = event.get("data") or {}
        if event["type"] == "executing" and data.get("node"):
            title = self._title(str(data["node"]))
            if title != self.last:
                self.last = title
                say(f"  · {title}")
        elif event["type"] == "progress":
            value, total = data.get("value", 0), data.get("max", 0)
            now = time.monotonic()
            if total > 1 and (value == total or now - self.shown > 1):
                self.shown = now
                say(f"      step {value} of {total}")


def _to_graph(host: HostProcess, workflow: dict[str, Any], info: dict[str, Any]) -> Graph:
    try:
        return to_api(workflow, info)
    except NeedsFrontend as reason:
        say(f"  {reason} Asking the real frontend to convert it.")
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "workflow.json"), Path(folder, "graph.json")
            source.write_text(json.dumps(workflow), "utf-8")
            command = [str(host.env.python), "-m", "quanttune.devtools.frontend"]
            command += [host.client.url, str(source), str(target)]
            done = subprocess.run(
                command, capture_output=True, text=True, env=host.env.variables(), cwd=folder
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise Stop(f"{reason} Converting it needs a browser: {last}") from reason
            return json.loads(target.read_text("utf-8"))


def run_workflow(
    env: Environment,
    file: Path,
    settings: Sequence[str],
    out: Path,
    *,
    cpu: bool | None = None,
    replace: bool = False,
) -> list[Path]:
    """Run one workflow in a real ComfyUI without a window; returns the pictures, copied to `out`.

    Args:
        file: a workflow as the GUI saves or exports it.
        settings: "node.input=value" each.
        cpu: None uses the GPU when torch sees one.
        replace: overwrite pictures of the same name; otherwise they get a number.

    Raises `Stop` with one sentence when anything fails.
    """
    workflow = load_workflow(file)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"--out {out}: the folder cannot be made ({error.strerror}).") from error
    if cpu is None:
        cpu = not has_accelerator(env)
    started = time.monotonic()
    with running_host(env, isolated=False, cpu=cpu) as host:
        if problem := host.pack_problem():
            raise Stop(f"ComfyUI could not load the pack ({problem}); its log is {host.log}.")
        info = host.client.object_info()
        graph = _to_graph(host, workflow, info)
        for assignment in settings:
            set_value(graph, info, assignment)
        say(f"  running {file.name}")
        ui = workflow if is_ui_format(workflow) else None
        try:
            history = host.client.run(graph, on_event=_Narrator(graph), workflow=ui)
        except RunFailed as failure:
            raise Stop(f"{file.name} failed: {failure}") from failure
        except (OSError, TimeoutError) as error:
            raise Stop(f"ComfyUI broke off ({error}); its log is {host.log}.") from error
        paths = []
        for entries in images_of(history).values():
            for entry in entries:
                path = _unused(out / Path(entry["filename"]).name, replace)
                path.write_bytes(host.client.image(entry))
                paths.append(path)
    say(f"  {len(paths)} picture{'s' * (len(paths) != 1)} in {time.monotonic() - started:.0f} s:")
    for path in paths:
        say(f"  {path}")
    return paths


def demo(env: Environment) -> int:
    """Run the pack's main job on the CPU and leave its pictures in `demo-output/`."""
    if not DEMO.is_file():
        raise Stop(f"The demo's workflow {DEMO.relative_to(ROOT)} is missing from this checkout.")
    if not run_workflow(env, DEMO, (), DEMO_OUTPUT, cpu=True, replace=True):
        raise Stop("The demo ran but left no picture.")
    return 0


def parallel_options(arguments: Sequence[str], cores: int) -> list[str]:
    """pytest's options that spread the whole suite over the cores, file by file.

    Empty when something is selected or looked into (a path, -k, --pdb ...), which one process runs.
    """
    whole = all(a.startswith(("--durations", "--junit", "-v", "-q")) for a in arguments)
    if not whole or cores < 2:
        return []
    # In the order of collection, which begins with the longest files (tests/conftest.py).
    return ["-n", str(min(cores, MOST_WORKERS)), "--dist", "loadfile", "--no-loadscope-reorder"]


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it is bound to, and what a container allows of them.

    Args:
        quota: file of the container (Linux): microseconds of work in a period, and the period.
    """
    bound = getattr(os, "sched_getaffinity", None)
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    try:
        work, period = quota.read_text("ascii").split()
        return max(1, min(cores, -(-int(work) // int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def test(env: Environment, arguments: Sequence[str]) -> int:
    """Run pytest, the whole suite on all cores; returns its exit status."""
    variables = env.variables()
    parallel = parallel_options(arguments, usable_cores())
    if parallel:
        # Two processes of two threads each would take turns on two cores.
        variables.setdefault("OMP_NUM_THREADS", "1")
    command = [
        str(env.python),
        "-m",
        "pytest",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
        *parallel,
    ]
    return wait_for(subprocess.Popen([*command, *arguments], cwd=ROOT, env=variables))


def serve(env: Environment, port: int | None, cpu: bool | None, arguments: Sequence[str]) -> int:
    """Run the GUI with the pack installed until Ctrl-C; returns the host's exit status."""
    if port is not None:
        check_port(port)
    else:
        try:
            check_port(port := 8188)
        except Stop:
            port = free_port()
    if cpu is None:
        cpu = not has_accelerator(env)
    command = [str(env.python), str(env.host / "main.py"), "--port", str(port), *(["--cpu"] * cpu)]
    say(f"  ComfyUI will answer at http://127.0.0.1:{port} (Ctrl-C ends it)")
    process = subprocess.Popen(
        [*command, *arguments], cwd=env.host, env=env.variables(with_host=False)
    )
    return wait_for(process)


def bench(env: Environment, name: str, json_file: str | None, arguments: Sequence[str]) -> int:
    """Run `benchmarks/NAME.py` (or the folder's `__main__.py`); returns its exit status."""
    folder = ROOT / "benchmarks"
    known = sorted(
        {p.stem for p in folder.glob("[!_]*.py")}
        | {p.parent.name for p in folder.glob("*/__main__.py")}
    )
    script = folder / f"{name}.py"
    if not script.is_file():
        script = folder / name / "__main__.py"
    if name not in known or not script.is_file():
        raise Stop(f"There is no benchmark {name!r}; there are: {', '.join(known) or 'none yet'}.")
    return python(env, [str(script), *(["--json", json_file] if json_file else []), *arguments])


def python(env: Environment, arguments: Sequence[str]) -> int:
    """Run a script with `quanttune` and the host importable; returns its exit status."""
    return wait_for(subprocess.Popen([str(env.python), *arguments], env=env.variables()))


def script_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off what follows the command `python`, which belongs to the script untouched."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        place += 2 if arguments[place] == "--comfyui" else 1
    if list(arguments[place : place + 1]) == ["python"]:
        return list(arguments[: place + 1]), list(arguments[place + 1 :])
    return list(arguments), []


def clean() -> int:
    """Delete the managed folder and the demo's pictures; the user's models in it are kept."""
    models = [p for p in (DEV / "ComfyUI" / "models").rglob("*.safetensors") if p.is_file()]
    if models:
        aside = ROOT / ".dev-models"
        say(f"  the models in {DEV / 'ComfyUI' / 'models'} are moved to {aside}")
        os.replace(DEV / "ComfyUI" / "models", _unused(aside))
    for folder in (DEV, DEMO_OUTPUT):
        if folder.exists():
            say(f"  deleting {folder}")
            # Links are removed, never followed: rmtree does not enter symlinks; junctions neither.
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise Stop(
                    f"{folder} could not be deleted whole: a program still uses a file in it."
                )
    return 0


def _unused(path: Path, replace: bool = False) -> Path:
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, 10_000))
    return path if replace or not path.exists() else next(p for p in names if not p.exists())
