"""What quantizing one layer at a time does to a model's output, and the plan that follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.groups import group_of
from ..quant.plan import FLOAT, BitPlan, Choice, choose, layer_bytes

INT8 = "int8"
"""Weights and activations in 8 bits, as *Dynamic INT8* multiplies them."""
PRECISIONS = ("8", "4", "3", "2", INT8)
"""Bits of the weights alone, and `INT8`."""


def label_of(precision: str) -> str:
    """A precision as people read it."""
    return "INT8 products" if precision == INT8 else f"{precision} bits"


def bits_of(precision: str) -> int:
    """Bits of the weights at a precision."""
    return 8 if precision == INT8 else int(precision)


@dataclass(frozen=True)
class Sensitivity:
    """Squared relative error of the model's output when one unit is quantized.

    Attributes:
        units: unit name to the layers that are quantized together (a layer, or a group of them).
        shapes: layer name to the shape of its weight.
        parts: layer name to how many parts of its input have scales of their own.
        precisions: of `PRECISIONS`.
        error: float64 ``[units, precisions, buckets]``: mean over the forwards whose timestep is
            in a bucket of ``|y - y0|^2 / |y0|^2``; NaN where no forward was.
        forwards: how many there were in each bucket.
    """

    units: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, int]
    precisions: tuple[str, ...]
    error: Tensor
    forwards: tuple[int, ...]

    def mean(self) -> Tensor:
        """``[units, precisions]``, over all forwards."""
        counts = torch.tensor(self.forwards, dtype=torch.float64)
        return (self.error.nan_to_num() * counts).sum(-1) / counts.sum()

    def by_group(self) -> dict[str, list[float]]:
        """Group to the sum of its units' errors at each precision, the largest first."""
        totals: dict[str, Tensor] = {}
        for (unit, layers), row in zip(self.units.items(), self.mean()):
            group = unit if len(layers) > 1 else group_of(layers[0])
            totals[group] = totals.get(group, 0) + row
        order = sorted(totals, key=lambda g: -float(totals[g].max()))
        return {group: totals[group].tolist() for group in order}

    def worst(self, precision: str, count: int) -> list[tuple[str, float]]:
        """The units that lose most at a precision: name and relative error (its root)."""
        column = self.mean()[:, self.precisions.index(precision)]
        order = column.argsort(descending=True)[:count].tolist()
        names = list(self.units)
        return [(names[i], float(column[i]) ** 0.5) for i in order]

    def report(self, count: int = 5) -> str:
        """The most sensitive units at each precision, and the groups, in words."""
        lines = [f"{len(self.units)} units on {sum(self.forwards)} forwards; error of the output "
                 "when one alone is quantized."]
        for precision in self.precisions:
            worst = ", ".join(f"{name} {100 * e:.2g} %"
                              for name, e in self.worst(precision, count))
            lines.append(f"{label_of(precision)}: {worst}")
        return "\n".join(lines)

    def plan(self, bits_per_weight: float, label: str = "") -> tuple[BitPlan, float]:
        """The plan of the least expected error whose weights take so many bits on average.

        Bytes are those of the file: packed codes with their scales, and float16 where a unit stays
        float, which is one of the choices. Errors of units are added, as if independent.

        Returns:
            The plan, and the relative error to expect (the root of the sum).

        Raises:
            QuantTuneError: too small a budget for what was measured.
        """
        weights = [p for p in self.precisions if p != INT8]
        if not weights:
            raise QuantTuneError("The sensitivity was measured for 'int8' alone, whose weights all "
                                 "have 8 bits; measure 8, 4, 3 or 2 bits, too.")
        numel = sum(layer_bytes(s, FLOAT) for s in self.shapes.values()) // 2
        mean = self.mean()
        choices = {}
        for row, (unit, layers) in zip(mean, self.units.items()):
            own = [Choice(FLOAT, self.bytes_of(layers, FLOAT), 0.0)]
            own += [Choice(bits_of(p), self.bytes_of(layers, bits_of(p)),
                           float(row[self.precisions.index(p)])) for p in weights]
            choices[unit] = own
        try:
            chosen = choose(choices, numel * bits_per_weight / 8)
        except QuantTuneError:
            least = 8 * sum(min(c.cost for c in own) for own in choices.values()) / numel
            raise QuantTuneError(
                f"{bits_per_weight:g} bits a weight cannot be had from the bits that were measured "
                f"({', '.join(weights)}); ask for at least {least:.2f}, scales included, or "
                "measure fewer bits.") from None
        plan = BitPlan({name: choice.bits for unit, choice in chosen.items()
                        for name in self.units[unit]},
                       label or f"{bits_per_weight:g} bits a weight, searched")
        return plan, sum(c.error for c in chosen.values()) ** 0.5

    def bytes_of(self, layers, bits: int) -> int:
        """Of the weights of some layers at a bit width."""
        return sum(layer_bytes(self.shapes[n], bits, self.parts.get(n, 1)) for n in layers)

    def bits_per_weight(self, plan: BitPlan) -> float:
        """What a plan takes on average, scales included."""
        numel = sum(layer_bytes(s, FLOAT) for s in self.shapes.values()) // 2
        total = sum(self.bytes_of([n], plan.bits.get(n, FLOAT)) for n in self.shapes)
        return 8 * total / numel

    def to_json(self) -> str:
        """For a file; see `from_json`."""
        return json.dumps({
            "units": {u: list(layers) for u, layers in self.units.items()},
            "shapes": {n: list(s) for n, s in self.shapes.items()}, "parts": dict(self.parts),
            "precisions": list(self.precisions), "forwards": list(self.forwards),
            "error": [[[None if e != e else e for e in row] for row in unit]
                      for unit in self.error.tolist()]}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "The sensitivity") -> Sensitivity:
        """Read what `to_json` wrote.

        Args:
            text: JSON.
            where: what to call it in messages.

        Raises:
            QuantTuneError: text that is none, or whose parts do not belong together.
        """
        try:
            raw = json.loads(text)
            error = torch.tensor(
                [[[float("nan") if e is None else float(e) for e in row] for row in unit]
                 for unit in raw["error"]], dtype=torch.float64)
            found = cls({u: tuple(layers) for u, layers in raw["units"].items()},
                        {n: tuple(s) for n, s in raw["shapes"].items()}, dict(raw["parts"]),
                        tuple(raw["precisions"]), error, tuple(raw["forwards"]))
            found._check()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise QuantTuneError(f"{where} is damaged, or of another program; measure it "
                                 "again.") from error
        return found

    def _check(self) -> None:
        """Raise ValueError where the parts do not belong together."""
        sizes = len(self.units), len(self.precisions), len(self.forwards)
        layers = [name for own in self.units.values() for name in own]
        numbers = [*self.forwards, *self.parts.values(), *(n for s in self.shapes.values()
                                                          for n in s)]
        met = torch.tensor([count > 0 for count in self.forwards])
        if (tuple(self.error.shape) != sizes or 0 in sizes
                or not set(self.precisions) <= set(PRECISIONS)
                or len(set(self.precisions)) != len(self.precisions)
                or not all(self.units.values()) or not set(layers) == set(self.shapes)
                or not all(type(n) is int and 0 <= n < 2**31 for n in numbers)
                or not all(self.shapes.values()) or 0 in self.parts.values()
                or not met.any() or not bool(self.error[..., met].isfinite().all())
                or bool(((self.error < 0) | (self.error > 1e100)).any())):
            raise ValueError
