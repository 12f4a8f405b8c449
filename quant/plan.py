"""Mixed precision: how many bits each layer gets, chosen under a budget (a knapsack)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .errors import QuantTuneError
from .groups import group_of
from .spec import check_bits

FLOAT = 0
"""Stands for the bits of a layer that stays in float."""
FLOAT_BYTES = 2
"""A weight in float16 or bfloat16."""
PRESETS = ("all INT8 (very constrained)", "convolutions INT8 (laptop)", "all float (workstation)")
"""Diffusia's recommendations by the machine one has."""


@dataclass(frozen=True)
class BitPlan:
    """Bits of each layer.

    Attributes:
        bits: layer name to 2, 3, 4 or 8, or `FLOAT`. Layers that are not named are left to whoever
            applies the plan.
        label: what to call it.

    Raises:
        QuantTuneError: any other number of bits, or no layer.
    """

    bits: Mapping[str, int]
    label: str = "plan"

    def __post_init__(self) -> None:
        if not self.bits:
            raise QuantTuneError("The plan names no layer; give it at least one.")
        for name, bits in self.bits.items():
            if bits != FLOAT or isinstance(bits, bool):
                check_bits(bits, f"The bit width of layer {name} in the plan")

    def kept(self) -> set[str]:
        """Layers that stay in float."""
        return {name for name, bits in self.bits.items() if bits == FLOAT}

    def check_layers(self, names: Collection[str]) -> None:
        """Raise `QuantTuneError` if the plan is for a model with other layers than ``names``."""
        if unknown := self.bits.keys() - set(names):
            raise QuantTuneError(
                f"The plan '{self.label}' names layer '{min(unknown)}' ({len(unknown)} such), "
                "which this model does not have; make a plan for this model."
            )


def layer_bytes(shape: tuple[int, ...], bits: int, parts: int = 1) -> int:
    """Bytes of a weight: packed codes with float32 scale and zero point, or float16."""
    numel = 1
    for length in shape:
        numel *= length
    if bits == FLOAT:
        return numel * FLOAT_BYTES
    return -(-numel * bits // 8) + shape[0] * parts * 8


def preset(name: str, shapes: Mapping[str, tuple[int, ...]]) -> BitPlan:
    """One of `PRESETS` for layers with weights of these shapes."""
    if name == PRESETS[0]:
        return BitPlan(dict.fromkeys(shapes, 8), name)
    if name == PRESETS[1]:
        return BitPlan({n: 8 if len(s) == 4 else FLOAT for n, s in shapes.items()}, name)
    if name == PRESETS[2]:
        return BitPlan(dict.fromkeys(shapes, FLOAT), name)
    raise QuantTuneError(f"There is no plan '{name}'; choose one of {', '.join(PRESETS)}.")


@dataclass(frozen=True)
class Choice:
    """One way to hold a unit (a layer, or layers that share their bits).

    Attributes:
        bits: as in `BitPlan`.
        cost: bytes, or seconds: whatever the budget counts.
        error: what it does to the model's output; those of several units are added.
    """

    bits: int
    cost: float
    error: float


def choose(choices: Mapping[str, list[Choice]], budget: float) -> dict[str, Choice]:
    """One choice for each unit with the least total error whose total cost is within ``budget``.

    Starting from the cheapest, the step that lowers the error most for its cost is taken next, over
    the lower convex hull of each unit's choices: the known greedy solution of the multiple-choice
    knapsack (Sinha & Zoltners 1979), whose distance from the best is at most one step's error.

    Raises:
        QuantTuneError: the cheapest choices already cost more than the budget.
    """
    hulls = {unit: _hull(own) for unit, own in choices.items()}
    taken = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].cost for hull in hulls.values())
    if spent > budget * (1 + 1e-9):
        raise QuantTuneError(
            f"The budget of {budget:.6g} is below what the cheapest choice of every layer costs "
            f"({spent:.6g}); raise it, or measure fewer bits."
        )
    steps = sorted(
        ((b.error - a.error) / (b.cost - a.cost), unit, index + 1)
        for unit, hull in hulls.items()
        for index, (a, b) in enumerate(zip(hull, hull[1:]))
    )
    closed = set()
    for _, unit, index in steps:
        if unit in closed:
            continue
        extra = hulls[unit][index].cost - hulls[unit][index - 1].cost
        if spent + extra > budget * (1 + 1e-9):
            # A later step of this unit would come without this one.
            closed.add(unit)
            continue
        taken[unit], spent = index, spent + extra
    return {unit: hulls[unit][index] for unit, index in taken.items()}


def _hull(choices: list[Choice]) -> list[Choice]:
    """The lower convex hull, by rising cost: each step costs more and lowers the error by less."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and choice.cost == hull[-1].cost:
            hull[-1] = choice
            continue
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.error - a.error) / (b.cost - a.cost) if b.cost > a.cost else float("-inf")


def by_group(bits: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Group to how many of its layers have how many bits."""
    found: dict[str, dict[int, int]] = {}
    for name, width in bits.items():
        counts = found.setdefault(group_of(name), {})
        counts[width] = counts.get(width, 0) + 1
    return found
