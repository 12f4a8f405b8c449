"""Two browsers over one server queue at once: each is told, and shown, what is its own alone."""

import csv
import io
import time

import pytest
from PIL import Image

from quanttune.devtools.frontend import browsers, find_chromium, open_page
from quanttune.tests.web.test_drawings import graph

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.timeout(300)]

EXPERTS = {"left": 4, "right": 2}
STEPS = {"left": 8, "right": 6}
BITS = {"left": "4", "right": "8"}
LISTEN = """async () => {
    window.told = [];
    const { api } = await import('/scripts/api.js');
    for (const name of ['quanttune.losses', 'quanttune.experts', 'executed', 'progress_text',
        'execution_start', 'execution_error', 'execution_interrupted'])
      api.addEventListener(name, ({ detail }) => window.told.push([name, detail]));
}"""
QUEUE = "() => { window.app.queuePrompt(0, 1) }"
REOPEN = "async () => { await window.app.loadGraphData(window.app.rootGraph.serialize()) }"
SEED = """(seed) => { window.app.rootGraph.getNodeById(9).widgets.find(
    (w) => w.name === 'seed').value = seed }"""
BADGE = """() => window.app.rootGraph.getNodeById(1).badges.map(
    (b) => (typeof b === 'function' ? b() : b).text).at(-1)"""


def workflow(side):
    """The same ids in both: what went to the wrong page would be drawn there."""
    whole = graph(run_name=f"browser-{side}", num_experts=EXPERTS[side], steps=STEPS[side])
    whole["1"] = {"class_type": "QuantTuneQuantizeUNet", "inputs": {
        "model": ["2", 0], "bits": BITS[side], "range": "minmax"}}
    return whole


@pytest.fixture(scope="module")
def pages(comfy_server):
    """``{side: page}``, each in a browser of its own, their graphs open."""
    if find_chromium() is None:
        pytest.skip("no Chromium found: install it, or name it in QUANTTUNE_CHROMIUM")
    client = comfy_server.client
    while client.get("/queue")["queue_running"]:
        time.sleep(0.05)
    client.post("/history", {"clear": True})
    with browsers(2) as contexts:
        opened = {side: open_page(context, client.url)
                  for side, context in zip(EXPERTS, contexts)}
        for side, page in opened.items():
            page.load_api(workflow(side))
            page.page.evaluate(REOPEN)  # which gives it an id
            page.page.evaluate(
                "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            page.page.evaluate(LISTEN)
        yield opened


def queued(pages):
    """Press Run in all pages before any has its answer; returns ``{side: prompt id}``."""
    answers = {}
    left, right = (page.page for page in pages.values())

    def posted(response):
        return response.url.endswith("/prompt") and response.request.method == "POST"

    with left.expect_response(posted) as mine, right.expect_response(posted) as other:
        for page in (left, right):
            page.evaluate(QUEUE)
    for side, answer in zip(pages, (mine, other)):
        assert answer.value.status == 200, answer.value.text()
        answers[side] = answer.value.json()["prompt_id"]
    return answers


def run(pages, client):
    """Both to their ends: ``{side: (prompt id, its entry in the history)}``."""
    prompts = queued(pages)
    entries = {side: client.wait(prompt, timeout=240) for side, prompt in prompts.items()}
    for entry in entries.values():
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    for side, page in pages.items():
        # The last message has been heard, and what it changes drawn.
        page.page.wait_for_function(
            "(prompt) => window.told.some(([name, told]) => name === 'executed'"
            " && told.node === '11' && told.prompt_id === prompt)", arg=prompts[side])
        page.page.wait_for_function("() => !document.querySelector('.quanttune-now')")
    return {side: (prompts[side], entries[side]) for side in pages}


def of(told, event):
    return [message for name, message in told if name == event]


def shown(page, client):
    """The picture that node 11 shows, as pixels, and its file's name."""
    entry = page.page.evaluate("() => window.app.nodeOutputs['11'].images[0]")
    with Image.open(io.BytesIO(client.image(entry))) as image:
        return image.convert("RGB").tobytes(), entry["filename"]


def test_each_page_gets_its_own_losses_steps_sizes_and_pictures(pages, comfy_server):
    client, told = comfy_server.client, {}
    first = run(pages, client)
    pictures = {side: [shown(page, client)] for side, page in pages.items()}
    for side, page in pages.items():
        prompt, entry = first[side]
        told[side] = page.page.evaluate("() => window.told")
        losses = of(told[side], "quanttune.losses")
        assert {m["run"] for m in losses} == {f"browser-{side}"}
        assert {m["prompt"] for m in losses + of(told[side], "quanttune.experts")} == {prompt}
        with open(comfy_server.folder / f"output/quanttune_runs/browser-{side}/loss.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == STEPS[side]
        assert losses[-1]["points"] == [
            [[int(r["step"]), float(f"{float(r['loss']):.4g}")] for r in rows
             if int(r["expert"]) == e] for e in range(EXPERTS[side])]
        words = [m["text"] for m in of(told[side], "progress_text")]
        assert words and all(f"/{STEPS[side]} " in w for w in words), words
        assert page.page.locator(".quanttune-timeline .quanttune-band rect").count() == (
            EXPERTS[side])
        texts = page.page.eval_on_selector_all(
            ".quanttune-chart text", "(all) => all.map((e) => e.textContent)")
        assert f"step {STEPS[side]} of {STEPS[side]}" in texts
        badge = page.page.evaluate(BADGE)
        assert badge == entry["outputs"]["1"]["quanttune_badge"][0]
        assert badge.startswith(f"{BITS[side]}-bit")

    # Once more: only the sampling, and again at once.
    for seed, page in enumerate(pages.values(), start=100):
        page.page.evaluate(SEED, seed)
    second = run(pages, client)
    for side, page in pages.items():
        pictures[side].append(shown(page, client))
        told[side] = page.page.evaluate("() => window.told")
        mine = {first[side][0], second[side][0]}
        assert {m["prompt_id"] for m in of(told[side], "executed")} == mine
        assert {m["prompt_id"] for m in of(told[side], "execution_start")} == mine
        for number, runs in enumerate((first, second)):
            own = runs[side][1]["outputs"]["11"]["images"][0]["filename"]
            assert pictures[side][number][1] == own
        assert not of(told[side], "execution_error") + of(told[side], "execution_interrupted")
        assert page.errors == []
    assert len({pixels for each in pictures.values() for pixels, _ in each}) == 4
