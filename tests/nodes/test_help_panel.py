"""Help pages in the real help panel, and the pictures of the nodes that they show."""

import pytest

from quanttune.tests.harness import docs_images

PICTURES = docs_images.ROOT / "web" / "docs" / "images"
PAGES = sorted((docs_images.ROOT / "web" / "docs").glob("QuantTune*.md"))
VIEW = {"width": 1400, "height": 1500}
LEFT, TOP, BADGE, MARGIN = 150, 160, 24, 12

pytestmark = [pytest.mark.server, pytest.mark.browser]

# One node alone, at the size it has when it is added; gives its box on the page. The nodes before
# are removed, but not by clearing: ids would start anew, and values are remembered by node id.
ADD = """([type, left, top]) => {
    const app = window.app;
    for (const old of [...app.graph.nodes]) app.graph.remove(old);
    const node = window.LiteGraph.createNode(type);
    app.graph.add(node);
    const [width, height] = node.computeSize();
    node.size = [Math.max(width, 330), height];
    node.pos = [0, 0];
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [left, top];
    app.canvas.setDirty(true, true);
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return [canvas.left + left, canvas.top + top, node.size[0], node.size[1]];
}"""
PANEL = ".node-help-content"


def add(frontend, node_id):
    return frontend.page.evaluate(ADD, [node_id, LEFT, TOP])


@pytest.fixture
def page(frontend_page):
    frontend_page.page.set_viewport_size(VIEW)
    return frontend_page


def open_help(page, node_id):
    add(page, node_id)
    page.page.evaluate("() => window.app.canvas.selectNode(window.app.graph.nodes[0])")
    page.page.locator("[data-testid=info-button]").click()
    page.page.wait_for_selector(f"{PANEL} h1")
    page.page.wait_for_function(f"() => document.querySelector('{PANEL} img')?.naturalWidth > 0")


@pytest.mark.skipif(not docs_images.WANTED, reason="QUANTTUNE_DOCS_IMAGES=1 writes the pictures")
def test_write_the_pictures_of_the_nodes(page):
    for path in PAGES:
        left, top, width, height = add(page, path.stem)
        page.page.wait_for_timeout(700)  # fields are drawn over the canvas a moment later
        clip = {
            "x": left - MARGIN,
            "y": top - 30 - BADGE,
            "width": width + 2 * MARGIN,
            "height": height + 30 + BADGE + MARGIN,
        }
        assert clip["y"] + clip["height"] < VIEW["height"], f"{path.stem} is higher than the window"
        shot = page.page.screenshot(clip=clip)
        docs_images.save(shot, PICTURES / f"{path.stem}.webp", limit=30_000)


@pytest.mark.parametrize(
    ("node_id", "title", "inputs"),
    [
        ("QuantTuneApplyScales", "Apply TuneQDM Scales", {"model", "scale_name", "strength"}),
        ("QuantTuneTrainScales", "Train Scales (TuneQDM)", {"learning_rate", "num_experts"}),
    ],
)
def test_the_panel_shows_picture_tables_and_source(page, node_id, title, inputs):
    open_help(page, node_id)
    shown = page.page.evaluate(
        f"""() => {{
            const panel = document.querySelector('{PANEL}');
            const cells = (t) => [...t.querySelectorAll('tr td:first-child')]
                .map(c => c.textContent.trim());
            return {{
                title: panel.querySelector('h1').textContent,
                width: panel.querySelector('img').naturalWidth,
                rows: [...panel.querySelectorAll('table')].map(cells),
                text: panel.textContent,
            }}
        }}"""
    )
    assert shown["title"] == title
    assert shown["width"] > 200, "the picture of the node is not there"
    assert inputs <= set(shown["rows"][0])
    assert len(shown["rows"]) >= 2, "inputs or outputs are missing"
    assert "Source:" in shown["text"]
    assert page.errors == []
