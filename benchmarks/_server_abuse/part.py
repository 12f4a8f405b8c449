"""All kinds of abuse of a server, one after another; numbers and the count of failures."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from quanttune.devtools.environment import DEV, Environment
from quanttune.devtools.host_process import HostProcess

from . import clients, cycles, disk, kills, probe, replaced

KINDS = ("cycles", "stock", "clients", "kills", "disk", "replaced")


def environment() -> Environment:
    """The host and the Python that this benchmark runs on."""
    import comfy

    host = Path(os.environ.get("QUANTTUNE_HOST") or Path(next(iter(comfy.__path__))).parent)
    return Environment(host, Path(sys.executable), DEV / "site", managed=False)


def start(folder: Path) -> HostProcess:
    """A server of its own over a folder, on the CPU, that answers."""
    folder.mkdir(parents=True, exist_ok=True)
    server = HostProcess(environment(), folder)
    try:
        server.wait(300)
    except BaseException:
        server.stop()
        raise
    return server


def server(options: argparse.Namespace) -> tuple[dict, int]:
    """Run the kinds that are asked for; returns their numbers and how much was wrong."""
    found, failures = {}, 0
    for kind in options.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{kind}:", flush=True)
            found[kind], wrong = globals()[f"_{kind}"](Path(folder), options)
        print(f"{kind}: {wrong} wrong", flush=True)
        failures += wrong
    return found, failures


def _say(line: str) -> None:
    print(line, flush=True)


def _cycles(folder: Path, options: argparse.Namespace, make=cycles.ours) -> tuple[dict, int]:
    probe.install(folder)
    host = start(folder)
    try:
        warm = options.cycles // 5
        got = cycles.run(host, options.cycles, options.seed, warm, make, probed=True, say=_say)
    finally:
        host.stop()
    told = summary(got, warm)
    _say(f"{told}")
    grown = [told["growth"], *told["growth_in_use"].values()]
    wrong = (not got.same) + len(got.errors) + sum(value > cycles.LIMIT for value in grown)
    return told, int(wrong)


def _stock(folder: Path, options: argparse.Namespace) -> tuple[dict, int]:
    return _cycles(folder, options, cycles.stock)[0], 0  # to compare with: the host's own


def summary(got: cycles.Cycles, warm: int) -> dict:
    """Numbers of the cycles, with the median of every window rather than each."""
    window = cycles.WINDOW
    return {
        "cycles": len(got.rss),
        "warm_up": warm,
        "ended": dict(got.ended),
        "kinds": dict(got.kinds),
        "seconds": round(got.seconds, 1),
        "errors": got.errors,
        "same_picture": got.same,
        "growth": round(cycles.growth(got.rss, warm), 5),
        "growth_anonymous": round(cycles.growth(got.anonymous, warm), 5),
        "median_mib": [
            round(statistics.median(got.rss[i : i + window]), 1)
            for i in range(0, len(got.rss), window)
        ],
        "growth_in_use": {
            name: round(value, 5) for name, value in cycles.growth_in_use(got.in_use, warm).items()
        },
        "in_use": [{name: round(value, 1) for name, value in told.items()} for told in got.in_use],
        "freed": [[n, round(before, 1), round(after, 1)] for n, before, after in got.freed],
    }


def _clients(folder: Path, options: argparse.Namespace) -> tuple[dict, int]:
    host = start(folder)
    try:
        got = clients.run(host, 12, options.seed, _say)
    finally:
        host.stop()
    return asdict(got), len(got.wrong)


def _kills(folder: Path, options: argparse.Namespace) -> tuple[dict, int]:
    wanted = options.kill

    def asked(job: str, stage: str) -> bool:
        return not wanted or job in wanted or f"{job}:{stage}" in wanted

    got, times = kills.run(start, folder, kills.PLAN, options.seed, asked, _say)
    seconds = {job: {k: round(v, 3) for k, v in t.items()} for job, t in times.items()}
    return {"kills": [asdict(k) for k in got], "seconds": seconds}, sum(bool(k.wrong) for k in got)


def kill_names() -> list[str]:
    """What `--kill` takes: each job, and each stage of it."""
    return [
        name
        for title, job in kills.JOBS.items()
        for name in (title, *(f"{title}:{stage}" for stage in job.stages))
    ]


def merged(before: dict, found: dict) -> dict:
    """Numbers of this time beside those of kinds, and stages of kills, that were not run again."""
    result = {**before, **found}
    if "kills" in before and "kills" in found:
        old, new = before["kills"], found["kills"]
        again = {(kill["job"], kill["stage"]) for kill in new["kills"]}
        every = [k for k in old["kills"] if (k["job"], k["stage"]) not in again] + new["kills"]
        jobs = list(kills.JOBS)
        every.sort(key=lambda kill: jobs.index(kill["job"]))
        seconds = {**old.get("seconds", {}), **new["seconds"]}
        result["kills"] = {"kills": every, "seconds": seconds}
    return result


def _disk(folder: Path, options: argparse.Namespace) -> tuple[dict, int]:
    try:
        with disk.small_disk(folder / "output"):
            host = start(folder)
            try:
                got = disk.run(host, say=_say)
                got += [disk.training(host, kind, _say) for kind in ("scales", "lora", "qat")]
            finally:
                host.stop()
    except disk.NoSmallDisk as error:
        _say(f"left out: no small disk can be made ({error})")
        return {"left_out": str(error)}, 0
    return {"nodes": [_without_folder(asdict(f), folder) for f in got]}, sum(
        bool(f.wrong) for f in got
    )


def _replaced(folder: Path, options: argparse.Namespace) -> tuple[dict, int]:
    got = replaced.run(start, folder, say=_say)
    return {"files": [_without_folder(asdict(r), folder) for r in got]}, sum(
        bool(r.wrong) for r in got
    )


def _without_folder(facts: dict, folder: Path) -> dict:
    """Without the name of a temporary folder, which differs from run to run."""
    return {k: v.replace(f"{folder}/", "") if isinstance(v, str) else v for k, v in facts.items()}
