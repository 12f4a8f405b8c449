"""A conversion never writes over what it reads, whatever that is called."""

import json
import os

import pytest

from quanttune.tests.host.unets import told


@pytest.fixture
def pipeline(comfy_inprocess, tmp_path):
    """Files where those of a pipeline are, and a blob that one of them is a link to."""
    folder = tmp_path / "model"
    for name in ("unet/config.json", "unet/a.safetensors", "vae/b.safetensors", "c.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine")
    (tmp_path / "blob.safetensors").write_bytes(b"mine")
    (folder / "unet" / "d.safetensors").symlink_to(tmp_path / "blob.safetensors")
    return folder


def refused(out, *sources):
    from quanttune.host.convert_inputs import check_apart

    told("is a file that is read for it", check_apart, out, sources)
    assert out.read_bytes()[:4] in (b"mine", b'{"we')


def test_files_of_folders_and_links_to_them(pipeline, tmp_path):
    from quanttune.host.convert_inputs import check_apart

    other = tmp_path / "other.safetensors"
    other.write_bytes(b"")
    for source in (pipeline, pipeline / "unet"):
        refused(pipeline / "unet" / "a.safetensors", source)
        refused(tmp_path / "blob.safetensors", other, source)  # what a link inside leads to
        check_apart(other, [None, source])
        check_apart(pipeline / "new.safetensors", [source])
    link = tmp_path / "link.safetensors"
    link.symlink_to(pipeline / "c.safetensors")
    hard = tmp_path / "hard.safetensors"
    os.link(pipeline / "c.safetensors", hard)
    for out in (link, hard, pipeline / "unet" / ".." / "c.safetensors"):
        refused(out, pipeline)
        refused(out, None, pipeline / "c.safetensors")


def test_shards_and_what_lies_beside_a_state(pipeline, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "blob.safetensors"}}))
    refused(tmp_path / "blob.safetensors", index)
    refused(index, index)
    (pipeline / "tuneqdm_state.pt").write_bytes(b"mine")
    refused(pipeline / "unet" / "a.safetensors", pipeline / "tuneqdm_state.pt")


def test_every_writer_asks(pipeline, tmp_path):
    """The base of a state, the scales of an export and a UNet's folder: all before reading."""
    from argparse import Namespace

    from quanttune.host import convert_tuneqdm, convert_unet
    from quanttune.host.tuneqdm import export_tuneqdm
    from quanttune.quant import QuantSpec

    read = "is a file that is read for it"
    out, inside = tmp_path / "new.safetensors", pipeline / "unet" / "a.safetensors"
    state = tmp_path / "state.pt"
    state.write_bytes(b"mine")
    told(read, convert_unet.convert_unet, pipeline, inside, QuantSpec(4))
    for options in ({"out": inside}, {"out": out, "scales": inside}):
        told(read, convert_tuneqdm.convert, state, Namespace(base=pipeline, **options))
    told(read, export_tuneqdm, inside, state, state)
    assert inside.read_bytes() == state.read_bytes() == b"mine" and not out.exists()
