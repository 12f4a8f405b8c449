"""Charts of a `Sensitivity` and of the plan that follows from it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..quant.plan import FLOAT, BitPlan, by_group
from .charts import INK, as_written, new_figure, render_figure
from .sensitivity import INT8, Sensitivity, label_of

COLOURS = {"2": "#b3432f", "3": "#e08a3c", "4": "#e5c453", "8": "#7fb069", INT8: "#2b5fb4",
           "float": "#8a90a0"}
"""Of a precision, from few bits to many."""
MOST_ROWS = 60
"""Layers that a heat map shows: the worst ones."""


def group_chart(found: Sensitivity, title: str = "Layer sensitivity") -> Image.Image:
    """Relative error of the output, for each group of layers and precision, as bars."""
    groups = found.by_group()
    height = 0.8 / len(found.precisions)
    figure = new_figure(768, 140 + 26 * len(groups) * max(1, len(found.precisions)) // 2)
    axes = figure.add_subplot()
    places = np.arange(len(groups))[::-1]
    for index, precision in enumerate(found.precisions):
        errors = [100 * max(row[index], 0.0) ** 0.5 for row in groups.values()]
        axes.barh(places - (index - (len(found.precisions) - 1) / 2) * height, errors, height,
                  color=COLOURS[precision], label=label_of(precision))
    axes.set_yticks(places, list(map(as_written, groups)))
    if max((max(row) for row in groups.values()), default=0) > 0:
        axes.set_xscale("log")
    alone = len(found.units) == len(found.shapes)
    axes.set_xlabel("error of the output, %: " + (
        "the layers', each quantized alone, added up" if alone else "only these are quantized"))
    axes.set_title(title, color=INK)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(True, axis="x", color="#e6e8ee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return render_figure(figure)


def heat_map(found: Sensitivity, precision: str) -> Image.Image:
    """Relative error of the output by layer and interval of the timesteps, the worst layers."""
    column = found.precisions.index(precision)
    order = found.mean()[:, column].argsort(descending=True)[:MOST_ROWS].tolist()
    # In the model's order, so that neighbours stay together.
    order.sort()
    errors = 100 * found.error[order, column].clamp(min=0).sqrt().numpy()
    names = [list(found.units)[i] for i in order]
    figure = new_figure(900, 150 + 16 * len(names))
    axes = figure.add_subplot()
    from matplotlib.colors import LogNorm

    seen = errors[np.isfinite(errors) & (errors > 0)]
    norm = LogNorm(max(seen.min(), seen.max() / 1e4), seen.max()) if seen.size else None
    picture = axes.imshow(errors, aspect="auto", cmap="magma", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(names)), list(map(as_written, names)), fontsize=7)
    buckets = errors.shape[1]
    edges = [f"{i / buckets:.2g}–{(i + 1) / buckets:.2g}" for i in range(buckets)]
    axes.set_xticks(range(buckets), edges)
    axes.set_xlabel("interval of the timesteps (0 is the clean picture, 1 is noise)")
    more = len(found.units) - len(names)
    axes.set_title(f"Error of the output at {label_of(precision)}, %"
                   + (f" (the worst {len(names)} of {len(found.units)})" if more else ""),
                   color=INK)
    figure.colorbar(picture, ax=axes, fraction=0.03)
    return render_figure(figure)


def plan_chart(plan: BitPlan, title: str = "") -> Image.Image:
    """How many layers of each group have how many bits, as stacked bars."""
    counts = by_group(plan.bits)
    widths = sorted({w for row in counts.values() for w in row}, key=lambda w: w or 99)
    figure = new_figure(768, 140 + 26 * len(counts))
    axes = figure.add_subplot()
    places = np.arange(len(counts))[::-1]
    left = np.zeros(len(counts))
    for width in widths:
        share = np.array([row.get(width, 0) / sum(row.values()) for row in counts.values()])
        name = "float" if width == FLOAT else str(width)
        axes.barh(places, 100 * share, 0.7, left=left, color=COLOURS[name],
                  label=name if width == FLOAT else label_of(name))
        left += 100 * share
    axes.set_yticks(places, [f"{g} ({sum(row.values())})" for g, row in counts.items()])
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the layers, %")
    axes.set_title(as_written(title or plan.label), color=INK)
    figure.legend(loc="outside lower center", ncols=len(widths), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return render_figure(figure)
