"""The real frontend in a headless Chromium, opened on the test run's server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quanttune.devtools.frontend import Frontend, browser, find_chromium, open_page

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"


# Not for the whole run: while Playwright's synchronous interface is open, an event loop runs in
# this thread, and no other test could use asyncio.
@pytest.fixture(scope="module")
def browser_context() -> Iterator[Any]:
    """One Chromium for the browser tests of a file; missing it fails under CI, else they skip."""
    if find_chromium() is None:
        reason = "no Chromium found: install it, or name it in QUANTTUNE_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browser() as context:
        yield context


@pytest.fixture
def frontend_page(browser_context, comfy_server) -> Iterator[Frontend]:
    """A new tab with the frontend ready: `load`, `unknown_types`, `graph_to_prompt`, `queue`, …

    The test fails if an error is left in `errors` at its end.
    """
    comfy_server.forget_jobs()
    page = open_page(browser_context, comfy_server.client.url)
    try:
        yield page
    finally:
        page.page.close()
    assert page.errors == [], "the page has errors in its console"
