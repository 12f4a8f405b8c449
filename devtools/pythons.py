"""Find the Pythons of other versions that a machine has; none is ever installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .console import clean_environment
from .environment import BASE_PYTHON, index_variables, installer


def _pythons_to_try(version: str, log: Path) -> Iterator[str]:
    """Interpreters that may be a Python `version`, likeliest first."""
    if version == "{}.{}".format(*sys.version_info[:2]):
        yield BASE_PYTHON
    if found := shutil.which(f"python{version}"):
        yield found
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for name in ("bin/python", "python.exe"):
        yield from map(str, sorted((root / "versions").glob(f"{version}.*/{name}"), reverse=True))
    if launcher := shutil.which("py"):
        done = subprocess.run(
            [launcher, f"-{version}", "-c", "import sys; print(sys.executable)"],
            capture_output=True, text=True,
        )  # fmt: skip
        yield from done.stdout.split("\n")[:1]
    if uv := installer(log):
        env = clean_environment(index_variables())
        done = subprocess.run(
            [*uv, "python", "find", version], capture_output=True, text=True, env=env
        )
        yield from done.stdout.split("\n")[:1]


def find_python(version: str, log: Path) -> str | None:
    """An interpreter of this "3.x" that runs: on PATH, of pyenv, of Windows' launcher or of uv."""
    code = "import sqlite3, ssl, sys; print('{}.{}'.format(*sys.version_info[:2]))"
    for path in _pythons_to_try(version, log):
        if not path:
            continue
        try:
            done = subprocess.run(
                [path, "-c", code], capture_output=True, text=True, env=clean_environment()
            )
        except OSError:
            continue
        if done.stdout.strip() == version:
            return path
    return None
