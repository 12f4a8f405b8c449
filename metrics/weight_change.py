"""How far fine-tuning moved a layer's weights (TuneQDM, Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..quant import QuantTuneError
from .charts import INK, new_figure, render_figure

LARGEST_SIDE = 512
"""Rows and columns of a map; larger layers are shown by block means."""
BOXES = 48
"""Channels in a box plot; of more, evenly spaced ones are shown."""


@dataclass(frozen=True)
class LayerChange:
    """Relative change of a layer's weights, ``|tuned - base| / |base|``.

    Attributes:
        ratio: ``[out, in]`` float32, kernels averaged; NaN where the base weight is all zero.
        zeros: number of single weights that are zero in the base and so have no ratio.
    """

    ratio: Tensor
    zeros: int

    @property
    def mean(self) -> float:
        """Mean over all weights that have a ratio."""
        return float(self.ratio.nanmean()) if bool((~self.ratio.isnan()).any()) else 0.0

    @property
    def largest(self) -> float:
        """Largest of the map."""
        return float(self.ratio.nan_to_num(0).max())


def change_of_layer(base: Tensor, tuned: Tensor) -> LayerChange:
    """Compare two float weights ``[out, in, ...]`` of one shape.

    Raises QuantTuneError when the shapes differ.
    """
    if base.shape != tuned.shape:
        raise QuantTuneError(f"The weights to compare have shapes {list(base.shape)} and "
                             f"{list(tuned.shape)}; use two models of one architecture.")
    base, tuned = (w.detach().float().cpu().flatten(2) if w.dim() > 2 else
                   w.detach().float().cpu()[..., None] for w in (base, tuned))
    zero = base == 0
    ratio = (tuned - base).abs() / base.abs()
    ratio = torch.where(zero, torch.nan, ratio)
    # Quantized weights are exactly zero at the zero-point; a kernel's mean leaves those out.
    return LayerChange(ratio.nanmean(-1), int(zero.sum()))


def change_map(change: LayerChange, title: str, width: int = 768, height: int = 640) -> Image.Image:
    """The map of a layer: output channels down, input channels across."""
    values = np.ma.masked_invalid(_blocks(change.ratio.numpy()))
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    top = float(np.nanquantile(change.ratio.numpy(), 0.99)) if change.largest > 0 else 1.0
    out, inputs = change.ratio.shape
    shown = axes.imshow(100 * values, aspect="auto", cmap="magma", vmin=0,
                        vmax=100 * max(top, 1e-9), extent=(0, inputs, out, 0),
                        interpolation="nearest")
    axes.set_facecolor("#9aa0aa")
    axes.set_title(f"{title}\nmean change {100 * change.mean:.3g} %", color=INK, fontsize=11)
    axes.set_xlabel("input channel")
    axes.set_ylabel("output channel")
    figure.colorbar(shown, ax=axes, label="change of the weight, %")
    return render_figure(figure)


def change_boxes(change: LayerChange, title: str, width: int = 1024,
                 height: int = 640) -> Image.Image:
    """Box plots of the change by output channel (above) and by input channel (below)."""
    figure = new_figure(width, height)
    for axes, values, name in zip(figure.subplots(2, 1), (change.ratio, change.ratio.t()),
                                  ("output", "input")):
        chosen = np.unique(np.linspace(0, len(values) - 1, BOXES).round().astype(int))
        rows = [values[i][~values[i].isnan()].numpy() * 100 for i in chosen]
        boxes = axes.boxplot(rows, positions=chosen, widths=max(0.6, len(values) / BOXES * 0.6),
                             showfliers=False, patch_artist=True, manage_ticks=False)
        for box in boxes["boxes"]:
            box.set(facecolor="#b9c7dd", edgecolor="#2b5fb4")
        for line in boxes["medians"]:
            line.set(color="#c03a3a")
        axes.set_xlim(-1, len(values))
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{name} channel")
        axes.set_ylabel("change, %")
        axes.grid(True, axis="y", color="#e6e8ee", linewidth=0.6)
    figure.suptitle(title, color=INK, fontsize=11)
    return render_figure(figure)


def change_table(changes: Mapping[str, LayerChange], count: int = 20) -> str:
    """The most changed layers, as text."""
    order = sorted(changes, key=lambda n: -changes[n].mean)
    width = max(map(len, order), default=5)
    lines = [f"{'layer':{width}}  mean %  max %"]
    lines += [f"{n:{width}}  {100 * changes[n].mean:6.3g}  {100 * changes[n].largest:6.3g}"
              for n in order[:count]]
    if len(order) > count:
        lines.append(f"... and {len(order) - count} more")
    return "\n".join(lines)


def _blocks(values: np.ndarray) -> np.ndarray:
    """Means of blocks, so that no side is above `LARGEST_SIDE`."""
    for axis in (0, 1):
        size = values.shape[axis]
        if size > LARGEST_SIDE:
            edges = np.linspace(0, size, LARGEST_SIDE + 1).astype(int)
            parts = [np.nanmean(values.take(range(a, b), axis), axis)
                     for a, b in zip(edges, edges[1:])]
            values = np.stack(parts, axis)
    return values
