"""What the pack draws on its nodes, in the real frontend: from a run, and from messages."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quanttune.devtools.frontend import open_page
from quanttune.tests.harness.browser import ARTIFACTS

pytestmark = [pytest.mark.server, pytest.mark.browser]

FOLDER = Path(__file__).parent
STEPS, SAMPLED, EXPERTS = 12, 5, 4
PROMPT: list[str] = ["prompt"]
"""Ids of prompts that messages pretend to be of, the last one that of the present test."""
BROKEN = "<img src=x onerror='window.broken = 1'>"
TOLERANCE = {"chart": 0.008, "timeline": 0.02, "badge": 0.04}
"""Mean difference, of 1, of a part of two pictures that are scaled down four times: about three
times that of texts with and without hinting. A chart without its lines differs by 0.013, one
without its band by 0.07, a timeline without experts by 0.08, a node without the badge by 0.1."""
PARTS = {"chart": (320, 196, 680, 432), "timeline": (20, 344, 272, 396), "badge": (100, 8, 280, 28)}
"""Left, top, right and bottom of what is compared, in pixels."""


def graph(**training):
    return {
        "1": {"class_type": "QuantTuneLoadQuantizedUNet",
              "inputs": {"unet_name": "starter-4bit.safetensors", "bits": "auto"}},
        "2": {"class_type": "QuantTuneLoadStarterModel", "inputs": {}},
        "3": {"class_type": "QuantTuneTrainingImages", "inputs": {
            "folder": "starter: pip", "captions": "text files", "resolution": 64}},
        "5": {"class_type": "QuantTuneTrainScales", "inputs": {
            "model": ["1", 0], "images": ["3", 0], "clip": ["2", 1], "vae": ["2", 2],
            "run_name": "drawn", "if_run_exists": "start anew", "preset": "recommended",
            "steps": STEPS, "num_experts": EXPERTS, "learning_rate": 0.01, "batch_size": 1,
            "validation_prompts": "", "preview_every": 0, "checkpointing": False, **training}},
        "6": {"class_type": "QuantTuneApplyScales", "inputs": {
            "model": ["1", 0], "scale_name": "(connected scales)", "strength": 1.0,
            "scales": ["5", 0]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 1], "text": "a star"}},
        "8": {"class_type": "EmptyLatentImage",
              "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "9": {"class_type": "KSampler", "inputs": {
            "model": ["6", 0], "positive": ["7", 0], "negative": ["7", 0],
            "latent_image": ["8", 0], "seed": 1, "steps": SAMPLED, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "10": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["2", 2]}},
        "11": {"class_type": "PreviewImage", "inputs": {"images": ["10", 0]}},
    }


def alone(*nodes):
    """Some of the graph's nodes, without what they are connected to."""
    whole = graph()
    return {n: {**whole[n], "inputs": {k: v for k, v in whole[n]["inputs"].items()
                                       if not isinstance(v, list)}} for n in nodes}


@pytest.fixture(scope="module")
def opened(browser_context, comfy_server):
    """One page for all tests of this file: to open it takes longer than most of them."""
    comfy_server.forget_jobs()
    frontend = open_page(browser_context, comfy_server.client.url)
    yield frontend
    frontend.page.close()


@pytest.fixture
def page(opened):
    """The page, with nothing open of former tests, as a prompt of its own sees it."""
    opened.load({"version": 0.4, "nodes": [], "links": [], "groups": []})
    opened.errors.clear()
    opened.page.evaluate("() => window.app.clean()")  # no pictures of the runs of other tests
    PROMPT.append(f"prompt {len(PROMPT)}")
    return opened


def load(page, nodes):
    """Open a graph with all of it in view: what is out of sight is not drawn."""
    open_graph(page, nodes)
    pretend(page, PROMPT[-1])
    fit(page)


def open_graph(page, nodes, name="drawn"):
    """Open a graph in a tab of its own; the frontend does not wait until it has become that."""
    name = f"{PROMPT[-1]} {name}"
    page.load_api(nodes, f"{name}.json")
    page.page.wait_for_function(
        "(name) => window.app.extensionManager.workflow.activeWorkflow.path.includes(name)",
        arg=name, timeout=60_000)


def pretend(page, prompt):
    """Queue what is open, so that the page believes in a prompt of that id; nothing runs."""
    def answer(route):
        if route.request.method != "POST":
            return route.fallback()
        return route.fulfill(json={"prompt_id": prompt, "number": 1, "node_errors": {}})

    page.page.route("**/prompt", answer)
    try:
        assert page.queue() == prompt
    finally:
        page.page.unroute("**/prompt", answer)


def tab(page):
    """Name of the workflow on screen."""
    return page.page.evaluate("() => window.app.extensionManager.workflow.activeWorkflow.path")


def go_to(page, name):
    """Choose another tab."""
    page.page.evaluate("""async (name) => {
        const { workflow } = window.app.extensionManager;
        const chosen = workflow.openWorkflows.find((one) => one.path === name);
        await chosen.load();
        await window.app.loadGraphData(chosen.activeState, true, true, chosen);
    }""", name)
    fit(page)


def fit(page):
    page.page.wait_for_timeout(300)
    page.page.evaluate(
        "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(700)


def listen(page):
    """Keep the messages that the server sends from now on, in ``window.told``."""
    page.page.evaluate("""async () => {
        window.told = [];
        const { api } = await import('/scripts/api.js');
        for (const name of ['quanttune.losses', 'quanttune.experts'])
          api.addEventListener(name, (e) => window.told.push([name, performance.now(), e.detail]));
    }""")


def send(page, name, detail):
    """Let the page believe that the server sent a message, and draw it."""
    page.page.evaluate("""async ([name, detail]) => {
        const { api } = await import('/scripts/api.js');
        api.dispatchCustomEvent(name, detail);
        for (let i = 0; i < 3; i++) await new Promise((done) => requestAnimationFrame(done));
    }""", [name, detail])


def losses(upto=260, steps=400, **changes):
    """A message of a training that nothing random has a part in."""
    points = [[[s, 0.6 * 0.3**e * (0.6 + 0.5 * math.exp(-s / 90) + 0.25 * math.sin(7.3 * s))]
               for s in range(1 + e, upto + 1, EXPERTS)] for e in range(EXPERTS)]
    return {"node": "5", "prompt": PROMPT[-1], "run": "my-owl", "steps": steps, "step": upto,
            "experts": EXPERTS, "timesteps": 1000, "whole": True, "points": points, **changes}


def sampling(at=None, count=20, **changes):
    steps = [round(0.999 * (1 - i / count), 4) for i in range(count)]
    return {"nodes": ["6"], "prompt": PROMPT[-1], "sampler": "9", "steps": steps,
            "at": steps[0] if at is None else at, **changes}


def fills(page, selector, attribute):
    return page.page.eval_on_selector_all(
        selector, "(all, name) => all.map((e) => [e.dataset.expert, e.getAttribute(name)])",
        attribute)


def count(page, selector):
    return page.page.locator(selector).count()


def wait_for_count(page, selector, number):
    """The page draws in its own time: when it has, so many elements are there."""
    page.page.wait_for_function(
        "([selector, number]) => document.querySelectorAll(selector).length === number",
        arg=[selector, number])


def wait_for_text(page, panel, text):
    """Until a panel says it, somewhere, as one of its texts."""
    page.page.wait_for_function(
        "([panel, text]) => [...document.querySelectorAll(panel)].some("
        "(e) => e.textContent === text)", arg=[f".quanttune-{panel} text", text])


def wait_for_points(page, number):
    page.page.wait_for_function("""(number) => number === [
        ...document.querySelectorAll('.quanttune-points')].reduce(
            (sum, e) => sum + e.getAttribute('d').split('M').length - 1, 0)""", arg=number)


def axis(page):
    """Heights and texts of the labels left of a chart, from the top."""
    labels = page.page.eval_on_selector_all(
        ".quanttune-chart text[text-anchor=end]",
        "(all) => all.filter((e) => e.getAttribute('x') === '35')"
        ".map((e) => [Number(e.getAttribute('y')), e.textContent])")
    return sorted((y, text) for y, text in labels if text not in ("expert", "t"))


def test_a_run_draws_losses_experts_steps_and_sizes(page, comfy_server):
    comfy_server.forget_results()
    open_graph(page, graph())
    fit(page)
    name = tab(page)
    listen(page)
    history = comfy_server.client.wait(page.queue(), timeout=540)
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    wait_for_text(page, "chart", f"step {STEPS} of {STEPS}")
    wait_for_points(page, STEPS)
    wait_for_count(page, ".quanttune-timeline [data-step]", SAMPLED)
    wait_for_count(page, ".quanttune-now", 0)
    page.page.wait_for_function("() => window.app.nodeOutputs?.[11]?.images?.length")
    told = page.page.evaluate("() => window.told")

    # One line an expert, and the true losses of its steps.
    with open(comfy_server.folder / "output/quanttune_runs/drawn/loss.csv") as file:
        rows = list(csv.DictReader(file))
    expected = [[[int(r["step"]), float(f"{float(r['loss']):.4g}")] for r in rows
                 if int(r["expert"]) == e] for e in range(EXPERTS)]
    assert all(expected) and sum(map(len, expected)) == STEPS
    messages = [m for name, _, m in told if name == "quanttune.losses"]
    assert messages[0]["whole"] and messages[0]["points"] == [[]] * EXPERTS
    assert messages[-1]["whole"] and messages[-1]["points"] == expected
    assert {m["node"] for m in messages} == {"5"}
    lines = fills(page, ".quanttune-line", "stroke")
    assert [e for e, _ in lines] == ["1", "2", "3", "4"]
    points = page.page.eval_on_selector_all(
        ".quanttune-points", "(all) => all.map((e) => e.getAttribute('d').split('M').length - 1)")
    assert points == [len(own) for own in expected]

    # The same colours in the band of the chart and in the timeline.
    assert len({colour for _, colour in lines}) == EXPERTS
    for panel in ("chart", "timeline"):
        assert fills(page, f".quanttune-{panel} .quanttune-band rect", "fill") == lines

    # A tick for each of the sampler's steps, each under its expert.
    ticks = [m["steps"] for name, _, m in told if name == "quanttune.experts" and "steps" in m]
    assert len(ticks) == 1 and len(ticks[0]) == SAMPLED
    assert ticks[0][0] == pytest.approx(0.999) and ticks[0] == sorted(ticks[0], reverse=True)
    shared = [sum(math.floor(t * EXPERTS) == e for t in ticks[0]) for e in range(EXPERTS)]
    wait_for_text(page, "timeline", f"5 steps: {' + '.join(map(str, reversed(shared)))}")

    # Bits and size, as the host accounts it.
    badge = page.page.evaluate("""() => window.app.rootGraph.getNodeById(1).badges.map(
        (b) => (typeof b === 'function' ? b() : b).text)""")[-1]
    assert badge == history["outputs"]["1"]["quanttune_badge"][0]
    assert re.fullmatch(r"4-bit · 3\.\d\d MiB", badge)

    # None of it is saved or sent, and another tab's graph does not lose it.
    prompt = page.graph_to_prompt()
    assert "quanttune_" not in json.dumps(prompt["output"]) and "_chart" not in str(
        prompt["output"]["5"])
    saved = next(n for n in prompt["workflow"]["nodes"] if n["id"] == 6)
    assert saved["widgets_values"] == ["(connected scales)", 1]
    open_graph(page, alone("5", "6"), "another")
    fit(page)
    assert count(page, ".quanttune-line") == 0
    go_to(page, name)
    wait_for_count(page, ".quanttune-line", EXPERTS)
    assert page.errors == []


def test_messages_add_up_and_a_new_run_begins_empty(page):
    load(page, alone("5", "6"))
    wait_for_text(page, "chart", "The loss is drawn here while it trains")
    before = 40
    send(page, "quanttune.losses", losses(before))
    wait_for_points(page, before)
    more = losses(48, whole=False, points=[[[s, 0.1]] for s in range(41, 45)])
    send(page, "quanttune.losses", more)
    wait_for_points(page, before + 4)
    # A message of another run, without its beginning, says nothing.
    send(page, "quanttune.losses", {**more, "run": "another"})
    wait_for_points(page, before + 4)
    send(page, "quanttune.losses", losses(0, points=[[]] * EXPERTS))
    wait_for_text(page, "chart", "step 0 of 400")
    assert count(page, ".quanttune-line") == 0

    send(page, "quanttune.experts", sampling())
    wait_for_text(page, "timeline", "The experts are shown after the first run")
    send(page, "executed", {"node": "6", "display_node": "6", "prompt_id": PROMPT[-1],
                            "output": {"quanttune_experts": [{"experts": 1, "timesteps": 1000}]}})
    wait_for_count(page, ".quanttune-timeline .quanttune-band rect", 1)
    send(page, "quanttune.experts", {k: v for k, v in sampling(0.6).items() if k != "steps"})
    wait_for_text(page, "timeline", "step 9 of 20 · expert 1")
    send(page, "executing", "9")
    wait_for_count(page, ".quanttune-now", 1)
    send(page, "executing", "10")
    wait_for_text(page, "timeline", "20 steps")
    assert count(page, ".quanttune-now") == 0
    assert page.errors == []


def test_hostile_messages_break_nothing(page):
    load(page, alone("1", "5", "6"))
    output = {"quanttune_badge": [BROKEN], "quanttune_experts": [{"experts": 1e9}]}
    for message in ({}, None, {"node": "99", "whole": True}, losses(points=None),
                    losses(points=[[[1, None]], [["a", "b"]], [[]], []]), losses(steps=-1),
                    losses(experts=-3), losses(run=BROKEN, node="5:7:9")):
        send(page, "quanttune.losses", message)
    for message in ({}, None, sampling(nodes=["5", "77"]), sampling(at="x"), sampling(steps=5)):
        send(page, "quanttune.experts", message)
    send(page, "executed", {"node": "6", "prompt_id": PROMPT[-1], "output": output})
    send(page, "executed", {"node": "1", "prompt_id": PROMPT[-1], "output": output})
    send(page, "quanttune.losses", losses(run=BROKEN))
    wait_for_count(page, ".quanttune-line", EXPERTS)
    assert count(page, ".quanttune-chart img") == 0
    assert page.page.evaluate("() => window.broken") is None
    assert page.errors == []


def test_a_training_that_diverges_has_labels_that_can_be_read(page):
    load(page, alone("5"))
    wild = [[[s, 0.1 * 10 ** (s / 12)] for s in range(1, 400, 3)], *[[]] * (EXPERTS - 1)]
    send(page, "quanttune.losses", losses(400, points=wild))
    wait_for_count(page, ".quanttune-line", 1)
    labels = axis(page)
    heights = [y for y, _ in labels]
    assert 3 <= len(heights) <= 7
    assert all(b - a > 9 for a, b in zip(heights, heights[1:]))
    assert not [text for _, text in labels if "e" in text and text.endswith("k")]
    assert page.errors == []


@pytest.mark.parametrize("loss", [0.9137, 1e20, 0])
def test_losses_that_are_all_the_same_are_a_line_in_the_middle(loss, page):
    # The last digits of their means differ: ticks that close would never come to an end.
    load(page, alone("5"))
    same = [[[step, loss] for step in range(1, 11)]] * EXPERTS
    send(page, "quanttune.losses", losses(10, points=same))
    wait_for_count(page, ".quanttune-line", EXPERTS)
    labels = [text for _, text in axis(page)]
    assert 2 <= len(labels) <= 6 and len({float(t.rstrip("k")) for t in labels}) >= 2, labels
    heights = page.page.eval_on_selector_all(
        ".quanttune-chart circle", "(all) => all.map((e) => Number(e.getAttribute('cy')))")
    top, bottom = axis(page)[0][0], axis(page)[-1][0]
    assert all(top - 40 < y < bottom + 40 for y in heights)
    assert page.errors == []


def test_losses_no_chart_could_hold_are_thinned_and_sorted_out(page):
    load(page, alone("5"))
    line = [[step, 0.3 + 0.2 * math.sin(step)] for step in range(1, 6001)]
    wild = [[1, 1e300], [2, -1e308], [3, 0.5], [2, 0.4], [9, 0.3], [1, 0.2]]
    name = "損失" * 50_000
    send(page, "quanttune.losses", losses(6000, 6000, points=[line, wild, [], []], run=name))
    wait_for_count(page, ".quanttune-line", 2)
    points = page.page.eval_on_selector_all(
        ".quanttune-points", "(all) => all.map((e) => e.getAttribute('d').split('M').length - 1)")
    assert 256 <= points[0] <= 512 and points[1] == 4
    paths = page.page.eval_on_selector_all(
        ".quanttune-chart path", "(all) => all.map((e) => e.getAttribute('d')).join()")
    assert "NaN" not in paths and "Infinity" not in paths
    # The name of the run is cut off before what stands on its right.
    name, told = page.page.evaluate("""() => {
        const all = [...document.querySelectorAll('.quanttune-chart text')];
        return [/^損失.*…$/, /^step 6000/].map((text) => {
            const place = all.find((e) => text.test(e.textContent)).getBoundingClientRect();
            return [place.left, place.right];
        });
    }""")
    assert name[1] < told[0]
    more = losses(6000, 6000, whole=False, run=("損失" * 100), points=[line, [], [], []])
    send(page, "quanttune.losses", more)
    assert page.page.evaluate("""() => [...document.querySelectorAll('.quanttune-points')].every(
        (e) => e.getAttribute('d').split('M').length <= 513)""")
    assert page.errors == []


# What our scripts ask for, and nothing that would be kept for other tests.
LANGUAGE = """(language) => {
    const { setting } = window.app.extensionManager;
    window.before ??= setting.get;
    setting.get = (name) => name === 'Comfy.Locale' ? language : window.before.call(setting, name);
}"""
OVERLAPS = """() => [...document.querySelectorAll(
    '.quanttune-timeline svg, .quanttune-chart svg')].flatMap((svg) => {
    const all = [...svg.querySelectorAll('text')].filter((e) => e.textContent);
    const { left, right } = svg.getBoundingClientRect();
    const boxes = all.map((e) => [e.textContent, e.getBoundingClientRect()]);
    return boxes.flatMap(([text, a], i) => [
      ...(a.left < left - 1 || a.right > right + 1 ? [`${text} is cut off`] : []),
      ...boxes.slice(i + 1).filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1
        && a.top < b.bottom - 4 && b.top < a.bottom - 4).map(([other]) => `${text} on ${other}`),
    ]);
})"""


@pytest.mark.parametrize("language", ["en", "ja"])
def test_texts_fit_into_a_narrow_node(language, page):
    width = 160
    load(page, alone("5", "6"))
    page.page.evaluate(LANGUAGE, language)
    try:
        fit_into(width, page)
    finally:
        page.page.evaluate(LANGUAGE, "en")


def fit_into(width, page):
    """All texts lie within their drawings and beside each other, before, during and after a run."""
    page.page.evaluate("""(width) => {
        for (const node of window.app.rootGraph.nodes) node.setSize([width, node.size[1]]);
        window.app.canvas.setDirty(true, true);
    }""", width)
    page.page.wait_for_function("""(width) => [...document.querySelectorAll(
        '.quanttune-chart, .quanttune-timeline')].every((e) => e.clientWidth < width
        && e.firstChild.getAttribute('viewBox').includes(` ${e.clientWidth} `))""", arg=width)
    assert page.page.evaluate(OVERLAPS) == []
    send(page, "quanttune.losses", losses(run="a-run-of-a-very-long-name-indeed"))
    send(page, "executed", {"node": "6", "display_node": "6", "prompt_id": PROMPT[-1], "output": {
        "quanttune_experts": [{"experts": EXPERTS, "timesteps": 1000}]}})
    send(page, "quanttune.experts", sampling(0.6493))
    wait_for_count(page, ".quanttune-now", 1)
    wait_for_count(page, ".quanttune-line", EXPERTS)
    assert page.page.evaluate(OVERLAPS) == []
    assert page.errors == []


def test_a_chosen_file_tells_its_experts_before_any_run(page, comfy_server):
    load(page, alone("6"))
    page.page.evaluate("""() => {
        const chooser = window.app.rootGraph.getNodeById(6).widgets[0];
        chooser.value = 'starter-pip.safetensors';
        chooser.callback(chooser.value);
    }""")
    told = comfy_server.client.get("/quanttune/experts?name=starter-pip.safetensors")
    assert told["experts"] > 1
    wait_for_count(page, ".quanttune-timeline .quanttune-band rect", told["experts"])
    for name in ("../quanttune/starter-4bit.safetensors", "/etc/passwd", "..%2F..%2Fx", "", "%00"):
        assert comfy_server.client.get(f"/quanttune/experts?name={name}") == {}
    page.page.evaluate("""() => {
        const chooser = window.app.rootGraph.getNodeById(6).widgets[0];
        chooser.value = '(connected scales)';
        chooser.callback(chooser.value);
    }""")
    # What comes by the wire is not known before it has run; the former file's experts are not it.
    page.page.wait_for_selector(".quanttune-timeline .quanttune-band", state="detached")
    wait_for_text(page, "timeline", "The experts are shown after the first run")
    page.page.evaluate("() => window.app.rootGraph.getNodeById(6).collapse()")
    page.page.wait_for_function(
        "() => !document.querySelector('.quanttune-timeline').offsetParent")
    assert page.errors == []


def test_nodes_that_are_elements_of_the_page(page):
    setting = "(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.page.evaluate(setting, True)
    try:
        load(page, alone("1", "5", "6"))
        show_all(page)
        page.page.wait_for_function("""() => document.querySelector('.quanttune-line') &&
            document.querySelector('.quanttune-badge')?.offsetHeight > 10""")
        wait_for_count(page, ".quanttune-line", EXPERTS)
        wait_for_count(page, ".quanttune-timeline [data-step]", 20)
        assert page.page.locator(".quanttune-badge").first.text_content() == "4-bit · 0.40 GiB"
        assert page.errors == []
    finally:
        page.page.evaluate(setting, False)


def show_all(page):
    send(page, "quanttune.losses", losses())
    send(page, "executed", {"node": "1", "display_node": "1", "prompt_id": PROMPT[-1],
                            "output": {"quanttune_badge": ["4-bit · 0.40 GiB"]}})
    send(page, "executed", {"node": "6", "display_node": "6", "prompt_id": PROMPT[-1], "output": {
        "quanttune_experts": [{"experts": EXPERTS, "timesteps": 1000}]}})
    send(page, "quanttune.experts", sampling())
    send(page, "quanttune.experts", sampling(0.6493))


def small(path, area):
    """Part of a picture at a quarter of its size, ``[height, width, 3]``, 0 to 1."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").crop(area).reduce(4), dtype=np.float32) / 255


def difference(a, b, area):
    return float(np.abs(small(a, area) - small(b, area)).mean())


# What the host draws on the canvas without naming a font that it ships looks different where other
# fonts are installed.
ONE_FONT = """() => {
    const kind = CanvasRenderingContext2D.prototype;
    const { get, set } = Object.getOwnPropertyDescriptor(kind, 'font');
    Object.defineProperty(kind, 'font', { configurable: true, get, set(font) {
        set.call(this, String(font).replace(/(\\d(px|pt|em|%)) .*/, '$1 Inter'));
    } });
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_drawings_look_as_they_did(theme, page):
    page.page.evaluate(ONE_FONT)
    page.page.evaluate(
        "(t) => window.app.extensionManager.setting.set('Comfy.ColorPalette', t)", theme)
    try:
        open_graph(page, alone("1", "5", "6"))
        pretend(page, PROMPT[-1])
        # The chart is what matters: without the inputs above it.
        page.page.evaluate("""() => {
            const { app } = window;
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [80, 230];
            const places = { 1: [0, 0], 6: [0, 180], 5: [300, 0] };
            for (const node of app.rootGraph.nodes) {
              node.pos = places[node.id];
              if (node.id == 5) {
                for (const w of node.widgets.slice(0, -1)) {
                  Object.assign(w, { type: 'hidden', hidden: true, computeSize: () => [0, -4] });
                  w.options.hidden = true;
                }
                node.setSize([380, 380]);
              }
            }
            app.graph.setDirtyCanvas(true, true);
        }""")
        clip = {"x": 70, "y": 170, "width": 705, "height": 460}
        empty, now = (ARTIFACTS / f"drawings-{theme}{end}.png" for end in ("-empty", ""))
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        page.page.wait_for_timeout(800)
        page.page.screenshot(path=str(empty), clip=clip)
        show_all(page)
        wait_for_count(page, ".quanttune-line", EXPERTS)
        wait_for_count(page, ".quanttune-timeline [data-step]", 20)
        reference = FOLDER / f"drawings-{theme}.png"
        for _ in range(30):  # what is on the canvas, and fonts, come when the machine has time
            page.page.wait_for_timeout(800)
            page.page.screenshot(path=str(now), clip=clip)
            assert reference.is_file(), f"look at {now}, and keep it as {reference.name} if right"
            found = {part: difference(now, reference, area) for part, area in PARTS.items()}
            if all(found[part] < TOLERANCE[part] for part in PARTS):
                break
        for part, area in PARTS.items():
            assert found[part] < TOLERANCE[part], (part, found)
            assert difference(empty, reference, area) > 2 * TOLERANCE[part], part
        assert page.errors == []
    finally:
        page.page.evaluate("() => window.app.extensionManager.setting.set('Comfy.ColorPalette', "
                           "'dark')")
