"""`python -m quanttune report`: the starter model end to end, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from urllib.parse import unquote

import pytest

from quanttune.tests.metrics.test_report import Page

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
TINY = ("--quick", "--latent", "8", "--bits", "8", "4", "--steps", "2", "--forwards", "2",
        "--samples", "1", "--runs", "1", "--device", "cpu")


def command(*words):
    return [sys.executable, "-m", "quanttune", "report", *map(str, words)]


def run(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=550,
                          env=ENVIRONMENT)


@pytest.mark.slow
def test_the_starter_from_its_weights_to_the_report(tmp_path):
    from quanttune.metrics.sensitivity import Sensitivity

    done = run("--starter", "--out", tmp_path / "out", "--prompts", "a red star", "unused",
               "--seed", "3", "--pictures", "1", *TINY)
    assert done.returncode == 0, done.stderr
    assert "1. time and memory" in done.stdout
    assert "Smallest" in done.stdout or "Nothing quantized" in done.stdout
    folder = tmp_path / "out"
    assert sorted(os.listdir(folder)) == ["report.html", "report.md", "report_files"]
    page = Page((folder / "report.html").read_text("utf-8"))
    first = {row[0] for row in page.rows}
    assert {"float", "INT8 products", "8 bits", "4 bits", "seed", "PyTorch", "ComfyUI"} <= first
    assert any(name.startswith("plan ") for name in first)
    assert ["seed", "3"] in page.rows and ["prompts", "a red star"] in page.rows
    assert "The model is usable." in page.text or "NOT usable" in page.text
    assert "python -m quanttune report --starter" in page.text
    assert len(page.all("img")) >= 6
    text = (folder / "report.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (folder / unquote(link)).is_file()
    files = folder / "report_files"
    found = Sensitivity.from_json((files / "sensitivity.json").read_text())
    assert found.precisions == ("8", "4") and sum(found.forwards) == 2
    assert (files / "pareto.csv").read_text().startswith("model,MiB")
    measured = [line.split('"')[1] for line in
                (files / "benchmark.csv").read_text().splitlines()[1:]]
    assert [n for n in measured if not n.startswith("float, ")] == [
        "float", "INT8 products", "8 bits", "4 bits"]
    assert len((files / "plan.csv").read_text().splitlines()) == len(found.shapes) + 1
    json.loads((files / "sensitivity.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
def test_ctrl_c_leaves_no_file(tmp_path):
    process = subprocess.Popen(
        command("--starter", "--out", tmp_path, "--latent", "16", "--device", "cpu"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("2. "):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=550)
    assert process.returncode == 130, errors
    assert "no report was written" in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


@pytest.fixture
def told(comfy_inprocess, monkeypatch, capsys):
    """Runs the command in this process: exit status, and the last line of its errors."""
    from comfy.cli_args import args

    from quanttune.__main__ import main

    for name in ("cpu", "use_pytorch_cross_attention"):
        monkeypatch.setattr(args, name, getattr(args, name))

    def call(*words):
        status = main(["report", *map(str, words)])
        captured = capsys.readouterr()
        assert "1. time" not in captured.out
        return status, captured.err.strip().splitlines()[-1]
    return call


@pytest.mark.parametrize("words,match", [
    (("--checkpoint", "{folder}/none.safetensors"), "none.safetensors.? is not there"),
    (("--starter", "--prompts", "{folder}/gone.txt"), "gone.txt cannot be read"),
    (("--starter", "--prompts", "{folder}/empty.txt"), "empty.txt holds no prompt"),
    (("--starter", "--runs", "0"), "runs is 0"),
    (("--starter", "--sampler", "best"), "no sampler 'best'"),
    (("--starter", "--scheduler", "best"), "no scheduler 'best'"),
    (("--checkpoint", ""), "option --checkpoint is empty"),
    (("--checkpoint", "{folder}/empty.txt"), "is no checkpoint"),
    (("--starter", "--seed", "-1"), "seed is -1"),
    (("--starter", "--seed", str(2**64)), "seed is 18446744073709551616"),
    (("--starter", "--cfg", "nan"), "cfg is nan"), (("--starter", "--cfg", "inf"), "cfg is inf"),
    (("--starter", "--timestep-buckets", "100000"), "timestep_buckets is 100000"),
    (("--starter", "--latent", "1", "--pictures", "1"), "8 x 8 pixels, but SSIM needs 11 x 11"),
])
def test_refusals_come_before_anything_is_measured(words, match, tmp_path, told):
    (tmp_path / "empty.txt").write_text("\n\n")
    status, error = told("--out", tmp_path / "new" / "out", "--device", "cpu",
                         *(w.format(folder=tmp_path) for w in words))
    assert status == 1 and error.startswith("Error: ") and re.search(match, error)
    assert os.listdir(tmp_path) == ["empty.txt"]


def test_a_folder_that_was_there_stays(tmp_path, told):
    assert told("--out", tmp_path / ".", "--starter", "--runs", "0")[0] == 1
    assert tmp_path.is_dir()


def test_a_graphics_card_that_is_not_there(tmp_path, told, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, error = told("--out", tmp_path / "out", "--starter", "--device", "cuda")
    assert status == 1 and "device is cuda, but PyTorch finds no graphics card" in error
    assert not (tmp_path / "out").exists()


def test_no_file_is_told_to_be_loaded_with_the_code_in_it(tmp_path, told):
    import torch

    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"a": Code()}, tmp_path / "bad.ckpt")
    for name, content in (("text.ckpt", b"hello" * 100), ("empty.ckpt", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("bad.ckpt", "text.ckpt", "empty.ckpt"):
        status, error = told("--out", tmp_path / "out", "--checkpoint", tmp_path / name,
                             "--device", "cpu")
        assert status == 1 and "(it is damaged, or holds more than tensors)" in error, error


def test_an_output_folder_that_cannot_be_made(tmp_path, told):
    (tmp_path / "file").write_text("x")
    status, error = told("--starter", "--out", tmp_path / "file" / "out", *TINY)
    assert status == 1 and "of --out cannot be written" in error


@pytest.mark.parametrize("words", [(), ("--starter", "--checkpoint", "x"), ("--bits", "5")])
def test_options_that_make_no_sense(words, tmp_path, told, capsys):
    with pytest.raises(SystemExit) as caught:
        told("--out", tmp_path, *words)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_prompts_from_files_and_texts(tmp_path, comfy_inprocess):
    from quanttune.host.report_command import read_prompts

    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa star\n\n a circle \n", "utf-8")
    assert read_prompts(str(path)) == ["a star", "a circle"]
    assert read_prompts("a heart") == ["a heart"]


@pytest.mark.parametrize("precisions,expected", [
    (("8", "4", "2"), ((7.0, 8.0, 10.0, 12.0), 8.0)), (("8", "int8"), ((14.0,), 14.0))])
def test_budgets_are_the_sizes_of_uniform_bits_and_halves(precisions, expected, comfy_inprocess):
    import torch

    from quanttune.host.report import budgets_for
    from quanttune.metrics.sensitivity import Sensitivity

    # 64 weights in 4 rows: 4 x 8 bytes of scales are 4 bits a weight.
    found = Sensitivity({"a": ("a",)}, {"a": (4, 16)}, {}, precisions,
                        torch.zeros(1, len(precisions), 1), (1,))
    assert budgets_for(found) == expected
