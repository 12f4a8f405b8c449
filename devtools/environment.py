"""The managed folder `.dev/`: a virtual environment, the pinned host, and the pack linked into it.

Every step leaves a stamp with the hash of what it was made from, written last: a second run looks
at the stamps only, and a step that was cut is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import host_source
from .console import Stop, clean_environment, run_logged, say
from .lock import only_one

ROOT = Path(__file__).resolve().parent.parent
DEV = ROOT / ".dev"
PACK_NAME = "ComfyUI-QuantTune"

# The registry's default wheels of torch are CUDA builds on Linux, and torchvision and torchaudio
# load only beside a torch of the same CUDA minor version. These three release lines belong
# together; an open range would let the resolver mix builds that fail at import.
TORCH_TRIO = ("torch>=2.13,<2.14", "torchvision>=0.28,<0.29", "torchaudio>=2.11,<2.12")

# Not `sys.executable`: dev.py may have been started by the very environment that it is to remake.
BASE_PYTHON = getattr(sys, "_base_executable", None) or sys.executable
OLDEST_PYTHON = (3, 10)
NEEDED_BYTES = 9 * 2**30


@dataclass(frozen=True)
class Environment:
    """A ComfyUI folder and the Python that runs it.

    Attributes:
        host: folder with the host's `main.py`.
        python: interpreter whose packages the host uses.
        site: folder that holds the pack under the name `quanttune`.
        managed: whether `python` lives in `.dev/` (then dev.py may install into it).
    """

    host: Path
    python: Path
    site: Path
    managed: bool

    def variables(self, *, with_host: bool = True) -> dict[str, str]:
        """Environment of a child Python that imports `quanttune` and, if asked, `comfy`."""
        path = [str(self.site), *([str(self.host)] if with_host else [])]
        return clean_environment(
            {"PYTHONPATH": os.pathsep.join(path), "QUANTTUNE_HOST": str(self.host)}
        )


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(*parts: str | bytes | Path) -> str:
    """SHA-256 over strings and the contents of files."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        total.update(part.encode() if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()


def _stamped(path: Path, value: str) -> bool:
    try:
        return json.loads(path.read_text("utf-8"))["made_from"] == value
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stamp(path: Path, value: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"made_from": value}), "utf-8")
    part.replace(path)


def link_folder(link: Path, target: Path) -> None:
    """Make `link` show `target`: a symlink, on Windows a junction, where neither works a copy.

    Raises `Stop` when something that is not ours stands at `link`.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == target.resolve():
        return
    marker = link / ".copied-by-dev.py"
    if link.is_symlink():
        link.unlink()
    elif marker.exists():
        shutil.rmtree(link)
    elif link.exists():
        if os.name != "nt" or link.resolve() == link.absolute():
            raise Stop(f"{link} exists and is not a link to this folder: move it away.")
        os.rmdir(link)
    try:
        link.symlink_to(target, target_is_directory=True)
        return
    except OSError:
        pass
    if os.name == "nt":
        done = subprocess.run(
            ["cmd", "/c", "mklink", "/J", str(link), str(target)], capture_output=True
        )
        if done.returncode == 0:
            return
    skip = shutil.ignore_patterns(".dev*", ".git", "__pycache__", "demo-output")
    shutil.copytree(target, link, ignore=skip)
    marker.touch()


def installer(log: Path) -> list[str] | None:
    """The command that starts uv, installed into a small environment of its own when missing."""
    found = shutil.which("uv")
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return [found]
    bootstrap = DEV / "bootstrap"
    command = [str(venv_python(bootstrap)), "-m", "uv"]
    stamp = bootstrap / "stamp.json"
    if _stamped(stamp, sys.version):
        return command
    try:
        shutil.rmtree(bootstrap, ignore_errors=True)
        run_logged([BASE_PYTHON, "-m", "venv", bootstrap], "preparing an installer", log)
        run_logged([*command[:2], "pip", "install", "uv"], "fetching uv", log, fetches=True)
    except Stop as stop:
        say(f"  uv is not available, going on with pip ({stop})")
        return None
    _stamp(stamp, sys.version)
    return command


def index_variables() -> dict[str, str]:
    """Hand pip's configured index and certificate to uv, which does not read pip's settings.

    Only the main index: extra places may hold a torch built for another trio.
    """
    # The system's certificates count, as they do for pip; the second name is that of older uv.
    chosen = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1", "UV_PYTHON_DOWNLOADS": "never"}
    chosen["UV_HTTP_TIMEOUT"] = os.environ.get("UV_HTTP_TIMEOUT", "120")
    chosen["UV_HTTP_RETRIES"] = os.environ.get("UV_HTTP_RETRIES", "5")
    own = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_CONFIG_FILE")
    if not any(name in os.environ for name in own):
        index = os.environ.get("PIP_INDEX_URL") or _pip_setting("global.index-url")
        if index:
            chosen["UV_DEFAULT_INDEX"] = index
    if "SSL_CERT_FILE" not in os.environ:
        certificate = os.environ.get("PIP_CERT") or _pip_setting("global.cert")
        if certificate:
            chosen["SSL_CERT_FILE"] = certificate
    return chosen


def _pip_setting(name: str) -> str:
    # The interpreter itself may come without pip; the installer's environment has one.
    bootstrap = venv_python(DEV / "bootstrap")
    python = str(bootstrap) if bootstrap.exists() else BASE_PYTHON
    command = [python, "-m", "pip", "config", "get", name]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    return done.stdout.strip() if done.returncode == 0 else ""


def ensure_venv(venv: Path, log: Path, base: str = BASE_PYTHON, version: str = "") -> Path:
    """Create the virtual environment, or again when an installation into it was cut.

    Args:
        base: the interpreter it is made from.
        version: that interpreter's "3.x"; this one's when empty.
    """
    python = venv_python(venv)
    made_from = f"{version or sys.version_info[:2]} 1"
    stamp, cut = venv / "venv.json", venv / "installing"
    if _stamped(stamp, made_from) and python.exists() and not cut.exists():
        return python
    if venv.exists():
        say("  the environment is incomplete or of another Python: making it anew")
        shutil.rmtree(venv, ignore_errors=True)
    venv.parent.mkdir(parents=True, exist_ok=True)
    uv = installer(log)
    if uv:
        command = [*uv, "venv", "--seed", "--python", base, str(venv)]
    else:
        command = [base, "-m", "venv", str(venv)]
    env = clean_environment(index_variables())
    run_logged(command, "creating the virtual environment", log, env=env, fetches=True)
    _stamp(stamp, made_from)
    return python


def _check_disk() -> None:
    free = shutil.disk_usage(DEV).free
    if free < NEEDED_BYTES:
        raise Stop(
            f"The disk of {DEV} has {free / 2**30:.1f} GiB free and the set-up needs "
            f"{NEEDED_BYTES / 2**30:.0f}: free some space and run the same command again."
        )


def install(
    venv: Path, host: Path, python: Path, log: Path, trio: Sequence[str] = TORCH_TRIO
) -> None:
    """Install the host's, the pack's and the tests' requirements with a matching torch trio."""
    wanted = [host / "requirements.txt", ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
    made_from = digest(*wanted, *trio)
    stamp = venv / "packages.json"
    if _stamped(stamp, made_from):
        return
    _check_disk()
    constraints = venv / "constraints.txt"
    constraints.write_text("\n".join(trio) + "\n", "utf-8")
    uv = installer(log)
    command = (
        [*uv, "pip", "install", "--python", str(python)]
        if uv
        else [str(python), "-m", "pip", "install"]
    )
    command += ["-c", str(constraints), *(f"-r{path}" for path in wanted)]
    start = shutil.disk_usage(DEV).free

    def written() -> str:
        return f"about {max(0, start - shutil.disk_usage(DEV).free) / 2**30:.1f} of 7 GB written"

    cut = venv / "installing"
    cut.touch()
    env = clean_environment(index_variables())
    label = "installing ComfyUI's and the pack's requirements"
    run_logged(command, label, log, env=env, detail=written, fetches=True)
    code = "import torch, torchvision, torchaudio, aiohttp, comfyui_frontend_package"
    run_logged([python, "-c", code], "checking that torch loads", log)
    _stamp(stamp, made_from)
    cut.unlink()


def _write_pth(python: Path, site: Path) -> None:
    """Let the managed Python import `quanttune` also when it is started by hand."""
    folder = next(iter(python.parent.parent.glob("[Ll]ib/python3*/site-packages")), None)
    folder = folder or python.parent.parent / "Lib" / "site-packages"
    pth = folder / "quanttune-checkout.pth"
    if folder.is_dir() and (not pth.exists() or pth.read_text("utf-8") != f"{site}\n"):
        pth.write_text(f"{site}\n", "utf-8")


def find_host(comfyui: str | None) -> Path | None:
    """The user's own ComfyUI: the one named, or the one whose `custom_nodes` the pack sits in.

    None means the pinned host. Raises `Stop` when the named folder is not a ComfyUI.
    """
    if comfyui == "pinned":
        return None
    if comfyui:
        path = Path(comfyui).expanduser().resolve()
        if not path.is_dir():
            raise Stop(f"--comfyui {comfyui}: there is no such folder.")
        for candidate in (path, path / "ComfyUI"):
            if (candidate / "main.py").is_file() and (candidate / "comfy").is_dir():
                return candidate
        raise Stop(f"--comfyui {comfyui}: this is not a ComfyUI (it has no main.py and comfy/).")
    around = Path(os.path.abspath(__file__)).parent.parent.parent
    if around.name == "custom_nodes" and (around.parent / "main.py").is_file():
        return around.parent
    return None


def _own_python(host: Path) -> Path | None:
    """The Python that belongs to a user's ComfyUI, if it keeps one beside itself."""
    for venv in (host / "venv", host / ".venv", host.parent / "venv", host.parent / ".venv"):
        if venv_python(venv).exists():
            return venv_python(venv)
    portable = host.parent / "python_embeded" / "python.exe"
    return portable if portable.exists() else None


def _check_own_python(python: Path, modules: Sequence[str]) -> None:
    code = (
        "import importlib.util as u, sys;"
        "print(' '.join(n for n in sys.argv[1:] if u.find_spec(n) is None))"
    )
    done = subprocess.run([str(python), "-c", code, *modules], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Stop(f"The Python of your ComfyUI, {python}, does not run: {last}.")
    missing = done.stdout.split()
    if missing:
        files = "-r requirements.txt" + (" -r requirements-dev.txt" if "pytest" in modules else "")
        raise Stop(
            f"The environment of your ComfyUI lacks {', '.join(missing)}: in {ROOT} run "
            f"`{python} -m pip install {files}`, then the same command again."
        )


def _prepare(own: Path | None, tests: bool) -> Environment:
    site = DEV / "site"
    link_folder(site / "quanttune", ROOT)
    log = DEV / "log" / "setup.log"
    python = _own_python(own) if own else None
    managed = python is None
    if own and python:
        host = own
        extra = ("pytest", "hypothesis", "pytest_timeout", "playwright", "xdist") if tests else ()
        _check_own_python(python, ("torch", "aiohttp", "safetensors", "numpy", "PIL", *extra))
    else:
        tag = "" if own is None else "-" + digest(str(own))[:8]
        venv = DEV / f"venv{tag}"
        python = ensure_venv(venv, log)
        host = own or host_source.ensure(DEV, python, log)
        install(venv, host, python, log)
        _write_pth(python, site)
    if ROOT.parent != host / "custom_nodes":
        link_folder(host / "custom_nodes" / PACK_NAME, ROOT)
    return Environment(host, python, site, managed)


def prepare(comfyui: str | None = None, *, tests: bool = False) -> Environment:
    """Set up whatever is missing and return the environment to work in.

    Args:
        comfyui: folder of an existing ComfyUI, "pinned", or None (see `find_host`).
        tests: also require what the tests need.

    Raises `Stop` with one sentence when a step fails.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise Stop(
            f"Python {sys.version.split()[0]} is too old: run dev.py with Python 3.10 to 3.13."
        )
    own = find_host(comfyui)
    try:
        DEV.mkdir(exist_ok=True)
        with only_one(DEV / "lock"):
            return _prepare(own, tests)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise Stop(
            f"The set-up could not write its files: {error.strerror or error}{where}."
        ) from error
