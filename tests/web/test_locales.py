"""The real frontend in Chinese and Japanese: what an artist reads on our nodes, and on others."""

import pytest

from quanttune.devtools import locales
from quanttune.devtools.frontend import open_page
from quanttune.devtools.locale_checks import guide
from quanttune.tests.harness.browser import ARTIFACTS

pytestmark = [pytest.mark.server, pytest.mark.browser]

SHOWN = """() => Object.fromEntries(
Object.entries(LiteGraph.registered_node_types).map(([id, type]) => {
    const about = {title: type.title, category: type.category,
                   description: type.nodeData?.description ?? ""}
    if (!id.startsWith("QuantTune")) return [id, about]
    const node = LiteGraph.createNode(id)
    const name = slot => slot.label ?? slot.localized_name ?? slot.name
    return [id, {...about,
        inputs: Object.fromEntries(node.inputs.map(slot => [slot.name, name(slot)])),
        widgets: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.label])),
        outputs: node.outputs.map(name)}]
}))"""
"""What the frontend shows of every kind of node."""

GRAPH = {
    "1": {"class_type": "QuantTuneLoadStarterModel", "inputs": {}},
    "2": {
        "class_type": "QuantTuneQuantizeUNet",
        "inputs": {
            "model": ["1", 0],
            "bits": "4",
            "range": "mse",
            "symmetric": False,
            "keep_float": "none",
            "pattern": "",
            "split_shortcuts": True,
        },
    },
}

WIDGET = """(name) => {
    const node = app.rootGraph.nodes.find(n => n.type === "QuantTuneQuantizeUNet")
    const widget = node.widgets.find(w => w.name === name)
    const [x, y] = app.canvas.convertOffsetToCanvas(
        [node.pos[0] + node.size[0] / 3, node.pos[1] + widget.last_y + 10])
    const frame = app.canvas.canvas.getBoundingClientRect()
    return [frame.left + x, frame.top + y]
}"""
"""Where on the page a widget of Quantize UNet is drawn."""


@pytest.fixture
def page_in(browser_context, comfy_server):
    """Opens the frontend in a language; the server, which other tests use, is in English after.

    With `i18n`, that is what the server tells of all packs' texts.
    """
    url, pages = comfy_server.client.url, []
    comfy_server.forget_jobs()

    def opened(language, *, i18n=None):
        context = browser_context
        context.request.post(f"{url}/settings", data={"Comfy.Locale": language})
        if i18n is not None:
            context.route("**/i18n", lambda route: route.fulfill(json=i18n))
        try:
            pages.append(open_page(context, url))
        finally:
            if i18n is not None:
                context.unroute("**/i18n")
        return pages[-1]

    yield opened
    for page in pages:
        page.page.close()
    browser_context.request.post(f"{url}/settings", data={"Comfy.Locale": "en"})
    assert [error for page in pages for error in page.errors] == []


def point_at(page, name, tooltip):
    """Rest the pointer on a widget until its tooltip is there.

    Again and again: on a busy machine the view may still be moving beneath the pointer.
    """
    told = page.page.get_by_text(tooltip, exact=True)
    for turn in range(60):
        x, y = page.page.evaluate(WIDGET, name)
        page.page.mouse.move(x, y)
        page.page.mouse.move(x + 2 + turn % 2, y)
        page.page.wait_for_timeout(2000)
        if told.count() and told.first.is_visible():
            return
    raise AssertionError(f"the pointer rests on '{name}' and its tooltip does not come")


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_every_node_is_shown_in_the_language(language, page_in):
    page = page_in(language)
    shown = page.page.evaluate(SHOWN)
    texts = locales.deep(locales.read(language))
    categories = texts["main"]["nodeCategories"]
    for node_id, node in texts["nodeDefs"].items():
        there = shown[node_id]
        assert there["title"] == node["display_name"]
        assert there["description"] == node["description"]
        for name, text in node.get("inputs", {}).items():
            assert there["inputs"][name] == text["name"]
            assert there["widgets"].get(name, text["name"]) == text["name"]
        for place, text in node.get("outputs", {}).items():
            assert text.get("name", there["outputs"][int(place)]) == there["outputs"][int(place)]
        assert set(there["category"].split("/")) <= set(categories.values())
    titles = {about["title"] for about in shown.values()}
    lost = [row[language] for row in guide()[1] if row[language] not in titles]
    assert not lost, f"ComfyUI calls no node so: {lost}"

    # The label on the node and the tooltip beneath the pointer.
    page.load_api(GRAPH)
    page.screenshot(ARTIFACTS / f"locale-{language}.png")
    inputs = texts["nodeDefs"]["QuantTuneQuantizeUNet"]["inputs"]
    point_at(page, "range", inputs["range"]["tooltip"])
    page.screenshot(ARTIFACTS / f"locale-{language}-tooltip.png", fit=False)
    assert page.errors == []

    # Categories are words that all packs share: ours must not change another's.
    alone = page_in(language, i18n={}).page.evaluate(SHOWN)
    assert alone["QuantTuneQuantizeUNet"]["title"] == "Quantize UNet"
    for node_id, about in alone.items():
        assert node_id in texts["nodeDefs"] or shown[node_id] == about


def test_what_scripts_draw_is_in_the_language(page_in):
    """Where there is a text for it; the places in it are filled in."""
    texts = {"zh": {"quanttune": {"step {a} of {b}": "第 {a} 步，共 {b} 步"}}}
    page = page_in("zh", i18n=texts)
    told = page.page.evaluate(
        """async () => {
            const scripts = (await (await fetch("/extensions")).json())
            const path = scripts.find(name => name.endsWith("/js/words.js"))
            const { word } = await import(new URL("." + path, location.href).href)
            return [word("step {a} of {b}", {a: 0, b: 7}), word("{a} steps", {a: 3}), word("loss")]
        }"""
    )
    assert told == ["第 0 步，共 7 步", "3 steps", "loss"]
