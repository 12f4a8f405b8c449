"""Whose drawings a page shows: after a reload, with several workflows open, from the cache."""

import time

import pytest

from quanttune.devtools import host_process
from quanttune.devtools.frontend import open_page
from quanttune.tests.web.test_drawings import (
    count,
    fit,
    go_to,
    losses,
    pretend,
    sampling,
    send,
    tab,
    wait_for_text,
)

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.timeout(300)]

PERSIST = """(on) => window.app.extensionManager.setting.set('Comfy.Workflow.Persist', on)"""
SHOWN = """() => window.app.rootGraph.nodes.map((node) => [
    Number(node.id),
    node.badges?.map((b) => (typeof b === 'function' ? b() : b)?.text).find((t) => /-bit/.test(t)),
    node.widgets?.find((w) => w.name === 'quanttune_report')?.value,
]).filter(([, badge, report]) => badge || report).sort(([a], [b]) => a - b)"""
SAME = "5e9a4b56-6a3f-4f0e-8f3c-1d2b7a9c0e11"
STEPS = 3


def node(number, kind, values, inputs=(), outputs=()):
    return {
        "id": number,
        "type": kind,
        "pos": [320 * (number % 5), 380 * (number // 5)],
        "size": [280, 120],
        "flags": {},
        "order": number,
        "mode": 0,
        "widgets_values": values,
        "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
        "outputs": [{"name": n, "type": n, "links": links} for n, links in outputs],
    }


def workflow(**facts):
    """A file as artists share it: a quantized model in integers, with scales, draws three steps."""
    links = [
        [1, 1, 0, 4, 0, "MODEL"],
        [2, 4, 0, 6, 0, "MODEL"],
        [3, 6, 0, 9, 0, "MODEL"],
        [4, 2, 1, 7, 0, "CLIP"],
        [5, 7, 0, 9, 1, "CONDITIONING"],
        [6, 7, 0, 9, 2, "CONDITIONING"],
        [7, 8, 0, 9, 3, "LATENT"],
        [8, 9, 0, 10, 0, "LATENT"],
        [9, 2, 2, 10, 1, "VAE"],
        [10, 10, 0, 11, 0, "IMAGE"],
    ]
    nodes = [
        node(
            1,
            "QuantTuneLoadQuantizedUNet",
            ["starter-4bit.safetensors", "auto"],
            (),
            [("MODEL", [1])],
        ),
        node(2, "QuantTuneLoadStarterModel", [], (), [("MODEL", []), ("CLIP", [4]), ("VAE", [9])]),
        node(
            4,
            "QuantTuneDynamicInt8",
            ["all"],
            [("model", "MODEL", 1)],
            [("MODEL", [2]), ("STRING", [])],
        ),
        node(
            6,
            "QuantTuneApplyScales",
            ["starter-pip.safetensors", 1.0],
            [("model", "MODEL", 2)],
            [("MODEL", [3])],
        ),
        node(7, "CLIPTextEncode", ["a star"], [("clip", "CLIP", 4)], [("CONDITIONING", [5, 6])]),
        node(8, "EmptyLatentImage", [64, 64, 1], (), [("LATENT", [7])]),
        node(
            9,
            "KSampler",
            [1, "fixed", STEPS, 1.0, "euler", "normal", 1.0],
            [
                ("model", "MODEL", 3),
                ("positive", "CONDITIONING", 5),
                ("negative", "CONDITIONING", 6),
                ("latent_image", "LATENT", 7),
            ],
            [("LATENT", [8])],
        ),
        node(10, "VAEDecode", [], [("samples", "LATENT", 8), ("vae", "VAE", 9)], [("IMAGE", [10])]),
        node(11, "PreviewImage", [], [("images", "IMAGE", 10)]),
    ]
    return {
        "version": 0.4,
        "last_node_id": 11,
        "last_link_id": 10,
        "nodes": nodes,
        "links": links,
        "groups": [],
        **facts,
    }


def training(**facts):
    """A file with the two nodes that draw, and one that has a badge."""
    nodes = [
        node(1, "QuantTuneLoadQuantizedUNet", ["starter-4bit.safetensors", "auto"]),
        node(5, "QuantTuneTrainScales", []),
        node(6, "QuantTuneApplyScales", ["(connected scales)", 1.0]),
    ]
    return {
        "version": 0.4,
        "last_node_id": 6,
        "last_link_id": 0,
        "nodes": nodes,
        "links": [],
        "groups": [],
        **facts,
    }


@pytest.fixture
def page(browser_context, comfy_server):
    client = comfy_server.client
    while client.get("/queue")["queue_running"]:
        time.sleep(0.05)
    client.post("/history", {"clear": True})
    frontend = open_page(browser_context, client.url)
    yield frontend
    frontend.page.evaluate(PERSIST, False)
    frontend.page.close()
    assert frontend.errors == []


def shown(page):
    """Badge and report of each node that has one."""
    return page.page.evaluate(SHOWN)


def run(page, server):
    """Run what is open to its end."""
    history = server.client.wait(page.queue(), timeout=240)
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    fit(page)


def until(page, expected):
    """Wait until badges and reports are those."""
    page.page.wait_for_function(
        f"(all) => JSON.stringify(({SHOWN})()) === JSON.stringify(all)",
        arg=expected,
        timeout=60_000,
    )


def test_a_reload_and_the_cache_lose_nothing(page, comfy_server):
    page.page.evaluate(PERSIST, True)
    page.load(workflow())
    run(page, comfy_server)
    page.page.wait_for_selector(f"[data-step='{STEPS}']", state="attached")
    before = shown(page)
    assert [number for number, *_ in before] == [1, 4, 6]
    assert "multiply integers" in before[1][2] and "2 experts" in before[2][2]

    page.load(training())  # another tab
    fit(page)
    assert shown(page) == []
    other, name = (
        tab(page),
        next(
            path
            for path in page.page.evaluate(
                "() => window.app.extensionManager.workflow.openWorkflows.map((one) => one.path)"
            )
            if path.endswith("Workflow (2).json")
        ),
    )
    page.reload()
    assert tab(page) == other and shown(page) == []
    go_to(page, name)
    until(page, before)
    page.reload()
    until(page, before)
    fit(page)
    assert tab(page) == name and count(page, "[data-step]") == STEPS
    assert page.errors == []

    # Everything is in the server's cache now; a page that was never here is told of it.
    told = comfy_server.client.object_info()["QuantTuneDynamicInt8"]
    if not told.get("has_intermediate_output"):
        return  # a host that tells of output nodes alone
    page.page.evaluate("() => sessionStorage.clear()")
    page.page.evaluate(PERSIST, False)
    page.reload()
    page.load(workflow())
    assert shown(page) == []
    run(page, comfy_server)
    until(page, before)
    assert page.errors == []


def test_what_a_page_missed_while_it_was_loaded_again(page, comfy_server):
    page.page.evaluate(PERSIST, True)
    page.load(training())
    pretend(page, "missed")
    output = {"quanttune_badge": ["4-bit · 0.40 GiB"], "text": ["done meanwhile"]}
    page.page.route(
        "**/history/missed",
        lambda route: route.fulfill(json={"missed": {"outputs": {"1": output}}}),
    )
    page.reload()
    until(page, [[1, "4-bit · 0.40 GiB", "done meanwhile"]])
    assert page.errors == []


def test_a_long_queue_is_of_the_workflow_it_came_from(page):
    output = {"quanttune_badge": ["4-bit · 0.40 GiB"], "text": ["the first of many"]}
    page.load(training())
    first = tab(page)
    for number in range(150):
        pretend(page, f"queued {number}")
    page.load(training())
    done = {"node": "1", "display_node": "1", "prompt_id": "queued 0", "output": output}
    send(page, "executed", done)
    assert shown(page) == []
    go_to(page, first)
    until(page, [[1, "4-bit · 0.40 GiB", "the first of many"]])
    kept = page.page.evaluate(
        "async (pack) => (await import(`/extensions/${pack}/js/places.js`)).kept().prompts",
        host_process.PACK_NAME,
    )
    assert ["queued 0", True] in [[prompt, open_] for prompt, _, open_ in kept]
    assert page.errors == []


@pytest.mark.parametrize("facts", [{}, {"id": SAME}], ids=["template", "same file twice"])
def test_messages_go_to_the_workflow_they_are_of(facts, page):
    output = {"quanttune_badge": ["4-bit · 0.40 GiB"], "text": ["of the first"]}
    done = {"node": "1", "display_node": "1", "prompt_id": "first", "output": output}
    page.load(training(**facts))
    first = tab(page)
    page.load(training(**facts))
    second = tab(page)
    go_to(page, first)
    pretend(page, "first")
    send(page, "execution_start", {"prompt_id": "first"})
    send(page, "quanttune.losses", losses(prompt="first"))
    assert count(page, ".quanttune-line") == 4
    go_to(page, second)
    send(page, "execution_start", {"prompt_id": "first"})  # as if it had waited until now
    send(page, "quanttune.losses", losses(prompt="first"))
    send(page, "quanttune.experts", sampling(prompt="first"))
    send(page, "executed", done)
    fit(page)
    assert shown(page) == []
    assert count(page, ".quanttune-line") == count(page, "[data-step]") == 0
    # The frontend took the output for one of the second workflow; going back there shows it.
    go_to(page, first)
    until(page, [[1, "4-bit · 0.40 GiB", "of the first"]])
    assert count(page, ".quanttune-line") == 4
    go_to(page, second)
    assert shown(page) == [] and count(page, ".quanttune-line") == 0
    # Of a prompt that nobody here has queued, with several workflows open: nobody knows.
    send(page, "executed", {**done, "prompt_id": "whose?"})
    assert shown(page) == []
    # What the second workflow runs itself is its own.
    pretend(page, "second")
    send(page, "executed", {**done, "prompt_id": "second", "output": {"text": ["of the second"]}})
    assert shown(page) == [[1, None, "of the second"]]
    send(page, "executed", {**done, "output": {"text": ["too late"]}})
    assert shown(page) == [[1, None, "of the second"]]
    assert page.errors == []


KEPT = """() => {
    window.dispatchEvent(new Event('pagehide'));
    return JSON.parse(sessionStorage.getItem('quanttune.drawn'));
}"""
SAID = {"quanttune_badge": ["4-bit · 0.40 GiB"], "text": ["of the first"]}


def done(number="1", prompt="first", **output):
    """A message of a node that has run."""
    return {"node": number, "display_node": number, "prompt_id": prompt, "output": output or SAID}


def reconnect(page, asked, last):
    """The connection was lost and is there again; what was asked for, up to the last of it."""
    asked.clear()
    send(page, "reconnected", None)
    end = time.monotonic() + 120
    while last not in asked and time.monotonic() < end:
        page.page.wait_for_timeout(50)
    return list(asked)


def test_a_second_tab_of_a_file_leaves_the_first_what_it_shows(page):
    page.load(training(id=SAME))
    first = tab(page)
    pretend(page, "first")
    send(page, "quanttune.losses", losses(prompt="first"))
    send(page, "executed", done())
    page.load(training(id=SAME))
    second = tab(page)
    fit(page)
    assert second != first and shown(page) == [] and count(page, ".quanttune-line") == 0
    send(page, "quanttune.losses", losses(280, prompt="first"))
    assert count(page, ".quanttune-line") == 0
    go_to(page, first)
    until(page, [[1, "4-bit · 0.40 GiB", "of the first"]])
    wait_for_text(page, "chart", "step 280 of 400")
    send(page, "quanttune.losses", losses(300, prompt="first"))
    wait_for_text(page, "chart", "step 300 of 400")
    # Both are told apart after a reload, too.
    page.page.evaluate(PERSIST, True)
    go_to(page, second)
    page.reload()
    fit(page)
    assert tab(page) == second and shown(page) == [] and count(page, ".quanttune-line") == 0
    page.reload()
    go_to(page, first)
    until(page, [[1, "4-bit · 0.40 GiB", "of the first"]])
    wait_for_text(page, "chart", "step 300 of 400")
    send(page, "quanttune.losses", losses(320, prompt="first"))
    wait_for_text(page, "chart", "step 320 of 400")
    assert page.errors == []


def test_what_the_server_knows_nothing_of_is_asked_for_once(page):
    page.load(training())
    for prompt in ("lost", "waits", "broken", "first"):
        pretend(page, prompt)
    asked = []

    def history(route):
        prompt = route.request.url.rpartition("/")[2]
        asked.append(prompt)
        if prompt == "broken":  # another pack's NaN
            return route.fulfill(body='{"broken": {"outputs": {"3": {"value": [NaN]}}}}')
        return route.fulfill(json={"first": {"outputs": {"1": SAID}}} if prompt == "first" else {})

    def queue(route):
        return route.fulfill(json={"queue_running": [], "queue_pending": [[1, "waits", {}]]})

    page.page.route("**/history/*", history)
    # A server that does not tell what waits may yet know of it.
    page.page.route("**/queue", lambda route: route.fulfill(status=500))
    assert reconnect(page, asked, "first") == ["lost", "waits", "broken", "first"]
    until(page, [[1, "4-bit · 0.40 GiB", "of the first"]])
    page.page.unroute("**/queue")
    page.page.route("**/queue", queue)
    assert reconnect(page, asked, "broken") == ["lost", "broken"]
    assert reconnect(page, asked, "broken") == ["broken"]
    assert page.errors == []


def test_only_what_can_be_drawn_is_kept(page):
    page.load(workflow(id=SAME))
    pretend(page, "first")
    send(page, "executed", done())
    send(page, "executed", done("9", text=["of another pack"]))
    page.load(training())
    send(page, "executed", done("4", text=["of ours"]))
    send(page, "executed", done("10", text=["of another pack"]))
    kept = page.page.evaluate(KEPT)
    assert sorted(number for _, number, _ in kept["nodes"]) == ["1", "4"]
    assert {graph for graph, *_ in kept["nodes"]} == {SAME}
    # Storage that is full, and none at all.
    page.page.evaluate("""() => {
        const set = Storage.prototype.setItem;
        window.room = 2000;
        Storage.prototype.setItem = function (key, value) {
            if (value.length > window.room) throw new DOMException('full', 'QuotaExceededError');
            return set.call(this, key, value);
        };
    }""")
    pretend(page, "losses")
    send(page, "quanttune.losses", losses(prompt="losses"))
    kept = page.page.evaluate(KEPT)
    assert kept["nodes"] == [] and "losses" in [prompt for prompt, *_ in kept["prompts"]]
    assert page.errors == []
    page.page.evaluate("() => { window.room = 0 }")
    assert page.page.evaluate(KEPT) is None
    assert len(page.errors) == 1 and "full" in page.errors.pop()
    page.page.evaluate("() => { window.room = Infinity }")


def test_another_node_of_the_same_number_has_nothing_of_the_former(page):
    page.load(training(id=SAME))
    pretend(page, "first")
    send(page, "executed", done())
    changed = training(id=SAME)
    changed["nodes"][0]["type"] = "QuantTuneLoadStarterModel"
    page.page.evaluate("""async (changed) => {
        const { activeWorkflow } = window.app.extensionManager.workflow;
        await window.app.loadGraphData(changed, true, true, activeWorkflow);
    }""", changed)
    send(page, "executed", done("6", text=["draw"]))
    fit(page)
    assert shown(page) == [[6, None, "draw"]]
    assert page.errors == []
