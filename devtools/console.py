"""Progress lines, child processes, and failures told in one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Stop(Exception):
    """A failure whose message is the one sentence that the user is to read."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM: the same as Ctrl-C, but its children do not know."""


def end_on_sigterm() -> None:
    """Let SIGTERM raise `Terminated`, so that what was started is also ended."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    # A shell starts its background jobs, and through them our children, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(process: subprocess.Popen) -> int:
    """Wait for a child that shares the terminal; when dev.py is to stop, so is the child.

    Returns its exit status. Ctrl-C reaches the child by itself.
    """
    try:
        return process.wait()
    except KeyboardInterrupt as reason:
        if isinstance(reason, Terminated):
            process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def say(text: str) -> None:
    """Print one line at once, also when the output is a pipe."""
    print(text, flush=True)


class Progress:
    """One line that is rewritten on a terminal, and printed every 15 seconds anywhere else."""

    def __init__(self, label: str):
        self.label = label
        self._start = self._last = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._width = 0

    def update(self, detail: str = "") -> None:
        """Show `detail` beside the label and the time spent."""
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._start), 60)
        line = f"  {self.label} {minutes}:{seconds:02d}  {detail}"[:110]
        if self._terminal:
            print("\r" + line.ljust(self._width), end="", flush=True)
            self._width = len(line)
        elif now - self._last >= 15:
            self._last = now
            say(line)

    def done(self, detail: str = "") -> None:
        """Replace the line with its last state."""
        if self._terminal:
            print("\r" + " " * self._width + "\r", end="")
        say(f"  {self.label} {detail or 'done'} ({time.monotonic() - self._start:.0f} s)")


_CAUSES: Sequence[tuple[str, str]] = (
    (
        r"No space left on device|Errno 28|not enough space on the disk|Disk quota exceeded",
        "the disk is full: free some space (the whole set-up takes about 8 GB, and the package "
        "cache as much again) and run the same command again",
    ),
    (
        r"ensurepip is not|No module named '?(ensurepip|venv)",
        "this Python cannot make virtual environments: install its venv package "
        "(Debian and Ubuntu: apt install python3-venv) or uv, then run the same command again",
    ),
    (
        r"CERTIFICATE_VERIFY|invalid peer certificate",
        "the certificate of the package index is not trusted here: name your network's "
        "certificate file in SSL_CERT_FILE and PIP_CERT, then run the same command again",
    ),
    (
        r"dns error|name resolution|getaddrinfo|[Cc]onnection refused|tcp connect"
        r"|NewConnectionError|Max retries|[Tt]imed out|ConnectTimeout|Failed to fetch"
        r"|Network is unreachable"
        r"|error sending request|Connection reset|IncompleteRead|ProxyError",
        "the package index could not be reached: check the network, the proxy or the index you "
        "have configured, then run the same command again (what was downloaded is kept)",
    ),
    (
        r"No matching distribution|No solution found|not found in the package registry",
        "the package index does not offer what is needed: check the network and the index you "
        "have configured, and that dev.py runs with Python 3.10 to 3.13",
    ),
    (
        r"requires-python|Requires-Python|requires Python|no wheels with a matching Python",
        "a package does not support this Python version: run dev.py with Python 3.11 or 3.12",
    ),
    (r"Permission denied|Access is denied|Errno 13", "a file or folder may not be written"),
)


def cause_of(output: str) -> str:
    """The likely cause, in words, of a failed installer from what it printed; "" if unknown."""
    for pattern, sentence in _CAUSES:
        if re.search(pattern, output):
            return sentence
    return ""


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """A copy of the environment without what would make a child use another Python's packages."""
    skip = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "PIP_TARGET", "PIP_USER"}
    env = {key: value for key, value in os.environ.items() if key not in skip}
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONUTF8"] = "1"
    env.update(extra or {})
    return env


PAUSES = (10.0, 40.0)
"""Seconds before a fetching that failed is tried again, under CI, where nobody is there to do so: a
package index is back from most of its troubles by then."""


def run_logged(
    command: Sequence[str | Path],
    label: str,
    log: Path,
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    detail: Callable[[], str] | None = None,
    fetches: bool = False,
) -> str:
    """Run an installer quietly: progress on one line, everything it says in `log`.

    Args:
        detail: words that the line shows beside the last of what it says.
        fetches: it asks a network; what fails is tried again where `CI` is set.

    Returns what it printed. Raises `Stop` with the cause when it fails.
    """
    pauses = PAUSES if fetches and os.environ.get("CI") else ()
    for pause in pauses:
        try:
            return _run_once(command, label, log, env, cwd, detail)
        except Stop as stop:
            if "disk is full" in str(stop):
                raise
            say(f"  {stop}\n  trying it again in {pause:.0f} s")
            time.sleep(pause)
    return _run_once(command, label, log, env, cwd, detail)


def _run_once(
    command: Sequence[str | Path],
    label: str,
    log: Path,
    env: dict[str, str] | None,
    cwd: Path | None,
    detail: Callable[[], str] | None,
) -> str:
    progress = Progress(label)
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    words = [str(part) for part in command]
    try:
        child = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=env if env is not None else clean_environment(),
            cwd=cwd,
        )
    except OSError as error:
        raise Stop(f"{label}: {words[0]} could not be started ({error.strerror}).") from error

    def read() -> None:
        with log.open("a", encoding="utf-8") as out:
            out.write(f"\n$ {' '.join(words)}\n")
            for line in child.stdout or ():
                lines.append(line)
                out.write(line)
                out.flush()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            reader.join(0.25)
            last = next((text.strip() for text in reversed(lines[-5:]) if text.strip()), "")
            progress.update(f"{detail()}  {last}" if detail else last)
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    output = "".join(lines)
    if code:
        progress.done("failed")
        last = next((text.strip() for text in reversed(lines) if text.strip()), f"code {code}")
        why = cause_of(output) or f"{last[:200]}"
        raise Stop(f"{label} failed: {why}. All it said is in {log}.")
    progress.done()
    return output
