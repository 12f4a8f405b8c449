"""What the cells of the compatibility matrix gave: read, kept as JSON, and shown as a table."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .environment import ROOT

TABLE = ROOT / "benchmarks" / "results" / "matrix.json"
PAGE = ROOT / "benchmarks" / "results" / "README.md"
MARKS = ("<!-- matrix.json -->\n", "<!-- end of matrix.json -->\n")


@dataclass
class Result:
    """What a cell gave.

    Attributes:
        host, python, torch: as in `Cell`.
        status: "passed", "failed" or "not run".
        why: of a cell that was not run or could not be set up, one sentence; else empty.
        versions: the exact Python and packages, by name.
        passed, failed, skipped: counts of tests.
        failures: the failed tests' ids, each with its last line.
        skips: the skipped tests' ids, each with the reason.
        seconds: how long the tests took.
        date: when, ISO 8601.
        made_from: digest of the pack, its tests and what was asked to be installed.
    """

    host: str
    python: str
    torch: str
    status: str = "not run"
    why: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    skips: dict[str, str] = field(default_factory=dict)
    seconds: int = 0
    date: str = ""
    made_from: str = ""


def read_junit(path: Path, result: Result) -> None:
    """Put the counts, failures and skips of pytest's XML file into `result`.

    Raises `OSError` or `ET.ParseError` when there is no whole file.
    """
    for case in ET.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("tests.")
        kinds = {child.tag: child for child in case}
        if bad := [kinds[tag] for tag in ("failure", "error") if tag in kinds]:
            result.failed += 1
            message = (bad[0].get("message") or "").strip().splitlines() or ["it does not say why"]
            result.failures[name] = _without_place(message[0])
        elif "skipped" in kinds:
            result.skipped += 1
            result.skips[name] = _without_place(kinds["skipped"].get("message") or "")
        else:
            result.passed += 1


def _without_place(message: str) -> str:
    """A message for the table: not of this machine's folders, and not endless."""
    return message.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), "")[:300]


def markdown(results: Sequence[Result]) -> str:
    """The table of `README.md`: a row each cell, then what failed or was skipped, and where."""
    rows = [
        "| ComfyUI | Python | torch | passed | failed | skipped | |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, list[str]] = {}
    ran = [result for result in results if result.status != "not run"]
    for r in results:
        told = f"{r.status}: {r.why}" if r.why else r.status
        counts = (r.passed, r.failed, r.skipped) if r in ran else ("–", "–", "–")
        torch = f"{r.versions['torch']} ({r.torch})" if "torch" in r.versions else r.torch
        row = (r.host, r.versions.get("python", r.python), torch, *counts, told)
        rows.append(f"| {' | '.join(map(str, row))} |")
        for word, tests in (("failed", r.failures), ("skipped", r.skips)):
            for name, why in tests.items():
                note = f"`{name}` {word}: {why or 'no reason given'}"
                notes.setdefault(note, []).append(f"{r.host} / {r.python} / {r.torch}")
    lines = [
        f"- {note} ({'everywhere' if len(where) == len(ran) else ', '.join(where)})"
        for note, where in notes.items()
    ]
    return "\n".join([*rows, *(["", *lines] if lines else [])]) + "\n"


def write_table(results: Iterable[Result], table: Path = TABLE, page: Path = PAGE) -> None:
    """Merge `results` into the JSON table, and put all of it into the page between its marks.

    A cell that was not run this time keeps what it gave before.
    """
    known: dict[tuple, Result] = {}
    if table.is_file():
        for entry in json.loads(table.read_text("utf-8"))["cells"]:
            former = Result(**entry)
            known[_order(former)] = former
    for result in results:
        if result.status != "not run" or _order(result) not in known:
            known[_order(result)] = result
    cells = [known[key] for key in sorted(known)]
    text = json.dumps({"cells": [asdict(r) for r in cells]}, indent=1) + "\n"
    part = table.with_name(table.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(table)
    before, rest = page.read_text("utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(before + MARKS[0] + markdown(cells) + MARKS[1] + after, "utf-8")


def _order(result: Result) -> tuple:
    numbers = [tuple(map(int, text.split("."))) for text in (result.host, result.python)]
    return (*numbers, result.torch)
