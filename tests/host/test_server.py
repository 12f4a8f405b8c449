"""The main job on the real server: HTTP and websocket, errors in the node, interrupt."""

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from quanttune.devtools.client import RunFailed
from quanttune.tests.harness.server import check_pictures

pytestmark = pytest.mark.server
STARTER = Path(__file__).resolve().parents[2] / "starter"


def graph(model, steps=2, seed=1, batch=1):
    """Sampling with ``model`` (a link) from the starter's text encoder to a picture."""
    return {
        "starter": {"class_type": "QuantTuneLoadStarterModel", "inputs": {}},
        "pos": {"class_type": "CLIPTextEncode",
                "inputs": {"clip": ["starter", 1], "text": "a red star on a blue background"}},
        "neg": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["starter", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage",
                   "inputs": {"width": 128, "height": 128, "batch_size": batch}},
        "sample": {"class_type": "KSampler",
                   "inputs": {"model": model, "positive": ["pos", 0], "negative": ["neg", 0],
                              "latent_image": ["latent", 0], "seed": seed, "steps": steps,
                              "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
                              "denoise": 1.0}},
        "decode": {"class_type": "VAEDecode",
                   "inputs": {"samples": ["sample", 0], "vae": ["starter", 2]}},
        "image": {"class_type": "SaveImage",
                  "inputs": {"images": ["decode", 0], "filename_prefix": "test"}},
    }


def quantize(bits="4", **inputs):
    return {"class_type": "QuantTuneQuantizeUNet",
            "inputs": {"model": ["starter", 0], "bits": bits, "range": "minmax",
                       "symmetric": False, "keep_float": "none", "pattern": "",
                       "split_shortcuts": True, **inputs}}


def test_quantize_save_load_and_sample(comfy_server):
    first = graph(["q", 0]) | {
        "q": quantize(),
        "save": {"class_type": "QuantTuneSaveQuantizedUNet",
                 "inputs": {"model": ["q", 0], "filename_prefix": "quanttune/server"}},
    }
    comfy_server.forget_results()
    history, events = comfy_server.queue(first)
    # One bar for quantizing, one for sampling.
    assert {"q", "sample"} <= {e["data"]["node"] for e in events if e["type"] == "progress"}
    assert "layers quantized" in str(history["outputs"]["q"])
    assert "server_00001_.safetensors" in str(history["outputs"]["save"])
    check_pictures(comfy_server.pictures(history), ["image"])

    listed = comfy_server.client.object_info()["QuantTuneLoadQuantizedUNet"]
    assert "server_00001_.safetensors" in str(listed["input"]["required"]["unet_name"])
    second = graph(["load", 0]) | {
        "load": {"class_type": "QuantTuneLoadQuantizedUNet",
                 "inputs": {"unet_name": "server_00001_.safetensors"}}}
    again, _ = comfy_server.queue(second)
    a, b = (comfy_server.pictures(h)["image"][0] for h in (history, again))
    assert (a == b).all()


def test_two_differently_scaled_clones_in_one_graph(comfy_server):
    scales = "starter-pip.safetensors"

    def apply(strength):
        return {"class_type": "QuantTuneApplyScales",
                "inputs": {"model": ["load", 0], "scale_name": scales, "strength": strength}}

    load = {"load": {"class_type": "QuantTuneLoadQuantizedUNet",
                     "inputs": {"unet_name": "starter-4bit.safetensors"}}}
    together = graph(["one", 0]) | load | {"one": apply(1.0), "half": apply(0.5)}
    together["sample2"] = {"class_type": "KSampler",
                           "inputs": {**together["sample"]["inputs"], "model": ["half", 0]}}
    together["decode2"] = {"class_type": "VAEDecode",
                           "inputs": {"samples": ["sample2", 0], "vae": ["starter", 2]}}
    together["image2"] = {"class_type": "SaveImage",
                          "inputs": {"images": ["decode2", 0], "filename_prefix": "test"}}
    pictures = comfy_server.pictures(comfy_server.queue(together)[0])
    alone = [comfy_server.pictures(comfy_server.queue(
        graph(["one", 0], seed=1) | load | {"one": apply(s)})[0])["image"][0] for s in (1.0, 0.5)]
    assert (pictures["image"][0] == alone[0]).all()
    assert (pictures["image2"][0] == alone[1]).all()
    assert abs(alone[0] - alone[1]).max() > 0.02


def test_a_broken_file_is_an_error_in_its_node_and_nothing_else(comfy_server):
    folder = comfy_server.folder / "models" / "quanttune"
    folder.mkdir(parents=True, exist_ok=True)
    data = (STARTER / "quanttune" / "starter-4bit.safetensors").read_bytes()
    (folder / "broken.safetensors").write_bytes(data[: len(data) // 2])
    broken = graph(["load", 0]) | {
        "load": {"class_type": "QuantTuneLoadQuantizedUNet",
                 "inputs": {"unet_name": "broken.safetensors"}}}
    with pytest.raises(RunFailed, match=r"broken\.safetensors"):
        comfy_server.queue(broken)
    history, _ = comfy_server.queue(graph(["q", 0], seed=5) | {"q": quantize("8")})
    check_pictures(comfy_server.pictures(history), ["image"])


@pytest.mark.parametrize("inputs,message", [
    ({"keep_float": "pattern", "pattern": "no_such_layer.*"}, "no_such_layer"),
    ({"bits": "5"}, "bits"),
])
def test_wrong_inputs_are_refused_by_name(comfy_server, inputs, message):
    with pytest.raises(RunFailed, match=message):
        comfy_server.queue(graph(["q", 0]) | {"q": quantize(**inputs)})


def test_strength_nan_is_refused(comfy_server):
    nan = graph(["one", 0]) | {
        "load": {"class_type": "QuantTuneLoadQuantizedUNet",
                 "inputs": {"unet_name": "starter-4bit.safetensors"}},
        "one": {"class_type": "QuantTuneApplyScales",
                "inputs": {"model": ["load", 0], "scale_name": "starter-pip.safetensors",
                           "strength": float("nan")}}}
    with pytest.raises(RunFailed, match=r"strength"):
        comfy_server.queue(nan)


def test_saving_outside_the_output_folder_is_refused(comfy_server):
    outside = graph(["q", 0]) | {
        "q": quantize(), "save": {"class_type": "QuantTuneSaveQuantizedUNet",
                                  "inputs": {"model": ["q", 0],
                                             "filename_prefix": "../../escaped"}}}
    with pytest.raises(RunFailed, match="output folder"):
        comfy_server.queue(outside)
    assert not list(comfy_server.folder.rglob("escaped*"))


def test_a_full_output_disk_leaves_no_partial_file(comfy_server):
    target = comfy_server.folder / "output" / "full"
    target.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("no mount command to make a small disk with")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)],
                          capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk: {made.stderr.strip()}")
    try:
        full = graph(["q", 0]) | {
            "q": quantize("8"), "save": {"class_type": "QuantTuneSaveQuantizedUNet",
                                         "inputs": {"model": ["q", 0],
                                                    "filename_prefix": "full/model"}}}
        with pytest.raises(RunFailed, match=r"(?s)model_00001_\.safetensors.*(space|full)"):
            comfy_server.queue(full)
        assert not list(target.iterdir())
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_interrupt_stops_sampling_and_the_next_run_is_unharmed(comfy_server):
    load = {"load": {"class_type": "QuantTuneLoadQuantizedUNet",
                     "inputs": {"unet_name": "starter-4bit.safetensors"}}}
    expected = comfy_server.pictures(comfy_server.queue(graph(["load", 0], seed=8) | load)[0])
    long_run = graph(["load", 0], steps=10_000, seed=9) | load
    outcome, sampling = [], threading.Event()

    def listen(event):
        if event["type"] == "progress" and event["data"]["node"] == "sample":
            sampling.set()

    def run():
        try:
            outcome.append(comfy_server.client.run(long_run, on_event=listen))
        except RunFailed as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert sampling.wait(300), "the run did not begin"
    comfy_server.client.interrupt()
    thread.join(timeout=240)
    assert not thread.is_alive() and isinstance(outcome[0], RunFailed)
    after = comfy_server.pictures(comfy_server.queue(graph(["load", 0], seed=8) | load)[0])
    assert not after or (after["image"][0] == expected["image"][0]).all()
    fresh = comfy_server.pictures(comfy_server.queue(graph(["load", 0], seed=10) | load)[0])
    check_pictures(fresh, ["image"])
