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
