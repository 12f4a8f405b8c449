"""Run the smoke part of the tests on several ComfyUIs, Pythons and torches, and write a table.

Each cell has a folder of its own in `.dev/matrix/`, deleted when the cell is done. What a cell gave
is kept there: a run that was cut goes on with the next cell, and a cell is run again only when the
pack, its tests or what is installed have changed.
"""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import host_source
from .console import Stop, run_logged, say
from .environment import (
    DEV,
    ROOT,
    TORCH_TRIO,
    Environment,
    digest,
    ensure_venv,
    install,
    link_folder,
)
from .lock import only_one
from .matrix_table import Result, read_junit, write_table
from .pythons import find_python

FOLDER = DEV / "matrix"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = {
    "newest": TORCH_TRIO,
    "oldest": ("torch==2.8.0", "torchvision==0.23.0", "torchaudio==2.8.0"),
}
"""Release lines of torch, torchvision and torchaudio that belong together.

With 2.6.0 and 2.7.1, ComfyUI 0.30.0 itself does not start on a machine without GPU: comfy-kitchen's
Triton kernels want a driver when they are imported (Triton 3.3 and before).
"""

SOURCES = ("host", "nodes", "quant", "training", "metrics", "starter", "workflows", "web",
           "locales", "tests", "devtools")  # fmt: skip


@dataclass(frozen=True, order=True)
class Cell:
    """One combination: a ComfyUI version, a Python "3.x" and a key of `TORCHES`."""

    host: str
    python: str
    torch: str

    @property
    def folder(self) -> Path:
        """Where its environment, its log and its result are."""
        return FOLDER / f"{self.host}-py{self.python}-torch-{self.torch}"

    @property
    def release(self) -> host_source.Release:
        """The source package its ComfyUI comes from."""
        return next(r for r in host_source.RELEASES if r.version == self.host)


def choose(hosts: Sequence[str], pythons: Sequence[str], torches: Sequence[str]) -> list[Cell]:
    """The cells of these hosts, Pythons and torches; an empty list means all there are.

    Raises `Stop` when one of them is not known.
    """
    known = ([r.version for r in host_source.RELEASES], list(PYTHONS), list(TORCHES))
    chosen = []
    for option, wanted, all_ in zip(
        ("--hosts", "--pythons", "--torch"), (hosts, pythons, torches), known
    ):
        for name in wanted:
            if name not in all_:
                raise Stop(f"{option} {name}: not one of {', '.join(all_)}.")
        chosen.append([name for name in all_ if not wanted or name in wanted])
    # All hosts of one Python together: they share nearly all packages.
    return [Cell(h, p, t) for t, p, h in itertools.product(*reversed(chosen))]


def pack_digest() -> str:
    """SHA-256 over everything of the pack and its tests that a cell could depend on."""
    files = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "pyproject.toml"]
    for name in SOURCES:
        files += (
            path
            for path in (ROOT / name).rglob("*")
            if path.is_file() and not {"__pycache__", "artifacts"} & set(path.parts)
        )
    return digest(*itertools.chain.from_iterable(
        (path.relative_to(ROOT).as_posix(), path) for path in sorted(files) if path.exists()
    ))  # fmt: skip


VERSIONS = (
    "import importlib.metadata as m, json, platform;"
    "names = ['torch', 'torchvision', 'torchaudio', 'numpy', 'transformers', 'diffusers', 'peft',"
    " 'comfyui_frontend_package', 'comfy-kitchen'];"
    "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in names}}))"
)


def _set_up(cell: Cell, base: str, log: Path) -> Environment:
    site = DEV / "site"
    link_folder(site / "quanttune", ROOT)
    venv = cell.folder / "venv"
    python = ensure_venv(venv, log, base, cell.python)
    host = host_source.ensure(
        DEV, python, log, cell.release, target=FOLDER / "hosts" / cell.release.version
    )
    install(venv, host, python, log, TORCHES[cell.torch])
    return Environment(host, python, site, managed=True)


def run_cell(cell: Cell, made_from: str, arguments: Sequence[str] = ()) -> Result:
    """Set a cell up and run the smoke tests in it; never raises for what goes wrong there.

    Args:
        made_from: digest of the pack, noted in the result.
        arguments: more of them for pytest.
    """
    result = Result(cell.host, cell.python, cell.torch, made_from=made_from)
    result.date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    cell.folder.mkdir(parents=True, exist_ok=True)
    log = cell.folder / "log.txt"
    log.unlink(missing_ok=True)
    base = find_python(cell.python, log)
    if base is None:
        result.why = f"no Python {cell.python} here"
        return result
    try:
        env = _set_up(cell, base, log)
    except Stop as stop:
        result.status, result.why = "failed", f"could not be set up: {stop}".replace(str(ROOT), "")
        return result
    told = subprocess.run([str(env.python), "-c", VERSIONS], capture_output=True, text=True)
    result.versions = json.loads(told.stdout or "{}")
    junit = cell.folder / "junit.xml"
    junit.unlink(missing_ok=True)
    command = [str(env.python), "-m", "pytest", "--rootdir", str(ROOT), "-m", "smoke"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    command += ["--junit-xml", str(junit), *arguments]
    started = time.monotonic()
    ended = ""
    try:
        run_logged(command, "running the smoke tests", log, env=env.variables(), cwd=ROOT)
    except Stop as stop:
        ended = str(stop)
    result.seconds = round(time.monotonic() - started)
    try:
        read_junit(junit, result)
    except (OSError, ET.ParseError):
        result.failed, ended = max(1, result.failed), ended or "pytest left no result"
    good = result.passed and not result.failed and not ended
    result.status = "passed" if good else "failed"
    if not good and not result.failures:
        result.why = (ended or "no test ran").replace(str(ROOT), "").strip()
    return result


def _result_file(cell: Cell) -> Path:
    return cell.folder / "result.json"


def _former(cell: Cell, made_from: str) -> Result | None:
    """The result of an earlier run of this cell on the same pack, unless it was not run."""
    try:
        result = Result(**json.loads(_result_file(cell).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return result if (result.made_from, result.status) == (made_from, "passed") else None


def run(
    cells: Sequence[Cell], *, keep: bool = False, again: bool = False, arguments: Sequence[str] = ()
) -> int:
    """Run the cells one after the other and write the table; returns the exit status.

    Args:
        keep: leave the cells' environments where they are.
        again: also run cells that passed on this very pack.
        arguments: more of them for pytest; then the table is left as it is.

    The status is 0 when every cell that was run passed, and at least one was.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    made_from = pack_digest()
    results = []
    with only_one(FOLDER / "lock"):
        for number, cell in enumerate(cells, 1):
            say(f"{number} of {len(cells)}: ComfyUI {cell.host}, Python {cell.python}, "
                f"{cell.torch} torch")  # fmt: skip
            result = None if again or arguments else _former(cell, made_from)
            if result is None:
                result = run_cell(cell, made_from, arguments)
                if not arguments:
                    _result_file(cell).write_text(json.dumps(asdict(result)), "utf-8")
                if not keep:
                    shutil.rmtree(cell.folder / "venv", ignore_errors=True)
            say(f"  {result.status}: {result.passed} passed, {result.failed} failed, "
                f"{result.skipped} skipped in {result.seconds} s {result.why}")  # fmt: skip
            for name, why in result.failures.items():
                say(f"    {name}: {why}")
            results.append(result)
            if not arguments:
                write_table([result])
    ran = [r for r in results if r.status != "not run"]
    return 0 if ran and all(r.status == "passed" for r in ran) else 1
