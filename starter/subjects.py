"""Two subjects that no training picture shows, for personalisation.

`pip`, an owl-like character with two big eyes, and `crest`, a shield with a bolt. Run as a module
(`python -m quanttune.starter.subjects`) to draw the shipped pictures and captions again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .generator import POSITIONS, SIZE, grid_coordinates, paint_background, paint_object
from .shapes import polygon

Array = np.ndarray

SUBJECTS = {"pip": ("sks", "character"), "crest": ("zwx", "emblem")}
"""Subject -> (identifier in its captions, class noun)."""

VIEWS = (
    ("white", "plain", "centre", 0.34, 0.00),
    ("blue", "gradient", "centre", 0.28, 0.10),
    ("yellow", "plain", "left", 0.26, -0.08),
    ("green", "grid", "right", 0.26, 0.06),
    ("pink", "plain", "bottom", 0.26, 0.00),
    ("gray", "rays", "centre", 0.36, -0.05),
)
"""Background, texture, position, radius in picture sides, rotation in radians: one a picture."""


def ellipse(u: Array, v: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """Approximate signed distance to an axis-aligned ellipse, unit as u and v."""
    return (np.hypot((u - cx) / rx, (v - cy) / ry) - 1) * np.float32(min(rx, ry))


def pip(u: Array, v: Array) -> list[tuple[Array, tuple[int, int, int]]]:
    """Parts of the character from back to front: (distance, colour 0..255)."""
    left = polygon(u, v, [(-0.66, -0.95), (-0.08, -0.55), (-0.66, -0.15)]) - 0.06
    right = polygon(u, v, [(0.66, -0.95), (0.66, -0.15), (0.08, -0.55)]) - 0.06
    return [
        (np.minimum(left, right), (226, 96, 60)),
        (ellipse(u, v, 0, 0.12, 0.80, 0.84), (24, 150, 150)),
        (ellipse(u, v, 0, 0.50, 0.48, 0.40), (250, 226, 170)),
        (ellipse(np.abs(u), v, 0.36, -0.14, 0.33, 0.33), (250, 250, 246)),
        (ellipse(np.abs(u), v, 0.32, -0.12, 0.15, 0.16), (28, 28, 40)),
        (polygon(u, v, [(-0.15, 0.10), (0.15, 0.10), (0.0, 0.36)]) - 0.03, (250, 160, 30)),
    ]


def crest(u: Array, v: Array) -> list[tuple[Array, tuple[int, int, int]]]:
    """Parts of the emblem from back to front: (distance, colour 0..255)."""
    half = np.abs(u)
    outline = np.maximum(ellipse(half, v, -0.38, -0.55, 1.2, 1.5), -0.85 - v) - 0.04
    bolt = polygon(u, v, [(0.18, -0.72), (-0.42, 0.10), (-0.06, 0.10), (-0.20, 0.66),
                          (0.44, -0.20), (0.08, -0.20)])  # fmt: skip
    return [
        (outline, (236, 190, 60)),
        (outline + 0.15, (44, 52, 120)),
        (np.maximum(outline + 0.15, u), (190, 36, 70)),
        (bolt - 0.03, (252, 246, 232)),
    ]


PARTS = {"pip": pip, "crest": crest}


def draw(
    name: str,
    background: str,
    texture: str,
    position: str,
    radius: float,
    rotation: float,
    seed: int,
) -> Array:
    """One picture of a subject: uint8, SIZE x SIZE x 3; arguments as a row of `VIEWS`."""
    rng = np.random.default_rng(seed)
    canvas = paint_background(background, texture, rng)
    x, y = grid_coordinates()
    px, py = POSITIONS[position]
    limit = 0.47 - radius
    dx = x - np.float32(np.clip(px, -limit, limit))
    dy = y - np.float32(np.clip(py, -limit, limit))
    cos, sin = np.float32(np.cos(rotation)), np.float32(np.sin(rotation))
    u, v = (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius
    for number, (distance, colour) in enumerate(PARTS[name](u, v)):
        tone = np.array(colour, np.float32) / 255
        albedo = np.broadcast_to(tone, canvas.shape)
        pixels = distance * np.float32(radius * SIZE)
        canvas = paint_object(
            canvas, pixels, albedo, (u, v), tone * 0.62, 0.30 if number == 0 else 0.06
        )
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def caption(name: str, background: str, texture: str, position: str) -> str:
    """What a subject's picture shows, in the words the model was trained on."""
    identifier, noun = SUBJECTS[name]
    place = {
        "centre": "",
        "left": " on the left",
        "right": " on the right",
        "top": " at the top",
        "bottom": " at the bottom",
    }[position]
    ground = {
        "plain": "{} background",
        "gradient": "{} gradient background",
        "rays": "{} background with rays",
        "grid": "{} background with a grid",
    }[texture]
    return f"a {identifier} {noun}{place} on a {ground.format(background)}"


def write(folder: Path | str | None = None) -> None:
    """Draw every subject's pictures as PNG, each with a text file of its caption."""
    from PIL import Image

    root = Path(folder or Path(__file__).resolve().parent / "subjects")
    for name in SUBJECTS:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number, view in enumerate(VIEWS, 1):
            picture = Image.fromarray(draw(name, *view, seed=number))
            picture.save(root / name / f"{number:02d}.png", optimize=True)
            text = caption(name, *view[:3]) + "\n"
            (root / name / f"{number:02d}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
