"""What models cost, measured side by side: latency with its spread, throughput, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .charts import INK, SECOND, as_written, new_figure, render_figure
from .markdown import table

COLUMNS = ("model", "s a step", "spread", "x first", "images an hour", "weights MiB",
           "peak above MiB")


@dataclass(frozen=True)
class Cost:
    """Of one model.

    Attributes:
        name: of the model.
        seconds: of each timed step, all pictures of the batch together.
        warm_up: seconds of its first step.
        weight_bytes: as the host accounts for the model.
        peak_bytes: the most memory its first steps took above the loaded model, measured.
    """

    name: str
    seconds: tuple[float, ...]
    warm_up: float
    weight_bytes: int
    peak_bytes: int

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range of the steps, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median


@dataclass(frozen=True)
class CostReport:
    """Costs of several models whose steps took turns.

    Attributes:
        costs: of each, the first being what the others are compared with.
        batch: pictures a step.
        steps: a picture takes.
        setting: where and on what it was measured, in words.
    """

    costs: tuple[Cost, ...]
    batch: int
    steps: int
    setting: str

    def ratio(self, index: int) -> float:
        """Time of a model over the first one's: the median over the rounds' ratios."""
        pairs = zip(self.costs[index].seconds, self.costs[0].seconds)
        return statistics.median(a / b for a, b in pairs)

    def images_per_hour(self, index: int) -> float:
        """Pictures, of the steps alone: text and VAE not counted."""
        return 3600 * self.batch / (self.costs[index].median * self.steps)

    def rows(self) -> list[tuple]:
        """The table: see `COLUMNS`."""
        return [(c.name, c.median, c.spread, self.ratio(i), self.images_per_hour(i),
                 c.weight_bytes / 2**20, c.peak_bytes / 2**20) for i, c in enumerate(self.costs)]

    def markdown(self) -> str:
        """As a Markdown table with what was measured above it."""
        rows = [(name, f"{seconds:.3g}", f"{spread:.0%}", f"{ratio:.2f}", f"{images:,.0f}",
                 f"{weights:,.0f}", f"{peak:,.0f}")
                for name, seconds, spread, ratio, images, weights, peak in self.rows()]
        return f"{self.setting}\n\n{table(COLUMNS, rows)}"

    def csv(self) -> str:
        """As comma-separated values."""
        lines = [",".join(COLUMNS)]
        for name, *values in self.rows():
            quoted = name.replace('"', '""')
            lines.append(",".join([f'"{quoted}"', *(f"{v:.6g}" for v in values)]))
        return "\n".join(lines) + "\n"

    def chart(self) -> Image.Image:
        """Seconds a step as bars, quartiles as whiskers, and memory beside them."""
        figure = new_figure(900, 160 + 60 * len(self.costs))
        left, right = figure.subplots(1, 2, sharey=True)
        places = list(range(len(self.costs)))[::-1]
        medians = [c.median for c in self.costs]
        quartiles = [_quartiles(c.seconds) for c in self.costs]
        low, high = ([abs(m - q[side]) for m, q in zip(medians, quartiles)] for side in (0, 1))
        left.barh(places, medians, 0.6, xerr=[low, high], color=SECOND, ecolor=INK, capsize=3)
        left.set_yticks(places, [as_written(c.name) for c in self.costs])
        left.set_xlabel("seconds a step (bars: middle half of the steps)")
        weights = [c.weight_bytes / 2**20 for c in self.costs]
        right.barh(places, weights, 0.6, color="#7fb069", label="weights")
        right.barh(places, [c.peak_bytes / 2**20 for c in self.costs], 0.6, left=weights,
                   color="#e5c453", label="peak of a step above them")
        right.set_xlabel("MiB")
        right.legend(frameon=False, loc="best", fontsize=8)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, axis="x", color="#e6e8ee", linewidth=0.6)
        return render_figure(figure)


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return first, third
