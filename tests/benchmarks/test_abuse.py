"""The fuzzer of file readers finds nothing here, and finds readers that are broken on purpose."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer needs Linux")
ROOT = Path(__file__).resolve().parents[2]
QUICK = {"quantized UNet": 400, "scale set": 400, "safetensors": 300, "PyTorch .pt": 60,
         "PyTorch .bin": 40, "Q-Diffusion .pth": 40, "TuneQDM state": 100, "configuration": 300,
         "prompts": 100, "sensitivity": 100, "captions, jsonl": 100, "captions, csv": 80,
         "captions, txt": 60, "training pictures": 30, "training state": 40}
"""Readers that need no model of the host, and how many files each gets."""


def run(*arguments):
    """A script in a process of its own, since readers are forked from it."""
    import comfy.cli_args

    paths = [str(ROOT / ".dev" / "site"), str(Path(comfy.cli_args.__file__).parents[1])]
    code = f"import sys, runpy; sys.path[:0] = {paths!r}; sys.argv = sys.argv[1:]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)],
                          capture_output=True, text=True, timeout=550)
    assert done.stdout, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("comfy.options", reason="needs the host")


def test_no_reader_fails(host, tmp_path):
    out = tmp_path / "out.json"
    counts = [f"--files={name}:{count}" for name, count in QUICK.items()]
    done = run(ROOT / "benchmarks" / "abuse.py", "--part", "files", "--seed", 1, "--json", out,
               *counts)
    found = json.loads(out.read_text())["files"]
    failed = {r["name"]: r["failures"] for r in found["readers"] if r["failures"]}
    assert not failed and done.returncode == 0, done.stdout[-4000:]
    for reader in found["readers"]:
        assert reader["refused"] + reader["accepted"] == reader["files"] == QUICK[reader["name"]]
        assert reader["refused"] and reader["accepted"], reader["name"]


def test_broken_readers_are_caught(host):
    done = run(Path(__file__).with_name("broken_readers.py"))
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("good") == []
    for kind, kinds in found.items():
        assert kind.partition(",")[0] in kinds, kind


@pytest.mark.parametrize("always", [False, True])
def test_a_replay_counts_what_the_file_takes_and_not_what_libraries_do(host, capsys, always):
    from quanttune.benchmarks import abuse
    from quanttune.benchmarks._fuzz.run import Reader

    kept = []

    def read(folder, target):
        if always or not kept:  # 128 MiB, as an import takes them once
            kept.append(b"x" * 2**27)

    reader = Reader("greedy", lambda: [{"a.txt": b"one two three"}], read, lambda *_: None)
    options = SimpleNamespace(replay="greedy:7", seed=0, keep=None)
    assert abuse.replay({"greedy": reader}, options) == int(always)
    assert ("memory: 12" in capsys.readouterr().out) == always


@pytest.mark.parametrize("name", ["a.json", "a.toml", "a.jsonl", "a.bin", "a.safetensors", "a.png"])
def test_changes_follow_from_the_seed(name):
    from quanttune.benchmarks._fuzz.mutate import mutated

    data = b'{"size": 3, "name": "x"}\n' * 3

    def made(seed):
        return [mutated(Random(f"{seed}/{n}"), name, data, [b"other"]) for n in range(50)]

    assert made(0) == made(0) != made(1)
    assert sum(changed != data for changed in made(0)) > 40


def test_every_function_that_opens_a_file_has_a_reader(host):
    """A new reader of files has to be put on the list, and into the fuzzer if it takes users'."""
    import ast

    known = json.loads(Path(__file__).with_name("opens_files.json").read_text())
    found = {}
    for layer in ("quant", "host", "nodes", "training", "metrics", "starter"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            calls = {_called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            opened = sorted(calls & OPENERS)
            if opened:
                found[path.relative_to(ROOT).as_posix()] = opened
    assert found == {path: entry["calls"] for path, entry in known.items()}, (
        "add the file to opens_files.json, with the fuzzer's reader that covers it")
    sys.path_importer_cache.clear()
    names = {entry["reader"] for entry in known.values()}
    text = "".join(p.read_text() for p in (ROOT / "benchmarks" / "_fuzz").glob("readers*.py"))
    assert not [n for n in names if not n.startswith("none:") and n.partition(",")[0] not in text]


OPENERS = {"open", "safe_open", "load_file", "torch.load", "read_text", "read_bytes",
           "read_entries", "read_header", "read_with_strings", "read_safetensors", "load_unpickled",
           "load_pickled", "open_tensors", "Image.open", "open_picture", "memory_map",
           "ParquetFile", "zipfile.ZipFile", "load_torch_file", "TensorArchive", "load_state"}


def _called(call):
    function = call.func
    if hasattr(function, "attr"):
        owner = getattr(function.value, "id", "")
        dotted = f"{owner}.{function.attr}"
        return dotted if dotted in OPENERS else function.attr if function.attr != "open" else ""
    return getattr(function, "id", "")
