"""Pictures of the documentation, made by the browser tests themselves.

With ``QUANTTUNE_DOCS_IMAGES=1`` the tests that see something worth showing write it to its place in
`docs/images` or `web/docs/images`; without it they only look.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WANTED = os.environ.get("QUANTTUNE_DOCS_IMAGES") == "1"


def save(
    screenshot: bytes,
    path: Path,
    *,
    limit: int,
    width: int | None = None,
    box: tuple[int, int, int, int] | None = None,
) -> Path:
    """Write a screenshot (PNG) as WebP of at most `limit` bytes, in the best quality that fits.

    Args:
        path: where to; its folder is made.
        width: pixels to scale it down to.
        box: what to cut out before: left, top, right, bottom.

    Raises:
        ValueError: even the poorest quality is too large.
    """
    from PIL import Image

    picture: Any = Image.open(io.BytesIO(screenshot)).convert("RGB")
    if box is not None:
        picture = picture.crop(box)
    if width is not None and picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)))
    for quality in (90, 82, 74, 66, 58, 50, 40, 30, 20):
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=quality, method=6)
        if data.tell() <= limit:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.getvalue())
            return path
    raise ValueError(f"{path.name} of {picture.size} does not fit into {limit} bytes")


# What lies around a workflow on the page: side bar and tabs, and room at the other ends.
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 110, 50, 80
_SETTINGS = {
    "Comfy.RightSidePanel.IsOpen": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # texts stay texts however far it is zoomed out
}
_BOUNDS = """() => {
    const boxes = [...window.app.rootGraph.groups, ...window.app.rootGraph.nodes]
        .map(x => [x.pos[0], x.pos[1] - 30, x.pos[0] + x.size[0], x.pos[1] + x.size[1]]);
    return [Math.min, Math.min, Math.max, Math.max].map((f, i) => f(...boxes.map(b => b[i])));
}"""
_LOOK_AT = """([scale, left, top]) => {
    const { ds } = window.app.canvas;
    ds.scale = scale;
    ds.offset = [left, top];
    window.app.canvas.setDirty(true, true);
}"""
# Where the tests' own folder lies is nobody's business.
_HIDE_FOLDERS = """() => window.app.rootGraph.nodes.flatMap(n => n.widgets ?? [])
    .filter(w => w.name === 'quanttune_report')
    .forEach(w => { w.value = w.value.replace(/\\S+[\\\\/](?=output[\\\\/])/g, '') })"""
# The frontend gives up on a picture that a busy server is slow to send; without `images` it asks
# again.
_PICTURES_ARE_THERE = """() => {
    const outputs = Object.entries(window.app.nodeOutputs ?? {});
    const missing = outputs.filter(([, output]) => output?.images?.length)
        .map(([id]) => window.app.rootGraph.getNodeById(Number(id)))
        .filter(node => node && !(node.imgs?.length && node.imgs.every(i => i.complete)));
    missing.forEach(node => { node.images = undefined });
    window.app.canvas.setDirty(true, true);
    return missing.length === 0;
}"""


def whole_graph(frontend: Any, zoom: float = 0.75) -> bytes:
    """A screenshot (PNG) of the page with the whole workflow at about `zoom`, its pictures loaded.

    The window takes the workflow's shape, so that little of it is empty.
    """
    page = frontend.page
    left, top, right, bottom = page.evaluate(_BOUNDS)
    width = max(1600, min(2900, round((right - left) * zoom) + _LEFT + _RIGHT))
    height = max(760, min(1900, round((bottom - top) * zoom) + _TOP + _BOTTOM))
    page.set_viewport_size({"width": width, "height": height})
    scale = min(
        (width - _LEFT - _RIGHT) / (right - left), (height - _TOP - _BOTTOM) / (bottom - top), 1.0
    )
    for name, value in _SETTINGS.items():
        page.evaluate(
            "async ([n, v]) => { await window.app.extensionManager.setting.set(n, v) }",
            [name, value],
        )
    page.wait_for_timeout(500)
    page.evaluate(_LOOK_AT, [scale, _LEFT / scale - left, _TOP / scale - top])
    page.evaluate(_HIDE_FOLDERS)
    page.wait_for_function(_PICTURES_ARE_THERE, timeout=120_000, polling=3000)
    page.wait_for_timeout(1000)  # the move to the new view, and a frame of all of it
    return page.screenshot()
