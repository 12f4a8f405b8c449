"""Every shipped workflow, opened in the real frontend and run from there to its pictures.

No workflow at all is a failure: the pack's templates are part of what it promises.
"""

import json
from pathlib import Path

import pytest

from quanttune.devtools.graph import to_api
from quanttune.tests.harness import docs_images
from quanttune.tests.harness.browser import ARTIFACTS
from quanttune.tests.harness.server import check_pictures
from quanttune.tests.workflows.test_layout import problems

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
each_workflow = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
PICTURES = docs_images.ROOT / "docs" / "images" / "workflows"
PICTURE_NODES = ("SaveImage", "PreviewImage")

pytestmark = [pytest.mark.server, pytest.mark.browser]


def read(path):
    return json.loads(path.read_text("utf-8"))


def drawn(page, name):
    """The open workflow with the sizes that its nodes have once all of them were drawn."""
    page.screenshot(ARTIFACTS / f"{name}.png")  # with all of it in view; others are not drawn
    return page.graph_to_prompt()["workflow"]


def wrapped_rows(page):
    """Rows of tables that a report in the open workflow breaks into lines, being too narrow."""
    return page.page.evaluate(
        """() => window.app.rootGraph.nodes.flatMap(n => n.widgets ?? [])
            .filter(w => w.name === 'quanttune_report' && w.element)
            .flatMap(({ element }) => {
                const style = getComputedStyle(element);
                const pen = document.createElement('canvas').getContext('2d');
                pen.font = `${style.fontSize} ${style.fontFamily}`;
                const room = element.clientWidth
                    - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
                return element.value.split('\\n')
                    .filter(row => row.startsWith('|') && pen.measureText(row).width > room);
            })"""
    )


def test_there_are_workflows():
    assert FILES, f"{FOLDER} holds no workflow"


@each_workflow
def test_every_workflow_has_a_thumbnail(path):
    assert path.with_suffix(".jpg").is_file(), "a template shows a picture of the same name"


@pytest.mark.timeout(1500)
@each_workflow
def test_runs_from_the_frontend_to_its_pictures(path, frontend_page, comfy_server, request):
    if docs_images.WANTED:  # what is kept of another workflow's run reports nothing on this one's
        comfy_server.client.post("/free", {"free_memory": True})
    if any(node["type"] == "QuantTuneTrainQat" for node in read(path)["nodes"]):
        request.getfixturevalue("integer_products")
    frontend_page.load(read(path), path.stem)
    unknown = frontend_page.unknown_types()
    assert not unknown, f"node types the frontend does not know: {unknown}"
    graph = frontend_page.graph_to_prompt()["output"]
    assert problems(drawn(frontend_page, path.stem)) == []
    history = comfy_server.client.wait(frontend_page.queue(), timeout=1200)
    status = history["status"]
    assert status["status_str"] == "success", status["messages"][-1]
    expected = [node for node, entry in graph.items() if entry["class_type"] in PICTURE_NODES]
    assert expected, "a shipped workflow ends in a picture"
    check_pictures(comfy_server.pictures(history), expected)
    # What a run leaves in the nodes (reports, charts, pictures) has room, too.
    assert problems(drawn(frontend_page, path.stem)) == []
    seen = docs_images.whole_graph(frontend_page)
    assert wrapped_rows(frontend_page) == []
    (ARTIFACTS / f"{path.stem}-done.png").write_bytes(seen)
    if docs_images.WANTED:
        docs_images.save(seen, PICTURES / f"{path.stem}.webp", limit=150_000, width=2200)
    assert frontend_page.errors == []


def test_a_node_that_needs_more_room_than_its_file_says_is_noticed(frontend_page):
    workflow = read(FOLDER / "03-personalise-a-subject.json")
    nodes = {node["type"]: node for node in workflow["nodes"]}
    training, moved = nodes["QuantTuneTrainScales"], nodes["QuantTuneTrainingImages"]
    left, top = training["pos"]
    training["size"][1] = 200
    moved["pos"], moved["bgcolor"] = [left, top + 260], training["bgcolor"]
    assert problems(workflow) == []
    frontend_page.load(workflow)
    for _ in range(60):  # a node grows when it is drawn, which a busy machine may do later
        found = problems(drawn(frontend_page, "too-small"))
        if found:
            break
    assert any("overlap" in problem for problem in found)


@each_workflow
def test_conversion_without_a_browser_gives_the_same_graph(path, frontend_page, comfy_server):
    workflow = read(path)
    frontend_page.load(workflow)
    expected = frontend_page.graph_to_prompt()["output"]
    converted = to_api(workflow, comfy_server.client.object_info())
    assert converted.keys() == expected.keys()
    for node, entry in expected.items():
        assert converted[node]["class_type"] == entry["class_type"]
        assert converted[node]["inputs"] == entry["inputs"]
