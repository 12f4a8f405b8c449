"""The archive that the ComfyUI registry serves: what git tracks, without what `.comfyignore` names.

The same files that `comfy node pack` takes, but built so that the same commit always gives the same
bytes: names sorted, times fixed, one compression.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import zipfile
from pathlib import Path

from .console import Stop, say
from .environment import ROOT

IGNORE = ".comfyignore"
MOST_BYTES = 40 * 2**20
"""An archive larger than this is a mistake: the shipped models are 30 MB."""


def tracked(root: Path) -> list[str]:
    """What git tracks in `root`, POSIX paths, sorted; raises `Stop` outside a git checkout."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True)
    except OSError as error:
        raise Stop(
            f"The archive is made of what git tracks, and git is not here ({error})."
        ) from error
    names = sorted(name for name in done.stdout.decode("utf-8").split("\0") if name)
    if done.returncode or not names:
        raise Stop(f"The archive is made of what git tracks, and {root} is not a git checkout.")
    return names


def ignored(name: str, patterns: list[str]) -> bool:
    """Whether a path is left out by the lines of `.comfyignore`.

    The part of git's rules that is used there: `folder/`, names, and wildcards; a line with a slash
    before its end counts from the root. Lines with `!` raise `Stop`.
    """
    parts = name.split("/")
    for line in patterns:
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("!"):
            raise Stop(f"{IGNORE}: {pattern!r} takes back another line, which is not supported.")
        folder = pattern.endswith("/")
        anchored = "/" in pattern.rstrip("/")
        pattern = pattern.strip("/")  # of "/name" the slash in front has said that it is anchored
        # Every leading part of the path that is a folder, and the path itself unless one is meant.
        for end in range(1, len(parts) + (not folder)):
            tried = "/".join(parts[:end]) if anchored else parts[end - 1]
            if fnmatch.fnmatchcase(tried, pattern):
                return True
    return False


def files(root: Path = ROOT) -> list[str]:
    """The paths that the archive holds, POSIX, sorted."""
    ignore = root / IGNORE
    patterns = ignore.read_text("utf-8").splitlines() if ignore.is_file() else []
    return [name for name in tracked(root) if not ignored(name, patterns)]


def version(root: Path = ROOT) -> str:
    """The version that pyproject.toml states (read without a TOML parser: Python 3.10 has none)."""
    text = (root / "pyproject.toml").read_text("utf-8")
    found = re.search(r'(?ms)^\[project\]$.*?^version = "([^"]+)"$', text)
    if not found:
        raise Stop("pyproject.toml states no version.")
    return found[1]


def build(target: Path, root: Path = ROOT) -> Path:
    """Write the archive to `target`, whole or not at all; returns it.

    Raises `Stop` when a tracked file is missing, is a link, or the archive is far too large.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in files(root):
                path = root / name
                if path.is_symlink() or not path.is_file():
                    raise Stop(f"{name} is tracked by git but is not a file here.")
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o755 if path.stat().st_mode & 0o100 else 0o644) << 16
                entry.create_system = 3
                archive.writestr(entry, path.read_bytes())
        if part.stat().st_size > MOST_BYTES:
            raise Stop(f"The archive has {part.stat().st_size / 2**20:.0f} MB: what is in it?")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def build_command() -> int:
    """`dev.py pack`: the archive in `dist/`, named after the version."""
    target = build(ROOT / "dist" / f"quanttune-{version()}.zip")
    say(f"  {target} ({target.stat().st_size / 2**20:.1f} MB, {len(files())} files)")
    return 0
