"""Runs readers on changed files, in processes of their own, and watches them."""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from .mutate import LARGEST, mutated

SECONDS = 5.0
"""Processor time of one reading; more is a hang."""
SILENT = 300.0
"""Seconds without a case coming to its end, after which a process is ended: it waits, or loops in
native code that no signal interrupts. Many: a busy machine may take long to load libraries."""
MEMORY = 96 * 2**20
"""Bytes that a reading may take above what the process had before."""
ADDRESSES = 6 * 2**30
"""Bytes of addresses that a process may take above what it starts with."""
LONGEST = 1500
"""Characters of a sentence for the user."""
MOST_FAILURES = 200
REFUSED, ACCEPTED = "refused", "accepted"
TRACES = re.compile(r'Traceback|File ".*", line \d+|0x[0-9a-f]{8,}|<[\w.]+ object')

Files = dict[str, bytes]
"""A seed: path in its folder to content."""


@dataclass(frozen=True)
class Reader:
    """A reader of files, and how it is known that it read well.

    Attributes:
        name: for tables and replays.
        seeds: gives small valid seeds; called once, in the process that reads.
        read: takes the folder with a seed, one of its files changed, and that file's path there.
        check: takes the files and what was read; says what is wrong with accepting it, or None.
        refusal: what a reader may raise.
        choose: which files of a seed are changed; all by default.
        share: of a campaign's files: thousands of a hundred thousand.
        memory: bytes that a reading may take.
        quiet: it answers for any file and never refuses, as listings do.
        inputs: words that name a setting inside the file, which do for the file's name.
    """

    name: str
    seeds: Callable[[], Sequence[Files]]
    read: Callable[[Path, str], Any]
    check: Callable[[Files, Any], str | None]
    choose: Callable[[str], bool] = lambda name: True
    share: float = 1.0
    memory: int = MEMORY
    quiet: bool = False
    inputs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of a reader's files."""

    name: str
    files: int = 0
    refused: int = 0
    accepted: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: float = 0.0


class Hang(BaseException):
    """A reading took too long; no reader may catch it."""


def _ring(*_: Any) -> None:
    raise Hang


def case(
    reader: str, seeds: Sequence[Files], choose: Callable[[str], bool], seed: int, number: int
) -> tuple[Files, str]:
    """The files of one case, and which of them was changed. The same for the same numbers."""
    rng = Random(f"{seed}/{reader}/{number}")
    files = dict(rng.choice(seeds))
    target = rng.choice([n for n in files if choose(n)])
    others = [content[:LARGEST] for f in seeds for n, content in f.items() if n != target]
    others += [
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
        b'{"a": 1}',
        b"hello",
        b"version https://git-lfs.",
    ]
    files[target] = mutated(rng, target, files[target], others)
    return files, target


def sentence_fault(text: str, names: Sequence[str]) -> str | None:
    """What is wrong with an error as a sentence for the user, or None."""
    if len(text) > LONGEST:
        return f"{len(text)} characters"
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or c in "\x7f\u2028\u2029\u202e" for c in text):
        return "characters that cannot be shown"
    if not text.endswith((".", ".)")):
        return "no end"
    if found := TRACES.search(text):
        return f"a trace of the program ({found[0]})"
    if not any(name and name in text for name in names):
        return "no file is named"
    return None


class Bench:
    """A folder that changed files are put into, one case after the other."""

    def __init__(self, root: Path):
        self.root, self.folder, self.there = root, root / "case", {}
        self.temporary = root / "temporary"
        for path in (self.folder, self.temporary):
            path.mkdir(parents=True)

    def lay(self, files: Files) -> None:
        """Put files there and take others away; files are replaced, never written over."""
        for name in set(self.there) - set(files):
            (self.folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            if self.there.get(name) is content:
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = self.root / "part"
            part.write_bytes(content)
            os.replace(part, path)
        self.there = dict(files)

    def left(self) -> list[str]:
        """Files that nobody laid there."""
        found = {
            p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if not p.is_dir()
        }
        return sorted(found - set(self.there)) + [p.name for p in self.temporary.iterdir()]

    def sweep(self) -> None:
        """Take away what was left."""
        shutil.rmtree(self.root)
        self.__init__(self.root)


def resident() -> int:
    """Bytes of memory this process has."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _peak_from_now() -> None:
    with open("/proc/self/clear_refs", "wb") as file:
        file.write(b"5")


def _peak() -> int:
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmHWM"))


def one(
    reader: Reader, bench: Bench, files: Files, target: str, seconds: float = SECONDS
) -> tuple[str, str, int]:
    """Read one case.

    Returns:
        `REFUSED`, `ACCEPTED` or a kind of failure; a sentence; bytes it took above before.
    """
    from quanttune.quant import QuantTuneError

    bench.lay(files)
    names = [
        bench.folder.name,
        *files,
        *(Path(n).name for n in files),
        *(Path(n).parent.name for n in files),
        *reader.inputs,
    ]
    size = sum(map(len, files.values()))
    _peak_from_now()
    before, kind, told = resident(), ACCEPTED, ""
    signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        found = reader.read(bench.folder, target)
        wrong = reader.check(files, found)
        del found
        if wrong:
            kind, told = "silent acceptance", wrong
    except QuantTuneError as error:
        kind, told = REFUSED, str(error)
        if reader.quiet:
            kind, told = "refused where it may not", str(error)
        elif fault := sentence_fault(told, names):
            kind, told = "no sentence", f"{fault}: {told[:300]!r}"
    except Hang:
        kind, told = "hang", f"more than {seconds:g} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = (
            f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
        )
        kind = "wrong exception"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    taken = _peak() - before
    if taken > reader.memory + 8 * size and kind in (REFUSED, ACCEPTED):
        kind, told = "memory", f"{taken / 2**20:.0f} MiB for {size} bytes"
    if left := bench.left():
        if kind in (REFUSED, ACCEPTED):
            kind, told = "left behind", ", ".join(left[:3])
        bench.sweep()
    return kind, told, taken


def warm_up(reader: Reader, bench: Bench, seeds: Sequence[Files]) -> Iterator[tuple[str, str]]:
    """Read the seeds as they are, so that what libraries take when they load is not counted.

    Yields:
        Kind and sentence for each that is not accepted, as whole files have to be.
    """
    patient = replace(reader, memory=2**34)
    for files in seeds:
        kind, told, _ = one(patient, bench, files, next(filter(reader.choose, files)), 60.0)
        if kind != ACCEPTED:
            yield f"a whole file: {kind}", told


def _work(
    reader: Reader,
    seed: int,
    first: int,
    count: int,
    root: Path,
    state: memoryview,
    pipe: int,
    seconds: float,
) -> None:
    """A process that reads cases and writes a line for each failure.

    state: int64: the present case, how many were refused and accepted, most bytes that one took.
    """
    bench = Bench(root)
    tempfile.tempdir = str(bench.temporary)
    os.environ["TMPDIR"] = str(bench.temporary)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root.with_suffix(".compiled"))
    os.chdir(bench.temporary)
    torch.set_num_threads(1)  # the processor time of others that wait would count as the reader's
    seeds = reader.seeds()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    peak = 0
    with os.fdopen(pipe, "w") as out:
        for kind, told in warm_up(reader, bench, seeds):
            print(json.dumps({"number": -1, "kind": kind, "told": told}), file=out, flush=True)
        limit = resident() + ADDRESSES
        try:
            with open("/proc/self/statm", "rb") as file:
                limit = int(file.read().split()[0]) * mmap.PAGESIZE + ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        except (OSError, ValueError):
            pass
        for number in range(first, count):
            state[0] = number
            files, target = case(reader.name, seeds, reader.choose, seed, number)
            kind, told, taken = one(reader, bench, files, target, seconds)
            peak = max(peak, taken)
            if kind in (REFUSED, ACCEPTED):
                state[1 + (kind == ACCEPTED)] += 1
            else:
                print(
                    json.dumps({"number": number, "kind": kind, "told": told, "file": target}),
                    file=out,
                    flush=True,
                )
            state[3] = max(state[3], peak)
        state[0] = count


def campaign(
    reader: Reader, count: int, seed: int, seconds: float = SECONDS, silent: float = SILENT
) -> Outcome:
    """Read ``count`` changed files with a reader, in a process that is begun again if it dies."""
    outcome, first, begun = Outcome(reader.name, files=count), 0, time.monotonic()
    state = memoryview(mmap.mmap(-1, 32)).cast("q")
    with tempfile.TemporaryDirectory(prefix="abuse-") as top:
        while len(outcome.failures) < MOST_FAILURES:
            state[0] = first - 1
            root = Path(top, str(first))
            lines, died = _process(reader, seed, first, count, root, state, seconds, silent)
            outcome.failures += lines
            if died is None:
                break
            outcome.failures.append({"number": state[0], "kind": "crash", "told": died})
            if state[0] < first:  # before it read anything
                break
            first = state[0] + 1
    outcome.refused, outcome.accepted, outcome.peak_mib = state[1], state[2], state[3] / 2**20
    outcome.seconds = time.monotonic() - begun
    return outcome


def _process(
    reader: Reader,
    seed: int,
    first: int,
    count: int,
    root: Path,
    state: memoryview,
    seconds: float,
    silent: float,
) -> tuple[list[dict[str, Any]], str | None]:
    """Lines of a process that ran, and how it died, or None."""
    receive, send = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(receive)
            _work(reader, seed, first, count, root, state, send, seconds)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(send)
    died, text, last, since = None, b"", state[0], time.monotonic()
    while True:
        ready, _, _ = select.select([receive], [], [], 1.0)
        if ready:
            piece = os.read(receive, 65536)
            if not piece:
                break
            text += piece
        if state[0] != last:
            last, since = state[0], time.monotonic()
        elif time.monotonic() - since > silent:
            died = f"nothing for {silent:g} s"
            os.kill(child, signal.SIGKILL)
    os.close(receive)
    _, status = os.waitpid(child, 0)
    if status and died is None:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        died = signal.Signals(number).name if number else f"status {os.WEXITSTATUS(status)}"
    return [json.loads(line) for line in text.splitlines() if line.strip()], died


def counts(readers: Mapping[str, Reader], total: int) -> dict[str, int]:
    """How many of ``total`` files each reader gets."""
    shares = sum(r.share for r in readers.values())
    return {name: max(1, round(total * r.share / shares)) for name, r in readers.items()}


def campaigns(
    readers: Mapping[str, Reader], files: Mapping[str, int], seed: int
) -> Iterator[Outcome]:
    """The outcomes of readers by name, one after the other, on so many files each."""
    for name, count in files.items():
        yield campaign(readers[name], count, seed)
