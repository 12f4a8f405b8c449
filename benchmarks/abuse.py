"""Abuse: the pack's readers on a hundred thousand damaged files, and a server that is mistreated.

    python dev.py bench abuse -- --part files --count 100000 --seed 0
    python dev.py bench abuse -- --part files --reader "scale set" --count 2000
    python dev.py bench abuse -- --part files --replay "scale set:17" --keep FOLDER
    python dev.py bench abuse -- --part server --kind kills
    python dev.py bench abuse -- --part server --kind kills --kill "Train QAT:saving"

Each file is a small valid one with one to three changes, most of which know the file's form. It has
to be refused in one sentence that names it, or read as an independent reader reads it. Another
exception, a hang, memory beyond reason, files left behind, a dead process and anything accepted
that is not what the file holds count as failures. Every file follows from the seed and its number.
Linux only; one process and one core.

The server's part is in `_server_abuse`: a thousand graphs that are cancelled, two clients at once,
kill -9 while training and saving, a full disk, and files replaced under a loaded model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from quanttune.benchmarks._server_abuse import part as server_part

PARTS = ("files", "server")


def files(options: argparse.Namespace) -> tuple[dict, int]:
    """Fuzz the readers; returns numbers and how many files failed."""
    from comfy.cli_args import args

    args.cpu = True  # before the host looks for a GPU
    from quanttune.benchmarks._fuzz import registry, run

    readers = registry.readers()
    named = [f.rpartition(":")[0] or f for f in (*options.files, options.replay) if f]
    if unknown := {*named, *(options.reader or ())} - readers.keys():
        known = ", ".join(map(repr, readers))
        print(f"There is no reader {min(unknown)!r}; it has to be one of {known}.")
        return {}, 1
    if options.replay:
        return {}, replay(readers, options)
    if options.reader:
        readers = {name: readers[name] for name in options.reader}
    counts = run.counts(readers, options.count)
    if options.files:
        counts = {n: int(count) for n, _, count in (f.rpartition(":") for f in options.files)}
    registry.preload(counts)
    began, found = time.monotonic(), []
    print(
        f"{'reader':28}{'files':>8}{'refused':>9}{'accepted':>9}{'failures':>9}{'s':>7}{'MiB':>7}"
    )
    for outcome in run.campaigns(readers, counts, options.seed):
        found.append(outcome)
        print(
            f"{outcome.name:28}{outcome.files:8}{outcome.refused:9}{outcome.accepted:9}"
            f"{len(outcome.failures):9}{outcome.seconds:7.1f}{outcome.peak_mib:7.0f}",
            flush=True,
        )
        for failure in outcome.failures[: options.show]:
            print(f"    {failure['number']}: {failure['kind']}: {failure['told']}", flush=True)
    failures = sum(len(o.failures) for o in found)
    total = sum(o.files for o in found)
    seconds = time.monotonic() - began
    print(f"{total} files, {failures} failures, {seconds:.0f} s")
    return {
        "seed": options.seed,
        "files": total,
        "failures": failures,
        "seconds": round(seconds, 1),
        "readers": [asdict(o) for o in found],
    }, failures


def server(options: argparse.Namespace) -> tuple[dict, int]:
    """Mistreat a server; returns numbers and how much was not as it should be."""
    return server_part.server(options)


def replay(readers: dict, options: argparse.Namespace) -> int:
    """One file again, kept in a folder if one is given; returns 1 if it fails."""
    import tempfile

    from quanttune.benchmarks._fuzz import registry, run

    name, _, number = options.replay.rpartition(":")
    reader = readers[name]
    registry.preload([name])
    seeds = reader.seeds()
    made, target = run.case(reader.name, seeds, reader.choose, options.seed, int(number))
    with tempfile.TemporaryDirectory() as folder:
        bench = run.Bench(Path(folder, "bench"))
        for kind, told in run.warm_up(reader, bench, seeds):
            print(f"{kind}: {told}")
        kind, told, taken = run.one(reader, bench, made, target)
    print(f"{target}: {kind}: {told} ({taken / 2**20:.0f} MiB)")
    if options.keep:
        for path, content in made.items():
            kept = Path(options.keep, path)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
    return int(kind not in (run.REFUSED, run.ACCEPTED))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--count", type=int, default=100_000, help="changed files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", help="only this one, by its name")
    parser.add_argument(
        "--files",
        metavar="READER:COUNT",
        action="append",
        default=[],
        help="so many files for this one, and none for those that are not named",
    )
    parser.add_argument("--replay", metavar="READER:NUMBER", help="one file again")
    parser.add_argument("--keep", metavar="FOLDER", help="where a replayed file goes")
    parser.add_argument("--show", type=int, default=10, help="failures of a reader that are told")
    parser.add_argument(
        "--kind",
        choices=("cycles", "stock", "clients", "kills", "disk", "replaced"),
        action="append",
        help="of the server's part; all by default",
    )
    parser.add_argument(
        "--kill",
        metavar="JOB[:STAGE]",
        action="append",
        default=[],
        help="of the kind kills only this job or stage of it, as the results name them",
    )
    parser.add_argument("--cycles", type=int, default=1000, help="graphs queued and cancelled")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(arguments)
    if unknown := set(options.kill) - set(known := server_part.kill_names()):
        parser.error(f"--kill {min(unknown)}: it has to be one of {', '.join(known)}")
    found, failed = {}, 0
    for part in options.part or PARTS:
        found[part], failures = globals()[part](options)
        failed += failures
    if options.json:
        # Parts and kinds that were not asked for stay as they were found before.
        before = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
        if "server" in found:
            found["server"] = server_part.merged(before.get("server", {}), found["server"])
        options.json.write_text(json.dumps({**before, **found}, indent=1) + "\n", "utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
