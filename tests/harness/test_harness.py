"""The harness itself, on stock nodes: what it tells of a run, of a failure and of an interrupt."""

import pytest

from quanttune.devtools.client import RunFailed
from quanttune.devtools.graph import to_api
from quanttune.tests.harness.browser import ARTIFACTS
from quanttune.tests.harness.server import check_pictures

EMPTY = {"width": 64, "height": 48, "batch_size": 1, "color": 0xFF8000}


def graph(**inputs):
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**EMPTY, **inputs}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}},
    }


@pytest.mark.server
def test_a_graph_runs_and_its_picture_comes_back(comfy_server):
    history, events = comfy_server.queue(graph(color=1))
    assert history["status"]["status_str"] == "success"
    assert {"executing", "executed"} <= {event["type"] for event in events}
    (picture,) = comfy_server.pictures(history)["2"]
    assert picture.shape == (48, 64, 3)
    with pytest.raises(AssertionError, match="of one colour"):
        check_pictures({"2": [picture]}, ["2"])


@pytest.mark.server
def test_a_refused_graph_names_node_and_input(comfy_server):
    with pytest.raises(RunFailed, match=r"node 1 \(EmptyImage\): .*width"):
        comfy_server.queue(graph(width="wide"))


@pytest.mark.server
def test_a_failing_node_is_named(comfy_server):
    name = comfy_server.client.upload_image(b"this is no picture", "broken.png")
    bad = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(RunFailed, match=r"node 1 \(LoadImage\)") as caught:
        comfy_server.queue(bad)
    assert caught.value.node_id in ("1", "")


@pytest.mark.server
@pytest.mark.browser
def test_the_frontend_converts_and_queues(frontend_page, comfy_server):
    frontend_page.load_api(graph(color=2))
    assert frontend_page.unknown_types() == []
    both = frontend_page.graph_to_prompt()
    converted = to_api(both["workflow"], comfy_server.client.object_info())
    assert _plain(converted) == _plain(both["output"])
    prompt_id = frontend_page.queue()
    history = comfy_server.client.wait(prompt_id)
    assert comfy_server.pictures(history)
    assert frontend_page.screenshot(ARTIFACTS / "harness.png").stat().st_size > 10_000
    assert frontend_page.errors == []


@pytest.mark.server
@pytest.mark.browser
def test_unknown_types_are_seen(frontend_page):
    node = {"id": 1, "type": "NoSuchNode", "pos": [0, 0], "size": [100, 50], "mode": 0, "order": 0}
    frontend_page.load({"nodes": [node], "links": [], "version": 0.4})
    assert frontend_page.unknown_types() == ["NoSuchNode"]


def _plain(graph_):
    """A graph without titles: the frontend and the server name untitled nodes differently."""
    return {i: {"class_type": n["class_type"], "inputs": n["inputs"]} for i, n in graph_.items()}
