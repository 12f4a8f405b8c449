"""Signed distance fields of the shapes the starter model draws.

Every function takes two float32 arrays ``x, y`` (any equal shape, y pointing down, unit = the
object's radius) and returns the distance to the outline in the same unit: negative inside, zero on
the outline, positive outside. Distances are exact or a close lower bound, which is all that
anti-aliasing, rims and shadows need. Formulas for the polygonal ones follow Inigo Quilez,
"2D distance functions".
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def circle(x: Array, y: Array) -> Array:
    """Disc of radius 0.88."""
    return np.hypot(x, y) - np.float32(0.88)


def square(x: Array, y: Array) -> Array:
    """Square of half side 0.76 with slightly rounded corners."""
    qx, qy = np.abs(x) - 0.68, np.abs(y) - 0.68
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - np.float32(0.08)


def diamond(x: Array, y: Array) -> Array:
    """Upright rhombus, taller than wide, so that a tilted square is never mistaken for it."""
    a, b = 0.66, 1.0
    distance = (np.abs(x) / a + np.abs(y) / b - 1) / np.float32(np.hypot(1 / a, 1 / b))
    return distance


def polygon(x: Array, y: Array, points: list[tuple[float, float]]) -> Array:
    """Exact distance to a closed polygon given by its corners in order."""
    best = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    previous = points[-1]
    for px, py in points:
        ex, ey = previous[0] - px, previous[1] - py
        wx, wy = x - np.float32(px), y - np.float32(py)
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        bx, by = wx - ex * t, wy - ey * t
        best = np.minimum(best, bx * bx + by * by)
        above, below = y >= py, y < previous[1]
        side = ex * wy > ey * wx
        inside ^= (above & below & side) | (~above & ~below & ~side)
        previous = (px, py)
    return np.sqrt(best) * np.where(inside, np.float32(-1), np.float32(1))


def triangle(x: Array, y: Array) -> Array:
    """Upright triangle with rounded corners."""
    return polygon(x, y, [(0.0, -0.86), (0.84, 0.68), (-0.84, 0.68)]) - np.float32(0.07)


def star(x: Array, y: Array) -> Array:
    """Five-pointed star."""
    points = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else 0.45
        angle = np.pi * (i / 5 - 0.5)
        points.append((radius * np.cos(angle), radius * np.sin(angle) + 0.05))
    return polygon(x, y, points) - np.float32(0.04)


def heart(x: Array, y: Array) -> Array:
    """Heart, point down."""
    x = np.abs(x) / 1.45
    y = (0.80 - y) / 1.45
    far = np.hypot(x - 0.25, y - 0.75) - np.float32(np.sqrt(2) / 4)
    top = x**2 + (y - 1) ** 2
    m = 0.5 * np.maximum(x + y, 0)
    low = (x - m) ** 2 + (y - m) ** 2
    near = np.sqrt(np.minimum(top, low)) * np.sign(x - y)
    return np.where(y + x > 1, far, near) * np.float32(1.45)


def cross(x: Array, y: Array) -> Array:
    """Upright plus sign with arms of half width 0.3."""
    ax, ay = np.abs(x), np.abs(y)
    ax, ay = np.maximum(ax, ay), np.minimum(ax, ay)
    qx, qy = ax - 0.88, ay - 0.30
    k = np.maximum(qy, qx)
    outer = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    inner = -np.hypot(np.maximum(0.30 - ax, 0), np.maximum(-k, 0))
    return np.where(k > 0, outer, inner) - np.float32(0.03)


def moon(x: Array, y: Array) -> Array:
    """Crescent opening to the upper right."""
    x = x - 0.12
    full = np.hypot(x, y) - np.float32(0.95)
    bite = np.hypot(x - 0.48, y + 0.20) - np.float32(0.74)
    return np.maximum(full, -bite)


def ring(x: Array, y: Array) -> Array:
    """Ring of middle radius 0.66 and width 0.48."""
    return np.abs(np.hypot(x, y) - np.float32(0.66)) - np.float32(0.24)


def flower(x: Array, y: Array) -> Array:
    """Six round petals about a round middle."""
    angle = np.arctan2(y, x)
    sector = np.float32(np.pi / 3)
    angle = np.mod(angle + sector / 2, sector) - sector / 2
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    petal = np.hypot(px - 0.60, py) - np.float32(0.35)
    return np.minimum(petal, radius - np.float32(0.5))


SHAPES = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "cross": cross,
    "moon": moon,
    "ring": ring,
    "diamond": diamond,
    "flower": flower,
}
"""Shape name -> distance field, in the order of the classifier's outputs."""
