"""`python -m quanttune convert`: what it writes, and the sentences it refuses with."""

import json
import os
import struct

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.quant.qdiffusion_files import UNET, expected_codes, synthetic


@pytest.fixture
def command(comfy_inprocess, capsys):
    """Runs the command line; returns its status and what it printed."""
    from quanttune.__main__ import main

    def run(*words):
        status = main(["convert", *map(str, words)])
        told = capsys.readouterr()
        return status, told.out + told.err

    return run


@pytest.fixture
def starter(comfy_inprocess, tmp_path):
    from quanttune.starter.qdiffusion_file import write_qdiffusion_starter

    path = tmp_path / "starter.pth"
    write_qdiffusion_starter(path)
    return path


def test_a_stable_diffusion_file_becomes_one_that_the_node_loads(command, starter, tmp_path):
    from quanttune.host.build import load_model

    out = tmp_path / "new" / "ours.safetensors"
    status, told = command(starter, out)
    assert status == 0, told
    assert "4 bits: 120 layers, 6 of them split" in told and "Family SD15" in told
    with torch.inference_mode():
        own = models.quantized_model(load_model(str(out)))
        imported = models.quantized_model(load_model(str(starter)))
    assert own.fingerprint == imported.fingerprint
    assert own.checkpoint.metadata.provenance["format"] == "q-diffusion"
    for name, value in imported.checkpoint.floats.items():
        assert torch.equal(own.checkpoint.floats[name], value), name


def test_files_of_models_that_comfyui_does_not_have_are_converted_too(command, tmp_path):
    from quanttune.quant import load_quantized_unet

    shapes = {"conv_in": ((8, 3, 3, 3), None),
              "up.1.block.0.nin_shortcut": ((8, 24, 1, 1), 16)}
    state = synthetic(8, shapes)
    source, out = tmp_path / "cifar_w8a8_ckpt.pth", tmp_path / "cifar.safetensors"
    torch.save(state, source)
    status, told = command(source, out)
    assert status == 0 and "no model for" in told
    found = load_quantized_unet(out)
    assert found.metadata.family == "DDPM"
    for name, (_, split) in shapes.items():
        assert found.layers[name].split == split
        expected = expected_codes(state, name, 8).flatten(1)
        assert torch.equal(found.layers[name].codes().float(), expected)


def test_bits_are_told(command, tmp_path):
    from quanttune.quant import load_quantized_unet

    source, out = tmp_path / "a.pth", tmp_path / "a.safetensors"
    state = synthetic(3)
    for key in state:
        if key.endswith("delta"):
            state[key] /= 1.5
    torch.save(state, source)
    assert command(source, out, "--bits", "3")[0] == 0
    assert {w.bits for w in load_quantized_unet(out).layers.values()} == {3}
    status, told = command(source, out, "--bits", "8", "--overwrite")
    assert status == 1 and "cannot have 8 bits" in told
    assert load_quantized_unet(out).layers.keys() == UNET.keys(), "the old file is still whole"


def test_layers_of_another_width_are_told(command, tmp_path):
    source = tmp_path / "mixed.pth"
    state = synthetic(4)
    state["model.out.2.weight_quantizer.delta"] /= 40
    torch.save(state, source)
    status, told = command(source, tmp_path / "mixed.safetensors")
    assert status == 0 and "Careful: 1 layers" in told and "out.2" in told


def test_declared_bits_that_cut_weights_off_are_told(command, tmp_path):
    source, out = tmp_path / "four.pth", tmp_path / "four.safetensors"
    torch.save(synthetic(4), source)
    status, told = command(source, out, "--bits", "2")
    assert status == 1 and "cannot have 2 bits" in told and told.count("\n") == 1, told
    assert not out.exists()
    status, told = command(source, out, "--bits", "3")
    assert status == 0 and "Careful: With 3 bits" in told and "cut off" in told


def test_a_checkpoint_of_q_diffusion_from_before_torch_1_6(command, tmp_path):
    from quanttune.host.build import load_model
    from quanttune.quant import QuantTuneError

    source, out = tmp_path / "old.pth", tmp_path / "old.safetensors"
    torch.save(synthetic(4), source, _use_new_zipfile_serialization=False)
    status, told = command(source, out)
    assert status == 1 and told.count("\n") == 1, told
    assert "no checkpoint of a PyTorch since 1.6; load it with torch and save it again" in told
    with pytest.raises(QuantTuneError, match="since 1.6"):
        load_model(str(source))


def test_targets_are_refused_before_anything_is_read(command, tmp_path):
    source = tmp_path / "a.pth"
    torch.save(synthetic(4), source)
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"mine")
    for words, what in (((source, out), "exists already"), ((source, source), "both"),
                        ((source, tmp_path / "b.pth"), "does not end in .safetensors"),
                        ((source, tmp_path / f"{'x' * 300}.safetensors"), "too long"),
                        ((tmp_path / "absent.pth", out), "does not exist")):
        status, told = command(*words)
        assert status == 1 and what in told and told.startswith("Error: ")
        assert told.count("\n") == 1
    assert out.read_bytes() == b"mine"
    assert command(source, out, "--overwrite")[0] == 0
    header = out.read_bytes()
    length = struct.unpack("<Q", header[:8])[0]
    assert json.loads(header[8:8 + length])["__metadata__"]["format"] == "pt"


def test_sources_of_no_known_kind_are_told(command, tmp_path):
    out = tmp_path / "a.safetensors"
    ordinary, text, cut = (tmp_path / name for name in ("v1.ckpt", "a.txt", "cut.pth"))
    torch.save({"a": torch.ones(2)}, ordinary)
    text.write_text("hello")
    torch.save(synthetic(4), cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    for source, what in ((ordinary, "not a checkpoint of Q-Diffusion"), (text, "none that can be"),
                         (cut, "cut short"), (tmp_path, "none that can be")):
        status, told = command(source, out)
        assert status == 1 and what in told and told.count("\n") == 1, told
    assert not out.exists()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        status, told = command(tmp_path / "pipe.pth", out)
        assert status == 1 and "neither a file nor a folder" in told


def test_a_kind_is_a_row(command, tmp_path, monkeypatch):
    """Others add theirs to the table; the first that knows the source converts it."""
    from quanttune.host import convert_command

    def converted(path, options):
        return f"read {path} for {options.out} with {options.bits}"

    row = convert_command.Kind("a text", lambda path: path.endswith(".txt"), converted,
                               frozenset({"bits"}))
    monkeypatch.setattr(convert_command, "KINDS", (*convert_command.KINDS, row))
    source = tmp_path / "a.txt"
    source.write_text("hello")
    status, told = command(source, tmp_path / "out", "--bits", "4")
    assert status == 0 and told == f"read {source} for {tmp_path / 'out'} with 4\n"


def test_a_float_unet_of_ours_is_an_ordinary_one(command, tmp_path, monkeypatch):
    """What *Export Float UNet* writes is no quantized file: it converts and loads as others do."""
    from quanttune.host.export_unet import export_unet
    from quanttune.host.unet_source import open_unet

    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():
        path = export_unet(models.small_model(), "ComfyUI file", "float32", "merged")[1]
    assert open_unet(path).metadata.family == "SD15"
    status, told = command(path, tmp_path / "small.safetensors", "--bits", 4)
    assert status == 0 and "4 bits" in told, told


@pytest.mark.parametrize("words, told", [
    (("--symmetric",), "--symmetric does nothing for a checkpoint of Q-Diffusion"),
    (("--scales", "x.safetensors"), "--scales does nothing for"),
])
def test_an_option_that_would_do_nothing_is_refused(command, starter, tmp_path, words, told):
    status, said = command(starter, tmp_path / "a.safetensors", *words)
    assert status == 1 and told in said
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("change, told", [
    (lambda state: state.pop("model.out.2.bias"), "out.2.bias"),
    (lambda state: state.update({"model.out.0.weight": torch.zeros(7)}), "out.0.weight"),
    (lambda state: state.update({"model.betas": torch.zeros(1000)}), "betas"),
])
def test_what_the_node_would_refuse_is_not_written(command, starter, tmp_path, change, told):
    state = torch.load(starter, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    status, said = command(tmp_path / "changed.pth", tmp_path / "a.safetensors")
    assert status == 1 and told in said, said
    assert not (tmp_path / "a.safetensors").exists()
