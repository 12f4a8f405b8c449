"""Procedural captioned pictures: the starter model's whole world.

A `Scene` says what a picture shows, `render` draws it, `captions.describe` says it in words. All
randomness comes from the integer seed given to `sample`; the same seed gives the same bytes.
Needs numpy alone, and Pillow only to save.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from .shapes import SHAPES

SIZE = 128
"""Side of a picture in pixels where no other is asked for; widths in pixels are for this side."""

COLOURS = {
    "red": (222, 44, 48),
    "orange": (246, 136, 24),
    "yellow": (252, 212, 40),
    "green": (42, 158, 70),
    "cyan": (36, 190, 204),
    "blue": (38, 84, 216),
    "purple": (132, 58, 190),
    "pink": (248, 122, 180),
    "white": (246, 246, 244),
    "black": (38, 38, 44),
}
"""Object colours, sRGB 0..255."""

BACKGROUNDS = {
    "red": (196, 74, 74),
    "orange": (242, 172, 104),
    "yellow": (248, 226, 128),
    "green": (136, 192, 132),
    "blue": (112, 160, 224),
    "purple": (168, 138, 210),
    "pink": (248, 192, 212),
    "gray": (146, 150, 156),
    "white": (240, 239, 234),
    "black": (44, 46, 54),
}
"""Background colours, sRGB 0..255: muted, so that objects stand out."""

FILLS = ("plain", "striped", "dotted", "checked")
TEXTURES = ("plain", "gradient", "rays", "grid")
POSITIONS = {
    "centre": (0.0, 0.0),
    "left": (-0.23, 0.0),
    "right": (0.23, 0.0),
    "top": (0.0, -0.23),
    "bottom": (0.0, 0.23),
}
"""Position word -> offset of the object's middle from the picture's, in picture sides."""
SIZES = {"small": 0.185, "medium": 0.26, "large": 0.36}
"""Size word -> the object's radius in picture sides."""

UPRIGHT = {"square", "diamond", "cross", "triangle", "heart"}

Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    The first seven fields are words that a caption may use; `rotation` (radians), `offset`
    (picture sides), `scale` (factor on the size) and `noise_seed` are the variation between two
    pictures of the same words.
    """

    shape: str
    colour: str
    background: str
    fill: str = "plain"
    texture: str = "plain"
    position: str = "centre"
    size: str = "medium"
    rotation: float = 0.0
    offset: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    noise_seed: int = 0


def held_out(shape: str, colour: str, background: str) -> bool:
    """Whether a (shape, colour, background) triple is kept out of every training picture.

    One triple in ten is, by a hash that is the same on every machine.
    """
    return zlib.crc32(f"{shape}/{colour}/{background}".encode()) % 10 == 0


def sample(seed: int, held: bool | None = False) -> Scene:
    """Draw a random scene.

    held: False gives only training triples, True only held-out ones, None both.
    """
    rng = np.random.default_rng(seed)
    while True:
        shape = str(rng.choice(list(SHAPES)))
        colour = str(rng.choice(list(COLOURS)))
        background = str(rng.choice(list(BACKGROUNDS)))
        if colour != background and (held is None or held_out(shape, colour, background) == held):
            break
    fill = str(rng.choice(FILLS, p=[0.55, 0.15, 0.15, 0.15]))
    texture = str(rng.choice(TEXTURES, p=[0.55, 0.21, 0.12, 0.12]))
    position = str(rng.choice(list(POSITIONS), p=[0.52, 0.12, 0.12, 0.12, 0.12]))
    size = str(rng.choice(list(SIZES), p=[0.2, 0.55, 0.25]))
    scene = Scene(shape, colour, background, fill, texture, position, size)
    return vary(scene, int(rng.integers(2**31)))


def vary(scene: Scene, seed: int) -> Scene:
    """The same words with another rotation, small displacement, scale and shade."""
    rng = np.random.default_rng(seed)
    tilt = 0.10 if scene.shape in UPRIGHT else 0.22
    return replace(
        scene,
        rotation=float(np.clip(rng.normal(0, tilt / 1.5), -tilt, tilt)),
        offset=tuple(float(v) for v in rng.uniform(-0.025, 0.025, 2)),
        scale=float(rng.uniform(0.92, 1.08)),
        noise_seed=int(rng.integers(2**31)),
    )


def smoothstep(low: float, high: float, value: Array) -> Array:
    """Hermite step from 0 at `low` to 1 at `high`."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def edge(low: float, high: float, value: Array, size: int) -> Array:
    """`smoothstep` of a drawn edge that is low..high wide at `SIZE` pixels and as many pixels wide
    at any other size."""
    inset = (high - low) / 2 * (1 - SIZE / size)
    return smoothstep(low + inset, high - inset, value)


def grid_coordinates(size: int = SIZE) -> tuple[Array, Array]:
    """Pixel centres in picture sides, 0 in the middle: x to the right, y down, float32."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5).astype(np.float32)
    return np.meshgrid(line, line)


def paint_background(
    background: str, texture: str, rng: np.random.Generator, size: int = SIZE
) -> Array:
    """A background of `size` x `size` x 3, float32 0..1."""
    x, y = grid_coordinates(size)
    base = np.array(BACKGROUNDS[background], np.float32) / 255
    base = np.clip(base * (1 + rng.uniform(-0.04, 0.04)) + rng.uniform(-0.012, 0.012, 3), 0, 1)
    base = base.astype(np.float32)
    light = np.ones_like(x)
    strength = 0.10 if background != "black" else 0.35
    if texture == "gradient":
        light = 1 - y * np.float32(4.2 * strength) - np.float32(strength * 0.7)
    elif texture == "rays":
        angle = np.arctan2(y, x) + rng.uniform(0, np.pi / 6)
        soft = np.clip(np.sin(angle * 12) * np.hypot(x, y) * 18, -1, 1)
        light = 1 + soft.astype(np.float32) * np.float32(strength * 0.8)
    elif texture == "grid":
        step = 0.125
        shift = rng.uniform(0, step, 2).astype(np.float32)
        gx = np.abs(np.mod(x + shift[0], step) - step / 2)
        gy = np.abs(np.mod(y + shift[1], step) - step / 2)
        line = 1 - edge(0.006, 0.014, np.minimum(gx, gy), size)
        light = 1 - line * np.float32(strength * 1.5)
    if background == "black" and texture != "plain":
        return np.clip(base + (light - 1)[..., None] * np.float32(0.30), 0, 1)
    vignette = 1 - 0.10 * np.square(np.hypot(x, y) / 0.7)
    return np.clip(base * (light * vignette)[..., None], 0, 1)


def pattern(fill: str, x: Array, y: Array, rng: np.random.Generator, size: int = SIZE) -> Array:
    """How much of the second colour each point carries, 0..1; `x, y` in picture sides, of which
    each is `size` pixels."""
    if fill == "striped":
        angle = np.pi / 4 + rng.uniform(-0.12, 0.12)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / 0.115)
        return edge(-0.18, 0.18, wave, size)
    if fill == "dotted":
        step = 0.125
        row = np.floor(y / (step * 0.866) + 0.5)
        dx = np.mod(x + row * step / 2, step) - step / 2
        dy = y - row * step * 0.866
        return 1 - edge(0.030, 0.042, np.hypot(dx, dy), size)
    if fill == "checked":
        wave = np.sin(x * np.pi / 0.1) * np.sin(y * np.pi / 0.1)
        return edge(-0.14, 0.14, wave, size)
    return np.zeros_like(x)


def second_colour(colour: str) -> Array:
    """The colour that a pattern adds to an object of this colour, float32 0..1."""
    base = np.array(COLOURS[colour], np.float32) / 255
    if colour == "white":
        return np.array([0.70, 0.73, 0.78], np.float32)
    if colour == "black":
        return np.array([0.42, 0.43, 0.47], np.float32)
    return base * 0.28 + 0.72


def paint_object(
    canvas: Array,
    distance: Array,
    albedo: Array,
    local: tuple[Array, Array],
    rim: Array,
    shade: float = 0.30,
) -> Array:
    """Lay a shaded object with a soft shadow on a canvas.

    canvas, albedo: n x n x 3 in 0..1; distance: signed distance in pixels, n x n; local: the
    object's own coordinates (unit = its radius), used for the light; rim: colour of the outline;
    shade: darkness of the shadow. Rim and shadow grow with n, edges stay about a pixel wide.
    """
    u, v = local
    size = canvas.shape[0]
    unit = size / SIZE
    down, right = round(4 * unit), round(3 * unit)
    shadow = np.pad(distance, ((down, 0), (right, 0)), "edge")[:size, :size]
    dark = shade * (1 - smoothstep(-5 * unit, 6 * unit, shadow))
    canvas = canvas * (1 - dark)[..., None]
    light = 1.04 - 0.14 * (u + v) / 1.4
    gloss = np.exp(-(np.square(u + 0.42) + np.square(v + 0.48)) / 0.10) * 0.22
    body = np.clip(albedo * light[..., None] + gloss[..., None], 0, 1)
    inset = 2.4 * (unit - 1)
    rim_share = smoothstep(-3.2 - inset, -1.6 - inset, distance)[..., None]
    body = body * (1 - rim_share) + rim * rim_share
    cover = (1 - smoothstep(-0.7, 0.7, distance))[..., None]
    return canvas * (1 - cover) + body * cover


def add_object(
    canvas: Array,
    scene: Scene,
    rng: np.random.Generator,
    centre: tuple[float, float],
    radius: float,
) -> Array:
    """Paint a scene's object on a canvas at `centre`, both it and `radius` in picture sides."""
    size = canvas.shape[0]
    x, y = grid_coordinates(size)
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = np.float32(np.cos(scene.rotation)), np.float32(np.sin(scene.rotation))
    rx, ry = dx * cos + dy * sin, dy * cos - dx * sin
    u, v = rx / np.float32(radius), ry / np.float32(radius)
    distance = SHAPES[scene.shape](u, v) * np.float32(radius * size)
    base = np.array(COLOURS[scene.colour], np.float32) / 255
    base = np.clip(base * (1 + rng.uniform(-0.05, 0.05)) + rng.uniform(-0.015, 0.015, 3), 0, 1)
    share = pattern(scene.fill, rx, ry, rng, size)[..., None]
    albedo = base * (1 - share) + second_colour(scene.colour) * share
    rim = base * 0.62 if scene.colour != "black" else base * 0.4
    return paint_object(canvas, distance, albedo, (dx / radius, dy / radius), rim)


def render(scene: Scene, size: int = SIZE) -> Array:
    """Draw a scene: uint8, `size` x `size` x 3, sRGB.

    Another size is the same picture with more or less detail: all that is seen keeps its place
    and its share of the picture.
    """
    rng = np.random.default_rng(scene.noise_seed)
    canvas = paint_background(scene.background, scene.texture, rng, size)
    radius = SIZES[scene.size] * scene.scale
    keep_in = max(0.5 - radius - 0.02, 0.0)
    middle = np.add(POSITIONS[scene.position], scene.offset)
    cx, cy = (float(np.clip(m, -keep_in, keep_in)) for m in middle)
    canvas = add_object(canvas, scene, rng, (cx, cy), radius)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def clutter(seed: int, size: int = SIZE) -> Array:
    """A picture of several overlapping objects of all sizes, for the autoencoders and the
    upscaler: uint8, `size` x `size` x 3."""
    rng = np.random.default_rng(seed)
    scene = sample(seed)
    canvas = paint_background(scene.background, scene.texture, rng, size)
    for i in range(int(rng.integers(4, 9))):
        scene = sample(seed * 31 + i)
        centre = tuple(float(c) for c in rng.uniform(-0.45, 0.45, 2))
        canvas = add_object(canvas, scene, rng, centre, float(rng.uniform(0.06, 0.3)))
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
