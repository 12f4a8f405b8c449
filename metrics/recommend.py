"""What follows from measurements, in sentences: which way of quantizing, which layers, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cost import CostReport
from .pareto import Point, front
from .sensitivity import Sensitivity, label_of

LIMITS = (0.03, 0.10)
"""Errors of the output that recommendations are made for: hardly to be seen, and slightly so."""
SAME_SIZE = 1.05
"""Up to how many times the size of uniform bits a plan counts as of the same size."""
WORTH = 0.1
"""Share of the error that a plan has to take away to be worth its trouble."""
RESTLESS = 0.15
"""Spread of the times from which on they say little about small differences."""
SHARE, MOST_LAYERS = 0.5, 8
"""Of the error: so much of it, if so many layers at most make it, is worth naming them."""


def recommend(points: Sequence[Point], limits: Sequence[float] = LIMITS) -> list[str]:
    """Sentences about the points of a Pareto front: the smallest and the fastest under each limit,
    against the fastest float; plans against uniform bits; and what is never worth it."""
    quantized = [p for p in points if p.quantized]
    if not quantized:
        return ["Nothing was quantized, so that nothing follows."]
    floats = sorted((p for p in points if not p.quantized), key=lambda p: p.time)
    sound = [p for p in quantized if math.isfinite(p.error)]
    found: list[str] = []
    for limit, before in zip(limits, [None, *limits]):
        # A limit that changes nothing needs no sentences of its own.
        if before is None or _best(limit, sound) != _best(before, sound):
            found += _under(limit, sound, floats)
    slow = [limit for limit in limits if (chosen := _best(limit, sound)) is not None
            and chosen[1].time >= _float_time(floats)]
    if slow:
        fastest = _best(max(slow), sound)[1]
        found.append(f"Nothing quantized with at most {max(slow):.0%} error is faster than "
                     f"{floats[0].name if floats else 'float'} "
                     f"({_float_time(floats):.2f} x the time of float) here; the nearest is "
                     f"{fastest.name} at {fastest.time:.2f} x.")
    found += _plans(sound)
    useful = {p.name for cost in ("size", "time") for p in front([*floats, *sound], cost)}
    useless = [p.name for p in sound if p.name not in useful]
    if useless:
        found.append(f"Never worth it here: {_listed(useless)}. Something else, float counted, is "
                     "as small with less error, and something is as fast with less error.")
    broken = [p.name for p in quantized if not math.isfinite(p.error)]
    if broken:
        found.append(f"Unusable: {_listed(broken)}, whose output is NaN or infinite.")
    return found


def _best(limit: float, points: Sequence[Point]) -> tuple[Point, Point] | None:
    """The smallest and the fastest with so much error at most."""
    good = [p for p in points if p.error <= limit]
    return (min(good, key=lambda p: (p.size, p.error)),
            min(good, key=lambda p: (p.time, p.error))) if good else None


def _under(limit: float, points: Sequence[Point], floats: Sequence[Point]) -> list[str]:
    chosen = _best(limit, points)
    if chosen is None:
        best = min(points, key=lambda p: p.error, default=None)
        told = "" if best is None else f"; the closest, {best.name}, has {best.error:.1%}"
        return [f"Nothing quantized stays within {limit:.0%} of the float model's output{told}."]
    smallest, fastest = chosen
    share = f", {smallest.size / floats[0].size:.0%} of float16" if floats else ""
    found = [f"**Smallest with at most {limit:.0%} error: {smallest.name}**, "
             f"{smallest.size / 2**20:,.1f} MiB of weights{share}, {smallest.error:.1%} error, "
             f"{smallest.time:.2f} x the time of float."]
    if fastest.time >= _float_time(floats):
        return found
    if fastest is not smallest:
        found.append(f"**Fastest with at most {limit:.0%} error: {fastest.name}**, "
                     f"{fastest.time:.2f} x the time of float, {fastest.error:.1%} error, "
                     f"{fastest.size / 2**20:,.1f} MiB of weights.")
    else:
        found.append(f"It is also the fastest with at most {limit:.0%} error.")
    if _float_time(floats) < 1:
        found.append(f"Without any integers, {floats[0].name} takes {floats[0].time:.2f} x the "
                     f"time of float already: {fastest.name} takes "
                     f"{fastest.time / floats[0].time:.2f} x of that.")
    return found


def _float_time(floats: Sequence[Point]) -> float:
    """Of the fastest float model, over the first one's."""
    return min([1.0, *(p.time for p in floats)])


def _plans(points: Sequence[Point]) -> list[str]:
    """The searched plan that takes most error from uniform bits of its size."""
    best = None
    for plan in (p for p in points if p.name.startswith("plan ")):
        for uniform in (p for p in points if p.name.endswith(" bits")):
            if uniform.size <= plan.size <= SAME_SIZE * uniform.size or (
                    plan.size <= uniform.size <= SAME_SIZE * plan.size):
                gain = uniform.error - plan.error
                if best is None or gain > best[0]:
                    best = gain, plan, uniform
    if best is None:
        return []
    gain, plan, uniform = best
    if gain < WORTH * uniform.error:
        return [f"Mixed precision gains nothing here: {plan.name} has {plan.error:.1%} error, "
                f"{uniform.name} of about the same size {uniform.error:.1%}."]
    return [f"Mixed precision pays: {plan.name} has {plan.error:.1%} error, {uniform.name} of "
            f"about the same size {uniform.error:.1%}."]


def recommend_layers(found: Sensitivity) -> list[str]:
    """Sentences about which layers and timesteps need their bits, at the fewest bits measured."""
    weights = [p for p in found.precisions if p.isdigit()]
    precision = min(weights, key=int) if weights else found.precisions[0]
    column = found.precisions.index(precision)
    errors = found.mean()[:, column]
    total = float(errors.sum())
    if not total > 0:
        return []
    sentences = []
    order = errors.argsort(descending=True).tolist()
    taken, sum_ = [], 0.0
    while sum_ < SHARE * total:
        taken.append(order[len(taken)])
        sum_ += float(errors[taken[-1]])
    if len(taken) <= min(MOST_LAYERS, len(order) // 4):
        names = list(found.units)
        # Names of layers may hold anything; as code they stay as they are.
        listed = _listed([f"`{names[i]}`" for i in taken])
        sentences.append(f"At {label_of(precision)}, {sum_ / total:.0%} of all the error comes "
                         f"from {len(taken)} of {len(order)} "
                         f"{'layers' if len(order) == len(found.shapes) else 'kinds of layers'}: "
                         f"{listed}. Give these more bits first.")
    by_time = found.error[:, column].sum(0)
    seen = [i for i, n in enumerate(found.forwards) if n and math.isfinite(float(by_time[i]))]
    if len(seen) > 1:
        worst = max(seen, key=lambda i: float(by_time[i]))
        least = min(seen, key=lambda i: float(by_time[i]))
        ratio = (float(by_time[worst]) / max(float(by_time[least]), 1e-30)) ** 0.5
        if ratio >= 2:
            count = len(found.forwards)
            sentences.append(
                f"Timesteps from {worst / count:.2g} to {(worst + 1) / count:.2g} (0 is the clean "
                f"picture, 1 is noise) react {ratio:.1f} times as strongly as those from "
                f"{least / count:.2g} to {(least + 1) / count:.2g}.")
    return sentences


def recommend_timing(report: CostReport) -> list[str]:
    """A sentence if the machine did not keep still while it was measured."""
    cost = max(report.costs, key=lambda c: c.spread)
    if cost.spread < RESTLESS:
        return []
    return [f"The machine did not keep still: the steps of {cost.name} spread by "
            f"{cost.spread:.0%}, so take smaller differences in time for none, or measure again on "
            "a quiet machine."]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
