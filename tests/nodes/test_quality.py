"""Compare Images and Image Set Quality as the executor runs them."""

import json

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.host.models import projecting_clip, small_vision


@pytest.fixture
def nodes(comfy_inprocess, host_folders):
    from quanttune.host.folders import register_folders

    register_folders()
    (host_folders / "models" / "quanttune_metrics").mkdir(exist_ok=True)
    return pack_nodes()


def pictures(count=4, size=64, seed=0):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def shown(output):
    ui = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
    return json.dumps(ui, ensure_ascii=False).replace("\\n", "\n")


def backbone(path, change=None):
    """Random SqueezeNet weights under the names of torchvision."""
    import torchvision

    torch.manual_seed(0)
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save({**state, **(change or {})}, path)


def test_compare_images_with_and_without_lpips(nodes, host_folders):
    folder = host_folders / "models" / "quanttune_metrics"
    backbone(folder / "squeeze.pth")
    (folder / "notes.txt").write_text("not offered")
    node = nodes["QuantTuneCompareImages"]
    options = next(i for i in node.GET_SCHEMA().inputs if i.id == "lpips_network").options
    assert options == ["none", "squeeze.pth"]
    images, reference = pictures(), pictures(seed=1)
    output = run_node(node, images=images, reference=reference)
    picture, ssim, psnr, lpips, report = output.args
    assert picture.shape[0] == 1 and picture.shape[2] > 3 * 192
    assert 0 < ssim < 0.5 and 0 < psnr < 20 and lpips == -1
    assert report in shown(output) and "images" in shown(output)
    output = run_node(node, images=images, reference=reference, lpips_network="squeeze.pth")
    assert output.args[1:3] == (ssim, psnr) and 0 < output.args[3] < 5
    assert "LPIPS: SqueezeNet 1.1." in output.args[4]
    assert all(isinstance(v, float) for v in output.args[1:4])


def test_a_replaced_network_is_read_again(nodes, host_folders):
    path = host_folders / "models" / "quanttune_metrics" / "squeeze.pth"
    backbone(path)
    node = nodes["QuantTuneCompareImages"]
    before = node.fingerprint_inputs(lpips_network="squeeze.pth", amplify=4.0)
    assert before == node.fingerprint_inputs(lpips_network="squeeze.pth")
    with open(path, "ab") as file:
        file.write(b"x")
    assert before != node.fingerprint_inputs(lpips_network="squeeze.pth")
    assert node.fingerprint_inputs() == node.fingerprint_inputs(lpips_network="none") == ""


def test_bad_networks_of_compare_images(nodes, host_folders):
    from quanttune.quant import QuantTuneError

    folder = host_folders / "models" / "quanttune_metrics"
    node = nodes["QuantTuneCompareImages"]
    (folder / "text.pth").write_text("hello")
    backbone(folder / "wrong.pth", {"features.3.squeeze.weight": torch.zeros(1)})
    for name, match in (("gone.pth", "models/quanttune_metrics"), ("text.pth", "damaged"),
                        ("wrong.pth", "wrong shape")):
        with pytest.raises(QuantTuneError, match=match) as caught:
            run_node(node, images=pictures(), reference=pictures(), lpips_network=name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    backbone(folder / "squeeze.pth")
    with pytest.raises(QuantTuneError, match="at least 17 x 17"):
        run_node(node, images=pictures(2, 16), reference=pictures(2, 16),
                 lpips_network="squeeze.pth")


def test_the_starter_measures_its_subjects_with_nothing_downloaded(nodes):
    node = nodes["QuantTuneImageSetQuality"]
    output = run_node(node, folder="starter: pip", reference_folder="starter: crest")
    fid, kid, score, likeness, text, report = output.args
    assert fid > 0 and score >= 1 and 0 < likeness < 1 and text == -1
    assert "6 images, 6 reference images" in report and report in shown(output)
    same = run_node(node, folder="starter: pip", reference_folder="starter: pip").args
    assert same[0] < 1e-4 < fid and same[3] > likeness


def test_all_measures_of_a_vision_model(nodes, tmp_path):
    with torch.inference_mode():
        clip, vision = projecting_clip(), small_vision(tmp_path)
    output = run_node(nodes["QuantTuneImageSetQuality"], network="CLIP vision input",
                      images=pictures(), reference=pictures(5, 70, 1), clip_vision=vision,
                      clip=clip, captions="a red star\na blue circle")
    fid, kid, score, likeness, text, report = output.args
    assert fid > 0 and score == -1 and -1 < text < 1 and "CLIP-I" in report and "CLIP-T" in report
    assert all(isinstance(v, float) for v in output.args[:5])


def test_a_folder_that_changed_is_measured_again(nodes, host_folders):
    from PIL import Image

    folder = host_folders / "input" / "set"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    node = nodes["QuantTuneImageSetQuality"]
    before = node.fingerprint_inputs(network="starter classifier", folder="set")
    assert before == node.fingerprint_inputs(folder="set", reference_folder=" ")
    Image.new("RGB", (16, 16)).save(folder / "b.png")
    assert before != node.fingerprint_inputs(folder="set")


@pytest.mark.server
def test_on_the_real_server(comfy_server):
    """Both alone in a graph, shown in the node, measured once, and an error in its node."""
    from quanttune.devtools.client import RunFailed

    def grey(value):
        return {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 2,
                                                       "color": value * 0x010101}}

    graph = {
        "a": grey(100), "b": grey(110),
        "compare": {"class_type": "QuantTuneCompareImages",
                    "inputs": {"images": ["a", 0], "reference": ["b", 0]}},
        "set": {"class_type": "QuantTuneImageSetQuality",
                "inputs": {"network": "starter classifier", "folder": "starter: pip",
                           "reference_folder": "starter: crest", "captions": ""}},
    }
    comfy_server.forget_results()
    history, events = comfy_server.queue(graph)
    assert {"compare", "set"} <= {e["data"]["node"] for e in events if e["type"] == "progress"}
    assert "28.13" in history["outputs"]["compare"]["text"][0], "20 log10(255 / 10) dB"
    assert len(history["outputs"]["compare"]["images"]) == 1
    assert "6 images, 6 reference images" in history["outputs"]["set"]["text"][0]
    _, events = comfy_server.queue(graph)
    assert not [e for e in events if e["type"] == "progress"], "nothing changed"
    graph["set"]["inputs"]["reference_folder"] = "nowhere"
    with pytest.raises(RunFailed, match="'nowhere' is not there") as caught:
        comfy_server.queue(graph)
    assert caught.value.node_id == "set"
