"""The compatibility matrix: which cells, which Pythons, what is kept, what the table says."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from quanttune.devtools import host_source, matrix, matrix_table, pythons
from quanttune.devtools.console import Stop
from quanttune.devtools.matrix import Cell
from quanttune.devtools.matrix_table import Result
from quanttune.tests.harness import smoke

ROOT = Path(__file__).resolve().parent.parent
JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.host.test_a" name="test_good[1]"/>
<testcase classname="tests.host.test_a" name="test_bad">
<failure message="assert 1 &lt; 0&#10;more"/></testcase>
<testcase classname="tests.test_b.TestC" name="test_broken"><error message=""/></testcase>
<testcase classname="tests.test_b" name="test_out"><skipped message="no Chromium"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The matrix's folder and table of a test's own; no cell is set up."""
    page = tmp_path / "README.md"
    page.write_text("before\n" + "old\n".join(matrix_table.MARKS) + "after\n", "utf-8")
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / "matrix")

    def write(results):
        matrix_table.write_table(results, tmp_path / "matrix.json", page)

    monkeypatch.setattr(matrix, "write_table", write)
    monkeypatch.setattr(matrix, "pack_digest", lambda: "pack")
    return tmp_path


def passed(cell, made_from, arguments=()):
    return Result(*dataclasses.astuple(cell), "passed", passed=3, made_from=made_from)


def test_every_smoke_test_is_there():
    for entry in smoke.SMOKE:
        path, _, rest = entry.partition("::")
        tree = ast.parse((ROOT / "tests" / path).read_text("utf-8"))
        known = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert not rest or rest.partition("[")[0] in known, f"{entry} is there no more"
    found = smoke.names("tests/a/b.py::C::t[x::y[1]]")
    assert found == ["a/b.py", "a/b.py::C", "a/b.py::C::t", "a/b.py::C::t[x::y[1]]"]


def test_the_scheduled_run_takes_every_cell():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github" / "workflows"
    flows = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in folder.glob("*.yml")}
    assert set(flows) == {"tests", "matrix"}
    (job,) = flows["matrix"]["jobs"].values()
    assert job["strategy"]["matrix"] == {
        "comfyui": [release.version for release in host_source.RELEASES],
        "python": list(matrix.PYTHONS),
        "torch": list(matrix.TORCHES),
    }
    assert flows["matrix"][True].keys() == {"schedule", "workflow_dispatch"}  # YAML reads "on" so
    assert flows["tests"][True].keys() == {"push", "pull_request"}
    for flow in flows.values():
        assert flow["permissions"] == {"contents": "read"}


class TestCells:
    def test_all_by_default_and_those_named(self):
        everything = matrix.choose([], [], [])
        assert len(set(everything)) == len(everything) == 4 * 4 * 2
        chosen = matrix.choose(["0.27.0"], ["3.12"], ["newest"])
        assert chosen == [Cell("0.27.0", "3.12", "newest")]

    @pytest.mark.parametrize("arguments, word", [
        ((["0.1"], [], []), "--hosts 0.1"), (([], ["2.7"], []), "--pythons 2.7"),
        (([], [], ["middle"]), "--torch middle"),
    ])  # fmt: skip
    def test_unknown_ones_are_named(self, arguments, word):
        with pytest.raises(Stop, match=word):
            matrix.choose(*arguments)

    def test_every_release_has_its_own_package_and_hash(self):
        releases = host_source.RELEASES
        assert len({r.sha256 for r in releases}) == len(releases) == 4
        assert all(len(r.sha256) == 64 for r in releases) and releases[-1] is host_source.PINNED


class TestPythons:
    def test_finds_the_one_that_runs_this(self, tmp_path):
        import sys

        version = "{}.{}".format(*sys.version_info[:2])
        assert pythons.find_python(version, tmp_path / "log") is not None

    def test_what_answers_with_another_version_or_not_at_all_is_passed_over(
        self, tmp_path, monkeypatch
    ):
        wrong = tmp_path / "wrong"
        wrong.write_text("#!/bin/sh\necho 3.9\n")
        wrong.chmod(0o755)
        tried = [str(wrong), str(tmp_path / "none"), ""]
        monkeypatch.setattr(pythons, "_pythons_to_try", lambda version, log: iter(tried))
        assert pythons.find_python("3.13", tmp_path / "log") is None


class TestRun:
    def test_a_python_that_is_not_here_is_not_run_and_never_passed(self, folder, monkeypatch):
        monkeypatch.setattr(matrix, "find_python", lambda version, log: None)
        assert matrix.run([Cell("0.27.0", "3.13", "newest")]) == 1
        page = (folder / "README.md").read_text("utf-8")
        assert "| 0.27.0 | 3.13 | newest | – | – | – | not run: no Python 3.13 here |" in page
        assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page

    def test_what_passed_is_not_run_again_until_the_pack_changes(self, folder, monkeypatch):
        calls = []
        monkeypatch.setattr(matrix, "run_cell", lambda *a: (calls.append(1), passed(*a))[1])
        cells = [Cell("0.27.0", "3.12", "newest"), Cell("0.30.0", "3.12", "newest")]
        for cell in cells:
            (cell.folder / "venv").mkdir(parents=True)
        assert matrix.run(cells, keep=True) == 0 and len(calls) == 2
        assert all((cell.folder / "venv").exists() for cell in cells)
        assert matrix.run(cells) == 0 and len(calls) == 2
        assert matrix.run(cells, again=True) == 0 and len(calls) == 4
        assert not any((cell.folder / "venv").exists() for cell in cells)
        monkeypatch.setattr(matrix, "pack_digest", lambda: "another")
        assert matrix.run(cells) == 0 and len(calls) == 6

    def test_a_failed_one_is_run_again_and_makes_the_whole_fail(self, folder, monkeypatch):
        calls = []

        def fail(cell, made_from, arguments=()):
            calls.append(cell)
            result = passed(cell, made_from)
            result.status, result.failed, result.failures = "failed", 1, {"a::b": "assert 0"}
            return result

        monkeypatch.setattr(matrix, "run_cell", fail)
        cell = Cell("0.18.2", "3.11", "oldest")
        cell.folder.mkdir(parents=True)
        assert matrix.run([cell]) == matrix.run([cell]) == 1 and len(calls) == 2
        told = "- `a::b` failed: assert 0 (everywhere)"
        assert told in (folder / "README.md").read_text("utf-8")

    def test_what_cannot_be_set_up_has_failed(self, folder, monkeypatch):
        def stop(*_):
            raise Stop("the disk is full")

        monkeypatch.setattr(matrix, "find_python", lambda version, log: "python")
        monkeypatch.setattr(matrix, "_set_up", stop)
        result = matrix.run_cell(Cell("0.27.0", "3.11", "newest"), "pack")
        assert (result.status, result.why) == ("failed", "could not be set up: the disk is full")


class TestTable:
    def test_counts_failures_and_skips_of_pytest(self, tmp_path):
        (tmp_path / "junit.xml").write_text(JUNIT.replace("assert 1", f"{ROOT}/a.py: assert 1"))
        result = Result("0.27.0", "3.11", "newest")
        matrix_table.read_junit(tmp_path / "junit.xml", result)
        assert (result.passed, result.failed, result.skipped) == (1, 2, 1)
        assert result.failures == {
            "host.test_a::test_bad": "a.py: assert 1 < 0",
            "test_b.TestC::test_broken": "it does not say why",
        }
        assert result.skips == {"test_b::test_out": "no Chromium"}

    def test_rows_are_merged_by_cell_and_sorted_by_number(self, folder):
        cells = [Cell("0.27.0", "3.10", "newest"), Cell("0.18.2", "3.9", "oldest")]
        for cell in cells:
            matrix.write_table([passed(cell, "pack")])
        matrix.write_table([Result("0.27.0", "3.10", "newest", why="no Python 3.10 here")])
        found = json.loads((folder / "matrix.json").read_text("utf-8"))["cells"]
        assert [(c["host"], c["status"]) for c in found] == [
            ("0.18.2", "passed"), ("0.27.0", "passed")]  # fmt: skip

    def test_the_committed_page_shows_the_committed_table(self):
        cells = json.loads(matrix_table.TABLE.read_text("utf-8"))["cells"]
        text = matrix_table.markdown([Result(**cell) for cell in cells])
        assert text in matrix_table.PAGE.read_text("utf-8")
        assert str(ROOT) not in matrix_table.TABLE.read_text("utf-8")


def test_what_is_required_of_the_host_has_passed_the_matrix():
    """What pyproject.toml and README ask for is the oldest that passed, and no older one."""
    cells = json.loads(matrix_table.TABLE.read_text("utf-8"))["cells"]
    passed = [cell for cell in cells if cell["status"] == "passed"]

    def oldest(key):
        return min((c[key] for c in passed), key=lambda text: [int(n) for n in text.split(".")])

    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'requires-comfyui = ">={oldest("host")}"' in text
    assert f'requires-python = ">={oldest("python")}"' in text
    failed = {cell["host"] for cell in cells if cell["status"] == "failed"}
    assert oldest("host") not in failed, "what is asked for passes with every Python and torch"
    assert f"ComfyUI {oldest('host')} or newer" in (ROOT / "README.md").read_text("utf-8")
