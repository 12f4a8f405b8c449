"""Charts and picture grids, drawn off-screen."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FIRST, SECOND = "#22252b", "white", "#b9c7dd", "#2b5fb4"


def as_written(text: str) -> str:
    """A name for a chart, in which dollar signs would begin a formula."""
    return text.replace("$", r"\$")


def render_figure(figure) -> Image.Image:
    """A matplotlib figure as an RGB picture."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER)
    return Image.open(buffer).convert("RGB")


def new_figure(width: int, height: int):
    """An empty matplotlib figure of a size in pixels, without any global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and up to ``window - 1`` before it."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def loss_chart(steps: Sequence[int], losses: Sequence[float], title: str = "",
               rates: Sequence[float] | None = None, width: int = 768,
               height: int = 432) -> Image.Image:
    """The loss of each step, its running mean, and the learning rate if given."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    if len(steps):
        window = max(1, len(steps) // 20)
        axes.plot(steps, losses, color=FIRST, linewidth=1, label="loss")
        axes.plot(steps, running_mean(losses, window), color=SECOND, linewidth=2,
                  label=f"mean of {window}")
        if min(losses) > 0 and max(losses) > 20 * float(np.median(losses)):
            axes.set_yscale("log")
        axes.legend(loc="upper right", frameon=False)
    else:
        axes.text(0.5, 0.5, "no step done", ha="center", va="center", transform=axes.transAxes)
    if rates is not None and len(steps):
        other = axes.twinx()
        other.plot(steps, rates, color="#c08030", linewidth=1)
        other.set_ylabel("learning rate", color="#c08030")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, color=INK)
    axes.grid(True, color="#e6e8ee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(rates is not None)
    return render_figure(figure)


def picture_grid(rows: Sequence[Sequence[np.ndarray | Image.Image]],
                 row_labels: Sequence[str] = (), column_labels: Sequence[str] = (),
                 cell: int = 0) -> Image.Image:
    """Pictures in a grid with labels above the columns and above each row.

    rows: pictures (uint8 ``[H, W, 3]`` or PIL); the first one's size counts for all. cell: width
    of a picture in the grid, 0 to keep it if it is between 192 and 512.
    """
    pictures = [[p if isinstance(p, Image.Image) else Image.fromarray(p) for p in row]
                for row in rows]
    first = pictures[0][0]
    width = cell or min(max(first.width, 192), 512)
    height = max(1, round(width * first.height / first.width))
    gap, line = 6, 22
    font = _font(14)
    top = line if column_labels else 0
    band = line if row_labels else 0
    columns = max(len(row) for row in pictures)
    sheet = Image.new("RGB", (columns * (width + gap) + gap,
                              top + len(pictures) * (height + band + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, label in enumerate(column_labels):
        draw.text((gap + x * (width + gap), 3), _cut(draw, label, width, font), INK, font=font)
    for y, row in enumerate(pictures):
        at = top + gap + y * (height + band + gap)
        if row_labels:
            text = _cut(draw, row_labels[y], sheet.width - 2 * gap, font)
            draw.text((gap, at), text, INK, font=font)
        for x, picture in enumerate(row):
            resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(resized, (gap + x * (width + gap), at + band))
    return sheet


def _font(size: int):
    return ImageFont.load_default(size)


def _cut(draw, text: str, width: int, font) -> str:
    """The text, shortened to a width in pixels."""
    while text and draw.textlength(text, font=font) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
