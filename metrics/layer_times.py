"""Seconds of each layer of a model, in float and multiplying integers, and what follows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass

from PIL import Image

from ..quant.groups import group_of
from .charts import INK, SECOND, new_figure, render_figure

REST = "attention, norms and the rest"
"""Of a step, what no Linear or convolution takes."""


def take_turns(ways: Mapping[Hashable, Callable[[], object]], rounds: int,
               wait: Callable[[], None], least: float = 0.0,
               before: Callable[[], None] | None = None) -> dict[Hashable, float]:
    """Median seconds of each of several calls, round by round, so that a drift meets all.

    A round before the first is not counted.

    Args:
        ways: name to what is timed.
        rounds: that count, at least 1.
        wait: returns when the device has done all that it was told.
        least: seconds that one measurement takes at least, a call being repeated for it: on a
            graphics card the start of a single call would count for more than its work.
        before: is called before each measurement; what it raises ends the whole.
    """
    repeats: dict[Hashable, int] = {}
    found: dict[Hashable, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            if before is not None:
                before()
            if not turn:
                # The first call compiles, or lays out weights, and would tell too long a time.
                run()
                once = _seconds(run, wait, 1)
                repeats[name] = max(1, round(least / max(once, 1e-9)))
            else:
                found[name].append(_seconds(run, wait, repeats[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _seconds(run: Callable[[], object], wait: Callable[[], None], repeats: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class LayerTimes:
    """Seconds that the layers of a model take in one step of the sampler.

    Attributes:
        shapes: layer name to the shape of its weight.
        floats: layer name to its seconds in float, all calls of a step together; 0 for a layer
            that the step does not use.
        integers: the same of integer products, quantizing the activation included; None for a
            layer that has none (no backend takes it, or the step does not use it).
        step: seconds of the whole step with every layer in float.
        precision: what float means, as *Dynamic INT8* takes it.
        setting: where and on what it was measured, in words.
    """

    shapes: Mapping[str, tuple[int, ...]]
    floats: Mapping[str, float]
    integers: Mapping[str, float | None]
    step: float
    precision: str = "auto"
    setting: str = ""

    @property
    def rest(self) -> float:
        """Seconds of a step outside of these layers, which no plan changes."""
        return max(0.0, self.step - sum(self.floats.values()))

    def gains(self, layer: str) -> bool:
        """Whether a layer was measured to be faster in integers."""
        integers = self.integers[layer]
        return integers is not None and integers < self.floats[layer]

    def fastest(self) -> set[str]:
        """The layers that are faster in integers."""
        return {name for name in self.floats if self.gains(name)}

    def seconds(self, layers: Collection[str]) -> float:
        """Of a step in which ``layers`` multiply integers; those that cannot stay float."""
        total = self.rest
        for name, seconds in self.floats.items():
            integers = self.integers[name] if name in layers else None
            total += seconds if integers is None else integers
        return total

    def share(self, layers: Collection[str]) -> float:
        """Those seconds over the step's with every layer in float."""
        return self.seconds(layers) / self.seconds(())

    def least(self) -> float:
        """The least share that a plan can have, rounded up to two digits."""
        return math.ceil(100 * self.share(self.fastest())) / 100

    def by_group(self) -> dict[str, tuple[float, float]]:
        """Group to its seconds in float, and with the products that are faster; largest first."""
        found: dict[str, tuple[float, float]] = {}
        for name, seconds in self.floats.items():
            best = self.integers[name] if self.gains(name) else seconds
            before = found.get(group_of(name), (0.0, 0.0))
            found[group_of(name)] = before[0] + seconds, before[1] + best
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def report(self, count: int = 5) -> str:
        """What a step consists of, what integers can gain, and where they gain nothing."""
        faster = self.fastest()
        total = self.seconds(())
        lines = [
            *([self.setting] if self.setting else []),
            f"A step with every layer in float takes {total:.3g} s: {total - self.rest:.3g} s in "
            f"{len(self.floats)} layers, {self.rest:.3g} s in {REST}.",
            f"{len(faster)} layers are faster in integers; with all of these a step is expected "
            f"to take {self.least():.2f} of that time, the least that a plan can have.",
        ]
        for group, (seconds, best) in self.by_group().items():
            lines.append(f"{group}: {1000 * seconds:.3g} ms in float, {1000 * best:.3g} ms")
        slower = sorted((n for n in self.floats if n not in faster),
                        key=lambda n: -self.floats[n])
        if slower:
            named = ", ".join(f"{n} ({self._why(n)})" for n in slower[:count])
            more = f" and {len(slower) - count} more" if len(slower) > count else ""
            lines.append(f"Better in float: {named}{more}")
        return "\n".join(lines)

    def _why(self, name: str) -> str:
        if self.integers[name] is None:
            return "no integer product" if self.floats[name] else "not used in a step"
        return f"{self.integers[name] / self.floats[name]:.2f} x the time"

    def chart(self) -> Image.Image:
        """Milliseconds of each group of layers in float and in integers, and of the rest."""
        groups = self.by_group()
        figure = new_figure(768, 170 + 36 * (len(groups) + 1))
        axes = figure.add_subplot()
        places = [float(i) for i in range(len(groups) + 1)][::-1]
        for index, (label, colour) in enumerate((("float", "#8a90a0"),
                                                 ("INT8 where it is faster", SECOND))):
            values = [1000 * both[index] for both in groups.values()]
            axes.barh([p + 0.2 - 0.4 * index for p in places[:-1]], values, 0.4, color=colour,
                      label=label)
        axes.barh(places[-1:], [1000 * self.rest], 0.4, color="#e5c453", label="in any case")
        axes.set_yticks(places, [*groups, REST])
        axes.set_xlabel("milliseconds a step")
        axes.set_title(f"All in float {self.seconds(()):.3g} s a step; "
                       f"fastest {self.least():.2f} of it", color=INK)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        axes.set_axisbelow(True)
        axes.grid(True, axis="x", color="#e6e8ee", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        return render_figure(figure)
