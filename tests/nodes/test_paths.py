"""Names of files and folders in nodes' inputs: none of them leads where it should not."""

import os
from pathlib import Path

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.harness.inprocess import pack_nodes, run_node

SAVE, RUN, LOAD, FOLDER = "save", "run", "load", "folder"
NAMES = {
    ("QuantTuneSaveQuantizedUNet", "filename_prefix"): SAVE,
    ("QuantTuneSaveForStock", "filename_prefix"): SAVE,
    ("QuantTuneSaveScales", "filename_prefix"): SAVE,
    ("QuantTuneSaveLora", "filename_prefix"): SAVE,
    ("QuantTuneSaveReport", "filename_prefix"): SAVE,
    ("QuantTuneExportUNet", "filename_prefix"): SAVE,
    ("QuantTuneTrainScales", "run_name"): RUN,
    ("QuantTuneLoraTrain", "run_name"): RUN,
    ("QuantTuneTrainQat", "run_name"): RUN,
    ("QuantTuneLoadQuantizedUNet", "unet_name"): LOAD,
    ("QuantTuneLoadScales", "scale_name"): LOAD,
    ("QuantTuneApplyScales", "scale_name"): LOAD,
    ("QuantTuneLoadLora", "lora_name"): LOAD,
    ("QuantTuneLoadUpscaler", "upscaler"): LOAD,
    ("QuantTuneLoadDiffusersUNet", "unet"): LOAD,
    ("QuantTuneCompareImages", "lpips_network"): LOAD,
    ("QuantTuneTrainingImages", "folder"): FOLDER,
    ("QuantTuneTrainingImages", "folder_path"): FOLDER,
    ("QuantTuneClassImages", "folder_path"): FOLDER,
    ("QuantTuneImageSetQuality", "folder"): FOLDER,
    ("QuantTuneImageSetQuality", "reference_folder"): FOLDER,
}
"""Inputs that name a file or folder, and what for."""
WORDS = {
    "prompt", "prompts", "negative_prompt", "class_prompt", "validation_prompts", "phrase",
    "caption_column", "captions", "names", "plan", "budget", "budgets", "time_budgets", "kind",
    "keep_float", "pattern", "range", "bits", "rounding", "sampler_name", "scheduler", "layers",
    "precision", "granularity", "ranges", "format", "dtype", "network", "unit", "if_run_exists",
    "base", "targets", "optimizer", "tracker", "weighting", "preset", "fit", "layer", "title",
    "note", "headings", "report_a", "report_b", "report_c", "report_d", "csv",
}
"""Inputs of other texts and choices: nothing is opened by what they say."""
HOSTILE = ["../x", "../../etc/passwd", "a/../../x", "/etc/x", "..\\x", "a\\..\\..\\x", "C:\\x",
           "C:/x", "\\\\server\\x", "a\0b", "\0", "~/x", "", " ", "..", "a\nb", "CON", "a/nul.txt",
           "com1", "name.", "name ", "a./b", "x" * 5000, "é" * 120, "\u202egpj.exe", "\ud800",
           "a:b", "a*b", "a|b", "//x"]


@pytest.fixture(scope="module", autouse=True)
def nodes(comfy_inprocess):
    """All of the pack, whose folders the host then knows."""
    return pack_nodes()


def test_every_text_and_choice_is_known(nodes):
    unknown = []
    for node_id, node in nodes.items():
        for entry in node.GET_SCHEMA().inputs:
            if entry.get_io_type() in ("STRING", "COMBO") and (
                    (node_id, entry.id) not in NAMES and entry.id not in WORDS):
                unknown.append((node_id, entry.id))
    assert not unknown, "put them into NAMES if they name a file or folder, else into WORDS"


def test_the_list_is_of_inputs_that_there_are(nodes):
    there = {(n, e.id) for n, node in nodes.items() for e in node.GET_SCHEMA().inputs}
    assert NAMES.keys() <= there


@pytest.fixture(scope="module")
def model(nodes):
    from quanttune.tests.host import models

    with torch.inference_mode():
        return models.quantize(models.small_model(), 4)[0]


@pytest.fixture(scope="module")
def given(model, nodes):
    """What each node needs beside the name."""
    from quanttune.host.lora_file import LoraWeights
    from quanttune.quant import ScaleSet
    from quanttune.tests.host import models
    from quanttune.tests.host.lora_models import exported

    picture = torch.rand(2, 64, 64, 3)
    with torch.inference_mode():
        lora = LoraWeights(exported(models.small_model())[1])
    train = {"latents": {"samples": torch.zeros(1, 4, 8, 8)},
             "conditioning": [[torch.zeros(1, 7, 24), {}]], "model": model}
    return nodes, {
        "QuantTuneSaveQuantizedUNet": {"model": model}, "QuantTuneSaveForStock": {"model": model},
        "QuantTuneSaveScales": {"scales": ScaleSet.identity({"a": (2, 2)}, 1)},
        "QuantTuneSaveLora": {"lora": lora}, "QuantTuneSaveReport": {"report_a": "words"},
        "QuantTuneExportUNet": {"model": model}, "QuantTuneApplyScales": {"model": model},
        "QuantTuneLoadLora": {"model": model},
        "QuantTuneCompareImages": {"images": picture, "reference": picture},
        "QuantTuneTrainingImages": {"folder": "(folder below)", "captions": "none"},
        "QuantTuneClassImages": {"model": model, "clip": None, "vae": None},
        "QuantTuneImageSetQuality": {"images": picture, "reference": picture},
        "QuantTuneTrainScales": train, "QuantTuneLoraTrain": train,
        "QuantTuneTrainQat": {"model": model, "reference": models.small_model(),
                              "latent": train["latents"], "positive": train["conditioning"]},
    }


def call(given, node_id, name_of, name):
    """Run a node with the name in this input."""
    node = given[0][node_id]
    known = {e.id for e in node.GET_SCHEMA().inputs}
    inputs = {k: v for k, v in given[1].get(node_id, {}).items() if k in known}
    return run_node(node, **{**inputs, name_of: name})


def everything(folder):
    """All files below a folder."""
    return {p for p in Path(folder).rglob("*") if not p.is_dir()}


def sentence(error, name):
    text = str(error)
    assert "\n" not in text and text.endswith((".", ".)")) and len(text) < 1600, text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", HOSTILE, ids=lambda n: ascii(n[:12]))
@pytest.mark.parametrize("where", [k for k, v in NAMES.items() if v in (SAVE, RUN)],
                         ids=lambda k: "-".join(k))
def test_nothing_is_written_under_a_hostile_name(where, name, given, host_folders):
    with pytest.raises(QuantTuneError) as caught:
        call(given, *where, name)
    sentence(caught.value, name)
    assert "name" in str(caught.value)
    assert not everything(host_folders) and not Path("/etc/x.safetensors").exists()


@pytest.mark.parametrize("name", HOSTILE, ids=lambda n: ascii(n[:12]))
@pytest.mark.parametrize("where", [k for k, v in NAMES.items() if v in (LOAD, FOLDER)],
                         ids=lambda k: "-".join(k))
def test_nothing_is_read_under_a_hostile_name(where, name, given, host_folders):
    secret = host_folders.parent / "x"
    secret.write_text("a secret")
    if NAMES[where] == FOLDER and name.strip() in ("", ".."):
        pytest.skip("empty means none here, and any folder's pictures may be read")
    with pytest.raises(QuantTuneError) as caught:
        call(given, *where, name)
    sentence(caught.value, name)
    assert "a secret" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
class TestLinks:
    def test_loads_follow_them(self, host_folders, given, model):
        import folder_paths

        from quanttune.host.save import save_model

        kept = host_folders.parent / f"{host_folders.name}-elsewhere"
        kept.mkdir()
        path = Path(save_model(model, "m")[0])
        os.rename(path, kept / "m.safetensors")
        os.symlink(kept, Path(folder_paths.get_folder_paths("quanttune")[0]) / "linked")
        assert call(given, "QuantTuneLoadQuantizedUNet", "unet_name", "linked/m.safetensors").args

    @pytest.mark.parametrize("where", [k for k, v in NAMES.items() if v == SAVE],
                             ids=lambda k: "-".join(k))
    def test_saves_do_not(self, where, host_folders, given):
        kept = host_folders.parent / f"{host_folders.name}-elsewhere"
        kept.mkdir(exist_ok=True)
        os.symlink(kept, host_folders / "output" / "linked")
        with pytest.raises(QuantTuneError, match="output folder"):
            call(given, *where, "linked/x")
        assert not everything(kept)

    def test_runs_do_not(self, host_folders):
        from quanttune.host.run import RUNS, run_folder

        kept = host_folders.parent / f"{host_folders.name}-elsewhere"
        kept.mkdir(exist_ok=True)
        (host_folders / "output" / RUNS).mkdir()
        os.symlink(kept, host_folders / "output" / RUNS / "mine")
        with pytest.raises(QuantTuneError, match="leads out of the output folder"):
            run_folder("mine")


@pytest.mark.parametrize("listen,allowed", [
    ("127.0.0.1", True), ("localhost,::1", True), ("0.0.0.0,::", False), ("192.168.1.5", False)])
def test_full_paths_are_for_the_computers_own_user(listen, allowed, host_folders, monkeypatch):
    from PIL import Image

    from quanttune.host import images

    monkeypatch.setattr(images.args, "listen", listen)
    outside, inside = host_folders / "private", host_folders / "input" / "dogs"
    for folder in (outside, inside):
        folder.mkdir()
        Image.new("RGB", (64, 64)).save(folder / "a.png")
    assert images.folder_of("dogs") == inside
    for name in (str(outside), "../private"):
        if allowed:
            assert images.folder_of(name).samefile(outside)
        else:
            with pytest.raises(QuantTuneError, match="reached from other computers"):
                images.folder_of(name)
    with pytest.raises(QuantTuneError, match="is not there"):
        images.folder_of("starter: ../../quant")


@pytest.mark.parametrize("prefix,written", [
    ("a", "a_00001_.safetensors"), ("a/b", "a/b_00001_.safetensors"),
    ("a\\b", "a/b_00001_.safetensors"), ("ein Hund, groß", "ein Hund, groß_00001_.safetensors"),
    ("日本/語", "日本/語_00001_.safetensors"), (".hidden", ".hidden_00001_.safetensors")])
def test_ordinary_names_are_taken(prefix, written, host_folders):
    from quanttune.host.folders import output_path

    assert Path(output_path(prefix)) == host_folders / "output" / written
