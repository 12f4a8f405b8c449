"""The conversion without a browser against the real frontend, on a workflow with one of each."""

import pytest

from quanttune.devtools import jobs
from quanttune.devtools.graph import NeedsFrontend, to_api
from quanttune.tests.harness.browser import ARTIFACTS

pytestmark = [pytest.mark.server, pytest.mark.browser]

NODES = [
    (1, "CheckpointLoaderSimple", [], ["MODEL", "CLIP", "VAE"], ["some.safetensors"], 0),
    (2, "LoraLoaderModelOnly", [("model", "MODEL", 1)], ["MODEL"], ["a.safetensors", 0.5], 4),
    (3, "Reroute", [("", "*", 2)], ["MODEL"], [], 0),
    (4, "PrimitiveNode", [], ["STRING"], ["a {red} cat // no comment"], 0),
    (5, "CLIPTextEncode", [("clip", "CLIP", 3), ("text*", "STRING", 4)], ["CONDITIONING"], [""], 0),
    (6, "CLIPTextEncode", [("clip", "CLIP", 5)], ["CONDITIONING"], ["{one} /* two */dog"], 0),
    (7, "PrimitiveInt", [], ["INT"], [96, "fixed"], 0),
    (8, "EmptyLatentImage", [("width*", "INT", 6)], ["LATENT"], [512, 64, 1], 0),
    (
        9,
        "KSampler",
        [
            ("model", "MODEL", 7),
            ("positive", "CONDITIONING", 8),
            ("negative", "CONDITIONING", 9),
            ("latent_image", "LATENT", 10),
        ],
        ["LATENT"],
        [123456789012, "randomize", 7, 2.5, "ddim", "karras", 0.75],
        0,
    ),
    (10, "VAEDecode", [("samples", "LATENT", 11), ("vae", "VAE", 12)], ["IMAGE"], [], 0),
    (11, "SaveImage", [("images", "IMAGE", 13)], [], ["folder/name"], 0),
    (12, "PreviewImage", [("images", "IMAGE", 14)], [], [], 2),
    (13, "LoadImage", [], ["IMAGE", "MASK"], ["x.png", "image"], 0),
    (14, "ImageScaleBy", [("image", "IMAGE", 15)], ["IMAGE"], ["lanczos", 2.0], 0),
    (15, "PreviewImage", [("images", "IMAGE", 16)], [], [], 0),
    (16, "Note", [], [], ["words"], 0),
    (17, "MarkdownNote", [], [], ["*words*"], 0),
    (18, "LoadImage", [], ["IMAGE", "MASK"], ["y.png", "image"], 2),
    (19, "ImageInvert", [("image", "IMAGE", 17)], ["IMAGE"], [], 0),
    (20, "PreviewImage", [("images", "IMAGE", 18)], [], [], 0),
]
LINKS = [
    (1, 1, 0, 2, 0, "MODEL"),
    (2, 2, 0, 3, 0, "MODEL"),
    (3, 1, 1, 5, 0, "CLIP"),
    (4, 4, 0, 5, 1, "STRING"),
    (5, 1, 1, 6, 0, "CLIP"),
    (6, 7, 0, 8, 0, "INT"),
    (7, 3, 0, 9, 0, "MODEL"),
    (8, 5, 0, 9, 1, "CONDITIONING"),
    (9, 6, 0, 9, 2, "CONDITIONING"),
    (10, 8, 0, 9, 3, "LATENT"),
    (11, 9, 0, 10, 0, "LATENT"),
    (12, 1, 2, 10, 1, "VAE"),
    (13, 10, 0, 11, 0, "IMAGE"),
    (14, 10, 0, 12, 0, "IMAGE"),
    (15, 13, 0, 14, 0, "IMAGE"),
    (16, 14, 0, 15, 0, "IMAGE"),
    (17, 18, 0, 19, 0, "IMAGE"),
    (18, 19, 0, 20, 0, "IMAGE"),
]


def one_of_each():
    nodes = []
    for id_, kind, inputs, outputs, values, mode in NODES:
        slots = []
        for name, type_, link in inputs:
            slot = {"name": name.rstrip("*"), "type": type_, "link": link}
            if name.endswith("*"):
                slot["widget"] = {"name": slot["name"]}
            slots.append(slot)
        outs = []
        for index, type_ in enumerate(outputs):
            used = [link[0] for link in LINKS if link[1:3] == (id_, index)]
            outs.append({"name": type_, "type": type_, "links": used, "slot_index": index})
            if kind == "PrimitiveNode":
                outs[-1]["widget"] = {"name": "text"}
        place = [(id_ - 1) % 5 * 380, (id_ - 1) // 5 * 320]
        nodes.append(
            {"id": id_, "type": kind, "pos": place, "size": [320, 240], "flags": {}, "order": id_,
             "mode": mode, "inputs": slots, "outputs": outs, "properties": {},
             "widgets_values": values}
        )  # fmt: skip
    return {
        "last_node_id": 20, "last_link_id": 18, "nodes": nodes, "links": [list(x) for x in LINKS],
        "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def test_one_of_each_converts_as_in_the_frontend(frontend_page, comfy_server):
    workflow = one_of_each()
    frontend_page.load(workflow)
    expected = frontend_page.graph_to_prompt()["output"]
    frontend_page.screenshot(ARTIFACTS / "one-of-each.png")
    converted = to_api(workflow, comfy_server.client.object_info())
    assert converted.keys() == expected.keys()
    for id_, entry in expected.items():
        assert converted[id_]["inputs"] == entry["inputs"], entry["class_type"]
        assert converted[id_]["class_type"] == entry["class_type"]


def test_what_the_conversion_cannot_do_is_left_to_the_frontend(
    browser_context, comfy_server, monkeypatch, capsys
):
    def refuse(*_):
        raise NeedsFrontend("The workflow has a subgraph.")

    info = comfy_server.client.object_info()
    expected = to_api(one_of_each(), info)
    monkeypatch.setattr(jobs, "to_api", refuse)
    found = jobs._to_graph(comfy_server, one_of_each(), info)
    assert {i: n["inputs"] for i, n in found.items()} == {
        i: n["inputs"] for i, n in expected.items()
    }
    assert "subgraph" in capsys.readouterr().out
