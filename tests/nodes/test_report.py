"""Save Report as the executor runs it."""

import json
from pathlib import Path

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.metrics.test_report import Page

TABLE = "| model | s |\n|---|---|\n| float | 1 |"


@pytest.fixture
def node(comfy_inprocess, host_folders):
    return pack_nodes()["QuantTuneSaveReport"]


def test_a_page_with_everything(node, host_folders):
    charts = torch.rand(2, 48, 64, 3), torch.rand(1, 20, 30, 3)
    output = run_node(node, title="My <model>", note="**Why** not", headings="Cost\n\nLoss",
                      report_a=TABLE, chart_a=charts[0], report_b="Just text", chart_c=charts[1],
                      csv="a,b\n1,2\n")
    path = Path(output.args[0])
    assert path == host_folders / "output" / "reports" / "quanttune_00001_.html"
    page = Page(path.read_text("utf-8"))
    assert [["model", "s"], ["float", "1"]] == page.rows
    assert [i["alt"] for i in page.all("img")] == ["Cost 1 of 2", "Cost 2 of 2", "Loss"]
    assert [a["download"] for a in page.all("a") if "download" in a] == ["table.csv"]
    assert "PyTorch" in page.text and "My <model>" in page.text and "Just text" in page.text
    text = output.ui["text"][0]
    assert text.startswith(f"Saved {path}\n") and "Just text" in text and TABLE in text
    assert len(output.ui["images"]) == 3


@pytest.mark.parametrize("channels,shown", [(1, "grey"), (2, "grey"), (4, "colour")])
def test_pictures_of_other_channels(node, host_folders, channels, shown):
    import folder_paths
    from PIL import Image

    values = torch.tensor([0.2, 0.6, 1.0, 0.5])[:channels].expand(1, 10, 12, channels)
    output = run_node(node, chart_a=values, format="Markdown")
    written, = Path(output.args[0].removesuffix("_.md") + "_files").glob("*.png")
    preview, = output.ui["images"]
    expected = (51, 51, 51) if shown == "grey" else (51, 153, 255)
    for path in (written, Path(folder_paths.get_temp_directory()) / preview["filename"]):
        assert Image.open(path).convert("RGB").getpixel((3, 3)) == expected


def test_halves_of_characters(node):
    half = "a \ud800 b"
    output = run_node(node, title=half, note=half, headings=half, report_a=half, csv=half,
                      format="both", chart_a=torch.zeros(1, 8, 8, 3))
    assert "a \ufffd b" in Path(output.args[0]).read_text("utf-8")
    assert output.ui["text"][0].encode()


def test_both_kinds_with_numbers_of_their_own(node, host_folders):
    for number in (1, 2):
        path = run_node(node, report_d="Text", chart_d=torch.rand(1, 8, 8, 3), format="both",
                        filename_prefix="deep/er/name").args[0]
        assert path.endswith(f"name_0000{number}_.html")
    names = sorted(p.name for p in (host_folders / "output" / "deep" / "er").iterdir())
    assert names == [f"name_0000{n}_{end}" for n in (1, 2) for end in (".html", ".md", "files")]


def test_pictures_alone_need_no_text(node):
    output = run_node(node, chart_b=torch.zeros(1, 8, 8, 3), format="Markdown")
    assert output.args[0].endswith(".md")
    output = run_node(node, report_a="Text alone")
    assert "images" not in output.ui


def test_the_graph_comes_along_unless_the_host_keeps_no_metadata(node, monkeypatch):
    from comfy.cli_args import args
    from comfy_api.latest import io

    workflow = {"nodes": [{"id": 1}]}
    hidden = {io.Hidden.unique_id: "1", io.Hidden.extra_pnginfo: {"workflow": workflow}}

    def saved():
        with torch.inference_mode():
            output = node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden}).EXECUTE_NORMALIZED(
                title="T", note="", headings="", report_a="x", filename_prefix="r",
                format="Markdown")
        folder = Path(output.args[0].removesuffix("_.md") + "_files")
        return sorted(folder.iterdir()) if folder.exists() else []

    path, = saved()
    assert path.name == "workflow.json" and json.loads(path.read_text()) == workflow
    monkeypatch.setattr(args, "disable_metadata", True)
    assert saved() == []


@pytest.mark.parametrize("inputs,match", [
    ({}, "nothing to report; connect"), ({"report_a": "  ", "csv": " "}, "nothing to report"),
    ({"report_a": "x", "filename_prefix": "../out"}, "'../out' points outside"),
    ({"report_a": "x", "filename_prefix": "a/../../b"}, "outside the output folder"),
    ({"report_a": "x", "filename_prefix": "/etc/x"}, "outside the output folder"),
    ({"report_a": "x", "filename_prefix": " "}, "empty"),
    ({"report_a": "x", "filename_prefix": "a\0b"}, "NUL"),
    ({"report_a": "x", "filename_prefix": "a\ud800b"}, "half a character"),
    ({"report_a": "x", "filename_prefix": "a" * 400}, "is too long"),
    ({"report_a": "x", "filename_prefix": "a" * 400, "format": "Markdown"}, "is too long"),
    ({"report_a": "x", "filename_prefix": "a" * 236, "format": "Markdown",
      "chart_a": torch.zeros(1, 8, 8, 3)}, "is too long"),
    ({"report_a": "x", "filename_prefix": f"{'a' * 400}/b"}, "is too long"),
    ({"report_a": "x", "format": "PDF"}, "format is 'PDF'"),
])
def test_refusals(node, host_folders, inputs, match):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=match) as caught:
        run_node(node, **inputs)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    assert not [p for p in host_folders.rglob("*") if p.suffix in (".html", ".md", ".tmp")]


def test_a_full_disk_is_one_sentence(node, host_folders, monkeypatch):
    import errno
    import os

    from quanttune.quant import QuantTuneError

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(QuantTuneError, match="disk is full"):
        run_node(node, report_a="x", chart_a=torch.rand(1, 8, 8, 3), format="both")
    monkeypatch.undo()
    assert not any(p.is_file() for p in (host_folders / "output").rglob("*"))


@pytest.mark.server
def test_on_the_real_server(comfy_server):
    """In a graph: the path goes on, the text is shown, and a name outside is refused in its
    node."""
    from quanttune.devtools.client import RunFailed

    graph = {
        "a": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 2,
                                                     "color": 255}},
        "text": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": TABLE}},
        "save": {"class_type": "QuantTuneSaveReport",
                 "inputs": {"title": "T", "note": "", "headings": "Cost", "report_a": ["text", 0],
                            "chart_a": ["a", 0], "filename_prefix": "reports/x",
                            "format": "both"}},
    }
    history, _ = comfy_server.queue(graph)
    shown = history["outputs"]["save"]
    assert "| float | 1 |" in shown["text"][0] and len(shown["images"]) == 2
    page, = (comfy_server.folder / "output" / "reports").glob("x_*.html")
    Page(page.read_text("utf-8"))
    graph["save"]["inputs"]["filename_prefix"] = "../../x"
    with pytest.raises(RunFailed, match="outside the output folder") as caught:
        comfy_server.queue(graph)
    assert caught.value.node_id == "save"
