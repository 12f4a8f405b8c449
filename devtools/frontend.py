"""The real ComfyUI frontend in a headless Chromium, driven through Playwright."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .console import Stop

CHROMIUM_NAMES = (
    "chromium",
    "chromium-headless-shell",
    "chromium-browser",
    "google-chrome",
    "chrome",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# The page opens an empty workflow by itself; before that is there, ours would be replaced by it.
# Frontends of ComfyUI 0.18 open none when no former workflow is to be restored.
_STARTED = "() => window.app?.extensionManager && window.app.vueAppReady"
_READY = "() => window.app.extensionManager.workflow?.activeWorkflow"
_OPEN_EMPTY = "() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
# No welcome window over the graph, no workflow left over from another tab.
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
PATIENCE = 120_000
"""Milliseconds after which the page is given up on, whatever is waited for: a busy machine may take
a long time over what an idle one does at once."""
# Requests to the internet are cut off on purpose, so their failures are not the page's.
_NOT_OURS = (
    "net::ERR_",
    "Failed to load resource",
    "Failed to fetch",
    "Network Error",
    "Content Security Policy",
    # Every start of this frontend says so, with no workflow and no pack.
    "ComfyApp graph accessed before initialization",
)


def find_chromium() -> str | None:
    """Path of a Chromium: the one QUANTTUNE_CHROMIUM names, or the first known one on PATH."""
    named = os.environ.get("QUANTTUNE_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


class Frontend:
    """One page of the frontend.

    Attributes:
        page: Playwright's page.
        errors: what the page wrote to its console as an error, its uncaught exceptions, and what
            the pack's scripts complain of (they catch their errors, so that the page goes on).
    """

    def __init__(self, page: Any, url: str):
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.request.post(f"{url}/settings", data=_SETTINGS)
        page.goto(url, wait_until="domcontentloaded")
        self._wait()

    def reload(self) -> None:
        """Load the page again, as the browser's button does."""
        self.page.reload(wait_until="domcontentloaded")
        self._wait()

    def _wait(self) -> None:
        from playwright.sync_api import TimeoutError

        page = self.page
        page.wait_for_function(_STARTED)
        try:
            page.wait_for_function(_READY, timeout=PATIENCE / 2)
        except TimeoutError:
            page.evaluate(_OPEN_EMPTY)
            page.wait_for_function(_READY)

    def _on_console(self, message: Any) -> None:
        if message.type == "error" or message.text.startswith("QuantTune"):
            self._note(message.text)

    def _note(self, text: str) -> None:
        if not any(part in text for part in _NOT_OURS):
            self.errors.append(text)

    def load(self, workflow: dict[str, Any], name: str | None = None) -> None:
        """Open a workflow (UI format) as if the user had dropped its file on the page.

        With a `name` its tab has that, as that of a template has the template's.
        """
        self.page.evaluate(
            "async ([w, n]) => { await window.app.loadGraphData(w, true, true, n) }",
            [workflow, name],
        )

    def load_api(self, graph: dict[str, Any], name: str = "graph.json") -> None:
        """Open a graph in API format; the frontend lays it out."""
        self.page.evaluate(
            "async ([g, n]) => { await window.app.loadApiJson(g, n) }", [graph, name]
        )

    def unknown_types(self) -> list[str]:
        """Types of the open workflow's nodes that the frontend does not know."""
        return self.page.evaluate(
            """() => [...new Set(window.app.rootGraph.nodes.map(n => n.type))].filter(
                t => !(t in window.LiteGraph.registered_node_types)
                     && !(window.app.rootGraph.subgraphs?.has?.(t)))"""
        )

    def graph_to_prompt(self) -> dict[str, Any]:
        """The open workflow as {"output": graph in API format, "workflow": UI format}."""
        return self.page.evaluate(
            "async () => { const p = await window.app.graphToPrompt();"
            " return JSON.parse(JSON.stringify(p)) }"
        )

    def queue(self) -> str:
        """Press Run; returns the prompt id that the server gave."""
        with self.page.expect_response(
            lambda r: r.url.endswith("/prompt") and r.request.method == "POST"
        ) as answer:
            self.page.evaluate("async () => { await window.app.queuePrompt(0, 1) }")
        if answer.value.status != 200:
            raise AssertionError(f"the server refused the workflow: {answer.value.text()}")
        return answer.value.json()["prompt_id"]

    def screenshot(self, path: Path, *, fit: bool = True) -> Path:
        """Save a picture of the page, with the whole workflow in view unless `fit` is False."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if fit:
            self.page.evaluate(
                "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
            )
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=str(path))
        return path


@contextlib.contextmanager
def browser(width: int = 1600, height: int = 1000) -> Iterator[Any]:
    """A headless Chromium with a profile of its own, cut off from the internet.

    Yields Playwright's browser context. Raises `Stop` when Chromium or Playwright is missing.
    """
    with browsers(1, width, height) as (context,):
        yield context


@contextlib.contextmanager
def browsers(count: int, width: int = 1600, height: int = 1000) -> Iterator[list[Any]]:
    """Several of `browser` at once: each is a process with a profile of its own."""
    chromium = find_chromium()
    if chromium is None:
        raise Stop("No Chromium was found: install it, or name it in QUANTTUNE_CHROMIUM.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise Stop("The Python package playwright is missing: pip install playwright.") from error
    with contextlib.ExitStack() as stack:
        profiles = [
            stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            for _ in range(count)
        ]
        play = stack.enter_context(sync_playwright())
        contexts = []
        for profile in profiles:
            context = play.chromium.launch_persistent_context(
                profile,
                executable_path=chromium,
                headless=True,
                args=list(FLAGS),
                viewport={"width": width, "height": height},
                timeout=PATIENCE,
            )
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE)
            context.route(
                lambda url: "://127.0.0.1" not in url and url.startswith("http"),
                lambda r: r.abort(),
            )
            contexts.append(context)
        yield contexts


def open_page(context: Any, url: str) -> Frontend:
    """Open the frontend of the server at `url` in a new tab."""
    return Frontend(context.new_page(), url)


def _convert(url: str, source: str, target: str) -> None:
    """Write the graph in API format of the workflow file `source` to the file `target`."""
    workflow = json.loads(Path(source).read_text("utf-8"))
    with browser() as context:
        page = open_page(context, url)
        page.load(workflow)
        Path(target).write_text(json.dumps(page.graph_to_prompt()["output"]), "utf-8")


if __name__ == "__main__":
    try:
        _convert(*sys.argv[1:4])
    except Stop as stop:
        sys.exit(str(stop))
