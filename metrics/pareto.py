"""Quality against size and time: the ways of quantizing that nothing else beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .charts import INK, as_written, new_figure, render_figure
from .markdown import table

FRONT, OFF = "#b3432f", "#9aa3b5"
COLUMNS = ("model", "MiB", "bits a weight", "time x float", "output error", "SSIM", "front")


@dataclass(frozen=True)
class Point:
    """One way of holding a model.

    Attributes:
        name: of the way.
        size: bytes of the weights that can be quantized, float16 where they are not.
        bits: a weight on average, scales included.
        time: of a step, over the float model's, measured.
        error: relative, of the model's output.
        ssim: of its pictures with the float model's, or None.
        quantized: whether any layer is.
    """

    name: str
    size: int
    bits: float
    time: float
    error: float
    ssim: float | None = None
    quantized: bool = True


def front(points: Sequence[Point], cost: str = "size") -> list[Point]:
    """Those that no other point beats in both ``cost`` ("size" or "time") and error, by cost."""
    found: list[Point] = []
    usable = [p for p in points if math.isfinite(p.error)]
    for point in sorted(usable, key=lambda p: (getattr(p, cost), p.error)):
        if not found or point.error < found[-1].error:
            found.append(point)
    return found


def _marks(point: Point, points: Sequence[Point]) -> str:
    marks = [cost for cost in ("size", "time") if point in front(points, cost)]
    return ", ".join(marks)


def markdown(points: Sequence[Point]) -> str:
    """The table, the largest first; "front" says in which cost nothing beats a row."""
    return table(COLUMNS, [
        (p.name, f"{p.size / 2**20:.1f}", f"{p.bits:.2f}", f"{p.time:.2f}", f"{p.error:.2%}",
         "" if p.ssim is None else f"{p.ssim:.3f}", _marks(p, points))
        for p in sorted(points, key=lambda p: -p.size)])


def csv(points: Sequence[Point]) -> str:
    """The table as comma-separated values."""
    lines = [",".join(COLUMNS)]
    for p in points:
        ssim = "" if p.ssim is None else f"{p.ssim:.6g}"
        lines.append(f'"{p.name}",{p.size / 2**20:.6g},{p.bits:.6g},{p.time:.6g},{p.error:.6g},'
                     f'{ssim},"{_marks(p, points)}"')
    return "\n".join(lines) + "\n"


def chart(points: Sequence[Point]) -> Image.Image:
    """Error over size and over time, the fronts drawn through."""
    figure = new_figure(1200, 520)
    for axes, cost, label in zip(figure.subplots(1, 2, sharey=True), ("size", "time"),
                                 ("weights, MiB", "time of a step over the float model's")):
        _panel(axes, points, cost)
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("error of the output, %")
    return render_figure(figure)


def _panel(axes, points: Sequence[Point], cost: str) -> None:
    def place(p):
        return getattr(p, cost) / (2**20 if cost == "size" else 1), 100 * p.error

    best = front(points, cost)
    axes.plot(*zip(*map(place, best)), color=FRONT, linewidth=1.5, zorder=1, label="Pareto front")
    for point in points:
        x, y = place(point)
        axes.scatter(x, y, s=36, zorder=2, color=FRONT if point in best else OFF)
        axes.annotate(as_written(point.name), (x, y), xytext=(6, 4), textcoords="offset points",
                      fontsize=8, color=INK)
    smallest = min((p.error for p in points if p.error > 0), default=0)
    if smallest:
        # Logarithmic, with a place for the float model's 0.
        axes.set_yscale("symlog", linthresh=100 * smallest)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.2, y=0.1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")
    axes.grid(True, which="both", color="#e6e8ee", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
