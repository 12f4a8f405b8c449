"""Start a ComfyUI as a process of its own, wait until it answers, and end it again."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .client import Client
from .console import Progress, Stop
from .environment import DEV, PACK_NAME, ROOT, Environment, link_folder

FOLDERS = ("output", "temp", "user", "input", "models", "custom_nodes")


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raise `Stop` when the port is taken."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise Stop(f"Port {port} is taken: choose another one with --port.") from error


def has_accelerator(env: Environment) -> bool:
    """Whether the torch of this environment sees a GPU that ComfyUI can use."""
    code = (
        "import sys, torch\n"
        "kinds = [torch.cuda, getattr(torch, 'xpu', None), torch.backends.mps]\n"
        "sys.exit(0 if any(k is not None and k.is_available() for k in kinds) else 1)"
    )
    command = [str(env.python), "-c", code]
    return subprocess.run(command, capture_output=True, env=env.variables()).returncode == 0


class HostProcess:
    """A running ComfyUI.

    Attributes:
        client: talks to it.
        folder: where its output, temp and user folders are.
        log: file with everything it printed.
    """

    def __init__(
        self,
        env: Environment,
        folder: Path,
        *,
        isolated: bool = True,
        cpu: bool = True,
        port: int | None = None,
        extra: Sequence[str] = (),
    ):
        """Start the process; `wait` until it answers before using `client`.

        Args:
            folder: receives output, temp and user; isolated hosts have their input, models and
                custom_nodes there too (the pack alone), others use those of the ComfyUI.
            cpu: keep away from the GPU.
            port: a free one when None.
            extra: more arguments for the host's main.py.
        """
        self.env, self.folder = env, folder
        self.port = port or free_port()
        self.client = Client("127.0.0.1", self.port)
        self.log = folder / "comfyui.log"
        for name in FOLDERS if isolated else FOLDERS[:3]:
            (folder / name).mkdir(parents=True, exist_ok=True)
        if isolated:
            link_folder(folder / "custom_nodes" / PACK_NAME, ROOT)
        command = [str(env.python), str(env.host / "main.py"), "--port", str(self.port)]
        command += [
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
        ]
        if isolated:
            command += ["--base-directory", str(folder)]
        else:
            for name in ("output", "user"):
                command += [f"--{name}-directory", str(folder / name)]
            # The host makes a folder "temp" inside the one it is given.
            command += ["--temp-directory", str(folder)]
        command += ["--cpu"] if cpu else []
        # A session of its own: Ctrl-C is for dev.py or pytest, which then ends the host.
        apart = {"start_new_session": True} if os.name != "nt" else {}
        self._out = self.log.open("wb")
        self.process = subprocess.Popen(
            [*command, *extra],
            stdout=self._out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=env.variables(with_host=False),
            **apart,
        )

    def log_text(self) -> str:
        """Everything the host has printed so far."""
        return self.log.read_text("utf-8", "replace")

    def wait(self, timeout: float = 300.0, progress: Progress | None = None) -> None:
        """Return when the host answers; raise `Stop` when it ends first or takes too long."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                lines = [x for x in self.log_text().splitlines() if x.strip()]
                last = lines[-1].strip() if lines else "it said nothing"
                raise Stop(f"ComfyUI ended while starting: {last}. Its log is {self.log}.")
            try:
                self.client.get("/system_stats")
                return
            except (OSError, ValueError):
                time.sleep(0.2)
            if progress:
                progress.update()
        raise Stop(f"ComfyUI did not answer within {timeout:.0f} s. Its log is {self.log}.")

    def failed_imports(self) -> list[str]:
        """The lines of the log that tell of custom nodes that could not be loaded."""
        return [line for line in self.log_text().splitlines() if "IMPORT FAILED" in line]

    def pack_problem(self) -> str:
        """Why the pack could not be loaded, as the host says it; "" when it was."""
        if not any(PACK_NAME in line for line in self.failed_imports()):
            return ""
        said = [x for x in self.log_text().splitlines() if PACK_NAME in x and "IMPORT" not in x]
        return said[-1].split(PACK_NAME, 1)[1].lstrip(": ") if said else "it does not say why"

    def stop(self) -> None:
        """End the process; its folders are ours, so it need not tidy up."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._out.close()


@contextlib.contextmanager
def running_host(env: Environment, *, keep: bool = False, **options) -> Iterator[HostProcess]:
    """A host in a new folder under `.dev/run/`, deleted afterwards unless `keep` or a failure.

    `options` are those of `HostProcess`.
    """
    (DEV / "run").mkdir(parents=True, exist_ok=True)
    for former in (DEV / "run").iterdir():
        # Kept for their logs after a failure, by now without use.
        if time.time() - former.stat().st_mtime > 24 * 3600:
            shutil.rmtree(former, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=DEV / "run"))
    progress = Progress("starting ComfyUI")
    host = HostProcess(env, folder, **options)
    try:
        host.wait(progress=progress)
        progress.done("answers at " + host.client.url)
        yield host
    except BaseException:
        keep = True
        raise
    finally:
        host.stop()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
