"""The first five minutes in the real GUI: the template browser, a template opened by a click, Run.

With ``QUANTTUNE_DOCS_IMAGES=1`` what is seen becomes the pictures of `docs/first-run.md`.
"""

import json

import pytest

from quanttune.tests.harness import docs_images
from quanttune.tests.workflows.test_workflows import FILES, read

PICTURES = docs_images.ROOT / "docs" / "images" / "first-run"
FIRST = "01-quantize-and-compare"

pytestmark = [pytest.mark.server, pytest.mark.browser]


def keep(shot, name):
    if docs_images.WANTED:
        docs_images.save(shot, PICTURES / f"{name}.webp", limit=150_000, width=1600)


def open_templates(page):
    """Open the template browser and choose the pack in it, as its side bar's buttons do."""
    page.page.get_by_text("Templates", exact=True).first.click()
    page.page.locator("[role=dialog] >> text=/QuantTune/").first.click()
    page.page.wait_for_selector(f"[data-testid=template-workflow-{FIRST}]")


def cards(page):
    """What each card of the template browser shows: name of the file, title, line, picture."""
    return page.page.evaluate(
        """() => [...document.querySelectorAll(
                '[data-testid^="template-workflow-"]:not([data-testid*="content"])')]
            .map(card => ({
                name: card.dataset.testid.replace('template-workflow-', ''),
                title: card.querySelector('h3').textContent.trim(),
                line: card.querySelector('p').textContent.trim(),
                wide: card.querySelector('img')?.naturalWidth ?? 0,
            }))"""
    )


def heads():
    """Title and line of each template's note, by file name."""
    found = {}
    for path in FILES:
        note = next(n for n in read(path)["nodes"] if n["type"] == "MarkdownNote")
        title, line = note["widgets_values"][0].split("\n\n")[:2]
        found[path.stem] = (title[2:], line.strip("*"))
    return found


def test_templates_have_pictures_titles_and_lines_and_open_by_a_click(frontend_page, comfy_server):
    open_templates(frontend_page)
    found, wide = [], {}
    for turn in range(300):  # cards come, and their pictures are loaded, while one scrolls
        found = cards(frontend_page)
        for card in found:
            wide[card["name"]] = max(card["wide"], wide.get(card["name"], 0))
        if len(found) == len(FILES) and all(wide.values()):
            break
        frontend_page.page.evaluate(
            """turn => document.querySelectorAll('[role=dialog] *').forEach(e => {
                const far = e.scrollHeight - e.clientHeight
                if (far > 50) e.scrollTop = (250 * turn) % (far + 250) })""",
            turn + 1,
        )
        frontend_page.page.wait_for_timeout(500)
    assert [card["name"] for card in found] == [path.stem for path in FILES]
    for card in found:
        title, line = heads()[card["name"]]
        assert card["title"] == f"{card['name'][:2]} {title}"
        # The browser writes hyphens of its own templates' descriptions as spaces.
        assert card["line"] == line.replace("-", " ")
        assert wide[card["name"]] > 100, f"{card['name']} shows no picture"
    frontend_page.page.evaluate(
        "() => document.querySelectorAll('[role=dialog] *').forEach(e => { e.scrollTop = 0 })"
    )
    frontend_page.page.wait_for_timeout(3000)
    keep(frontend_page.page.screenshot(), "templates")

    frontend_page.page.click(f"[data-testid=template-workflow-{FIRST}]")
    expected = {node["type"] for node in read(FILES[0])["nodes"]}
    frontend_page.page.wait_for_function(
        "() => window.app.rootGraph.nodes.some(n => n.type === 'QuantTuneQuantizeUNet')"
    )
    assert frontend_page.unknown_types() == []
    types = frontend_page.page.evaluate("() => window.app.rootGraph.nodes.map(n => n.type)")
    assert set(types) == expected
    frontend_page.page.wait_for_selector("[role=dialog]", state="detached")
    keep(docs_images.whole_graph(frontend_page), "opened")
    assert frontend_page.errors == []


def test_a_template_opens_where_its_note_can_be_read(frontend_page):
    # The host shows all of it, from so far away on a small screen that no text is drawn.
    frontend_page.page.set_viewport_size({"width": 1366, "height": 768})
    open_templates(frontend_page)
    frontend_page.page.click(f"[data-testid=template-workflow-{FIRST}]")
    frontend_page.page.wait_for_function(
        """() => window.app.rootGraph.nodes.some(n => n.type === 'QuantTuneQuantizeUNet')
            && !window.app.canvas.low_quality"""
    )
    frontend_page.page.wait_for_function(
        """() => [...document.querySelectorAll("strong")].some((part) => {
            const { x, y } = part.getBoundingClientRect();
            return part.textContent === "What it does:" && x > 64 && x < 700 && y > 92 && y < 600;
        })"""
    )
    # A view of one's own is left alone: what is opened from a file is seen as it was left.
    mine = frontend_page.graph_to_prompt()["workflow"]
    mine["extra"]["ds"] = {"scale": 0.3, "offset": [600, 200]}
    frontend_page.load(mine, "mine")
    assert frontend_page.page.evaluate("() => window.app.canvas.ds.scale") == pytest.approx(0.3)
    assert frontend_page.errors == []


def test_run_fills_the_template_with_pictures_and_reports(frontend_page, comfy_server):
    comfy_server.forget_results()
    frontend_page.load(read(FILES[0]), FIRST)
    frontend_page.page.evaluate(
        "() => window.app.rootGraph.nodes.filter(n => n.type === 'EmptyLatentImage')"
        ".forEach(n => { n.widgets.find(w => w.name === 'batch_size').value = 4 })"
    )
    history = comfy_server.client.wait(frontend_page.queue(), timeout=540)
    assert history["status"]["status_str"] == "success"
    frontend_page.page.wait_for_function(
        """() => window.app.rootGraph.nodes.filter(n => n.type === 'QuantTuneQuantizeUNet')
            .every(n => n.widgets.find(w => w.name === 'quanttune_report')?.value)"""
    )
    keep(docs_images.whole_graph(frontend_page), "after-run")
    reports = frontend_page.page.evaluate(
        """() => window.app.rootGraph.nodes.filter(n => n.type === 'QuantTuneQuantizeUNet')
            .map(n => n.widgets.find(w => w.name === 'quanttune_report')?.value ?? '')"""
    )
    assert len(reports) == 2
    for report in reports:
        assert "layers quantized" in report and "Weight error" in report
    # The text is what a run said, and no part of the workflow or of its prompt.
    saved = frontend_page.graph_to_prompt()
    assert "layers quantized" not in json.dumps(saved)
    assert frontend_page.errors == []
