"""`python -m quanttune train-scales` and `train-lora`: configuration files and a run."""

import os
import re
import socket
import subprocess
import sys

import pytest
from PIL import Image

GOOD = """
[base]
starter = true
device = "cpu"
[[images]]
folder = "starter: pip"
resolution = 128
[[images]]
folder = "starter: crest"
resolution = 128
[training]
steps = 4
num_experts = 2
batch_size = 2
checkpointing = false
save_every = 2
[output]
folder = "{folder}/run"
scales = "{folder}/out.safetensors"
"""


def run(path, command="train-scales"):
    return subprocess.run([sys.executable, "-m", "quanttune", command, str(path)],
                          capture_output=True, text=True, timeout=550,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_a_run_writes_scales_and_says_so_again_when_it_is_done(tmp_path):
    from quanttune.quant import load_scale_set
    from quanttune.training.run_lock import alone

    path = tmp_path / "config.toml"
    path.write_text(GOOD.format(folder=tmp_path.as_posix()))
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout and "4 of 4 steps" in done.stdout
    scales = load_scale_set(tmp_path / "out.safetensors")
    assert scales.num_experts == 2 and "sks" in scales.metadata.subject
    assert scales.metadata.extra["settings"]["steps"] == 4
    assert (tmp_path / "run" / "loss.csv").is_file()
    before = (tmp_path / "out.safetensors").read_bytes()
    with alone(tmp_path / "run"):
        refused = run(path)
    assert refused.returncode == 1 and "'run' in" in refused.stderr
    assert "by another program" in refused.stderr and "Traceback" not in refused.stderr
    again = run(path)
    assert again.returncode == 0 and "step 1/" not in again.stdout
    assert (tmp_path / "out.safetensors").read_bytes() == before


LORA = """
[base]
starter = true
{base}
device = "cpu"
[[images]]
folder = "starter: pip"
resolution = 128
[training]
epochs = 2
rank = 4
batch_size = 3
checkpointing = false
[output]
folder = "{folder}/run"
lora = "{folder}/out.safetensors"
"""


@pytest.mark.slow
def test_a_lora_run_writes_a_file_and_goes_on_from_it(tmp_path, comfy_inprocess):
    from quanttune.host.lora_file import read_lora

    path = tmp_path / "config.toml"
    path.write_text(LORA.format(folder=tmp_path.as_posix(), base="bits = 4"))
    done = run(path, "train-lora")
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout and "4 of 4 steps" in done.stdout
    lora = read_lora(tmp_path / "out.safetensors")
    assert lora.metadata["ss_steps"] == "4" and lora.metadata["ss_network_dim"] == "4"
    before = (tmp_path / "out.safetensors").read_bytes()
    again = run(path, "train-lora")
    assert again.returncode == 0 and "step 1/" not in again.stdout
    assert read_lora(tmp_path / "out.safetensors").keys() == lora.keys()
    first = (tmp_path / "out.safetensors").as_posix()
    (tmp_path / "next").mkdir()
    path.write_text(LORA.format(folder=(tmp_path / "next").as_posix(),
                                base=f'nf4 = true\nlora = "{first}"'))
    assert run(path, "train-lora").returncode == 0
    assert (tmp_path / "next" / "out.safetensors").read_bytes() != before


@pytest.mark.slow
def test_epochs_of_two_processes_take_half_the_steps(tmp_path):
    """Each takes a batch of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = tmp_path / "config.toml"
    path.write_text(LORA.format(folder=tmp_path.as_posix(), base=""))
    ranks = [subprocess.Popen(
        [sys.executable, "-m", "quanttune", "train-lora", str(path)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
             "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    told = [process.communicate(timeout=550) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    assert "2 of 2 steps" in told[0][0], "alone it takes four"


@pytest.mark.parametrize("text,match", [
    ("[training]\nepochs='2'", "epochs = '2'"), ("[training]\nnum_experts=2", "num_experts"),
    ("[training]\nrank=0", "rank is 0"), ("scales='x.safetensors'", "write 'lora'"),
    ("lora='/'", "is a folder"),
])
def test_bad_lora_settings(text, match, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f"[base]\nstarter=true\n[[images]]\nfolder='x'\n[output]\n{text}\n")
    done = run(path, "train-lora")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert match in done.stderr


BAD = {
    "missing": (None, "cannot be read"), "no TOML": ("[base", "no valid TOML"),
    "a number of 5000 digits": (f"[base]\nbits = {'9' * 5000}\n", "no valid TOML"),
    "section": ("[bass]\n", r"section \[bass\]"),
    "word": ("[base]\nstartr = true\n", "startr"),
    "no images": ("[base]\nstarter=true\n[output]\n", r"no section \[images\]"),
    "number for a text": ("[base]\ncheckpoint = 3\n", "checkpoint = 3 .*text in quotes"),
    "text for a number": ("[base]\nbits = '4'\n", "bits = '4' .*whole number"),
    "no table": ("base = 3\n", "'base' has to be a section"),
    "images of no table": ("images = ['x']\n", "'images' has to be a section"),
    "training of no table": ("training = 'fast'\n", "'training' has to be a section"),
    "one tracker": ("[output]\ntrackers = 'tensorboard'\n", "a list"),
    "no tables of images": ("images = []\n[base]\n[output]\n", r"no \[images\]"),
    "tracker of no word": ("[base]\n[images]\n[output]\ntrackers=[[]]\n", "texts in quotes"),
    "prompts of no text": ("[base]\n[images]\n[output]\n[validation]\nprompts=['']\n",
                           "no prompts in"),
    "cfg": ("[base]\n[images]\n[output]\n[validation]\nprompts=['x']\ncfg=nan\n", "cfg = nan"),
    "size": ("[base]\n[images]\n[output]\n[validation]\nprompts=['x']\nsize=99\n", "of 8"),
    "previews of nothing": ("[base]\n[images]\n[output]\n[training]\npreview_every=3\n",
                            r"'preview_every' .* \[validation\] with prompts"),
    "image word": ("[base]\n[output]\n[[images]]\nfolder='x'\nsize=3\n", "size"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_configurations(case, tmp_path, comfy_inprocess):
    from quanttune.host.command import read_config
    from quanttune.quant import QuantTuneError

    text, match = BAD[case]
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(QuantTuneError, match=match) as caught:
        read_config(path)
    assert "config.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("base,scales,match", [
    ({"starter": True, "checkpoint": "x"}, False, "both 'starter = true' and 'checkpoint'"),
    ({"bits": 0}, False, "bits = 0 .*8, 4, 3, 2, or be left away"), ({"bits": 5}, True, "bits = 5"),
    ({"keep_float": "x"}, False, "'keep_float' .* no 'bits'"),
    ({"quantized_unet": "x", "bits": 4}, False, "'bits' beside 'quantized_unet'"),
    ({"quantized_unet": "x", "keep_float": "x"}, True, "'keep_float' beside"),
    ({"nf4": True}, True, "'nf4' .* train-lora alone"), ({"lora": "x"}, True, "'lora' .*alone"),
])
def test_a_base_of_which_a_part_would_be_ignored(base, scales, match):
    from quanttune.host.command_checks import check_base
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=match) as caught:
        check_base("my.toml", base, scales)
    assert "my.toml" in str(caught.value) and "\n" not in str(caught.value)
    for good in ({"starter": True}, {"checkpoint": "x", "bits": 4, "keep_float": "x"},
                 {"starter": False, "checkpoint": "x", "quantized_unet": "x"}):
        check_base("my.toml", good, scales)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-scales", "train-lora"])
def test_pictures_of_the_prompts_are_in_the_runs_folder(command, tmp_path):
    text = GOOD if command == "train-scales" else LORA.replace("epochs = 2", "steps = 4")
    text = text.format(folder=tmp_path.as_posix(), base="bits = 4")
    text = text.replace("[training]", "[validation]\nprompts = ['a sks character', 'a red star']\n"
                        "size = 64\nsteps = 2\ncfg = 3\n[training]\npreview_every = 2")
    path = tmp_path / "config.toml"
    path.write_text(text)
    done = run(path, command)
    assert done.returncode == 0, done.stderr
    found = sorted((tmp_path / "run" / "previews").iterdir())
    assert [p.name for p in found] == [f"step-{i:06}.png" for i in (0, 2, 4)]
    with Image.open(found[0]) as first, Image.open(found[-1]) as last:
        assert first.size == (64, 128) and first.tobytes() != last.tobytes()


@pytest.mark.parametrize("output", [
    {"lora": "x" * 300}, {"lora": "x" * 245}, {"lora": "a\0b"}, {"folder": "x" * 300},
    {"folder": "a\0b"}, {"lora": "x" * 300 + "/a"}])
def test_names_that_are_none_are_told_in_a_sentence(output, tmp_path, comfy_inprocess,
                                                   monkeypatch):
    from quanttune.host.command import output_of
    from quanttune.quant import QuantTuneError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuantTuneError, match=r"\[output\] in c\.toml.*cannot be written") as told:
        output_of({"output": output}, "c.toml", "lora", "scales")
    assert "\n" not in str(told.value) and "\0" not in str(told.value)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_files_to_read_whose_names_are_none(name, comfy_inprocess):
    from quanttune.host.command import load_float
    from quanttune.host.lora_file import read_lora
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="is not there"):
        load_float({"checkpoint": name})
    with pytest.raises(QuantTuneError, match="cannot be read"):
        read_lora(name)


def test_output_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "config.toml"
    path.write_text("[base]\nstarter=true\n[[images]]\nfolder='starter: pip'\n[output]\n"
                    f"folder='{(tmp_path / 'file' / 'run').as_posix()}'\n")
    done = run(path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written" in done.stderr and "step 1" not in done.stdout


@pytest.mark.parametrize("text,match", [
    ("[base]\ncheckpoint='{folder}/none.safetensors'", "none.safetensors.? is not there"),
    ("[base]\ncheckpoint='{folder}/config.toml'", "config.toml is no checkpoint"),
    ("[base]\nstarter=true\nbits=5", "5"),
    ("[base]\nstarter=true\ndevice='tpu'", "tpu"),
])
def test_bad_bases(text, match, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(text.format(folder=tmp_path.as_posix())
                    + "\n[[images]]\nfolder='starter: pip'\n[output]\n")
    done = run(path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(match, done.stderr.strip().splitlines()[-1]), done.stderr
