"""Training Images and Augment Training Images as the executor runs them."""

import json

import pytest
import torch
from PIL import Image

from quanttune.quant import QuantTuneError
from quanttune.tests.harness.inprocess import pack_nodes, run_node


@pytest.fixture
def nodes(host_folders):
    return pack_nodes()


@pytest.fixture
def folder(host_folders):
    path = host_folders / "input" / "faces"
    path.mkdir()
    rows = []
    for i, size in enumerate(((64, 64), (64, 64), (60, 100))):
        Image.new("RGB", size, (60 * i, 90, 120)).save(path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "en": f"a sks face, {i}"}))
    rows.append(json.dumps({"file_name": "gone.png", "en": "x"}))
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


def test_a_list_a_column_a_limit_and_buckets(nodes, folder):
    node = nodes["QuantTuneTrainingImages"]
    chosen = {"folder": "faces", "captions": "metadata.jsonl", "resolution": 64,
              "fit": "keep shape", "caption_column": "en"}
    output = run_node(node, **chosen)
    images, sheet, report = output.args
    assert images.captions == ("a sks face, 0", "a sks face, 1", "a sks face, 2")
    assert images.subject == "a sks face" and sheet.shape[0] == 1
    assert report.splitlines() == [
        "3 images", "buckets: 64x64: 2, 48x80: 1",
        "A batch holds pictures of one bucket; where a bucket has fewer, they repeat in it.",
        "metadata.jsonl, line 4, was left out: there is no picture gone.png"]
    assert output.ui["text"] == (report,)
    assert run_node(node, **chosen, limit=2).args[2] == "2 images"
    with pytest.raises(QuantTuneError, match="has no column 'text', only 'file_name', 'en'"):
        run_node(node, **{**chosen, "caption_column": "text"})


def test_the_node_runs_again_when_the_list_changes(nodes, folder):
    state = nodes["QuantTuneTrainingImages"].fingerprint_inputs
    before = state(folder="faces", captions="metadata.jsonl")
    assert state(folder="faces", captions="metadata.jsonl") == before
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n")
    assert state(folder="faces", captions="metadata.jsonl") != before


def test_augmented_images_go_on_to_training(nodes):
    images = run_node(nodes["QuantTuneTrainingImages"], folder="starter: pip",
                      resolution=128).args[0]
    chosen = {"images": images, "copies": 3, "seed": 4}
    found, sheet, report = run_node(nodes["QuantTuneAugmentImages"], **chosen).args
    assert len(found.images) == 18 and report == "18 images" and sheet.shape[0] == 1
    assert found.subject == images.subject and found.captions[3] == images.captions[1]
    assert all(torch.equal(a, b) for a, b in zip(found.images[::3], images.images))
    again = run_node(nodes["QuantTuneAugmentImages"], **chosen).args[0]
    assert all(torch.equal(a, b) for a, b in zip(found.images, again.images))


def test_augmenting_can_be_interrupted(nodes):
    from comfy.model_management import (
        InterruptProcessingException,
        interrupt_current_processing,
    )

    images = run_node(nodes["QuantTuneTrainingImages"], folder="starter: pip",
                      resolution=128).args[0]
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        run_node(nodes["QuantTuneAugmentImages"], images=images)
