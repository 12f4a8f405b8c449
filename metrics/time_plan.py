"""Which layers multiply integers, for the least error in a given time: the knapsack on seconds."""

from __future__ import annotations

from ..quant import QuantTuneError
from ..quant.plan import FLOAT, BitPlan, Choice, choose
from .layer_times import LayerTimes
from .sensitivity import INT8, Sensitivity


def time_plan(sensitivity: Sensitivity, times: LayerTimes,
              share: float) -> tuple[BitPlan, float]:
    """The plan of the least expected error whose step takes at most ``share`` of the float one's.

    A layer multiplies integers (8 bits) or stays float; fewer bits are not faster. Seconds of
    layers are added, and errors of units as if independent. Where a unit has several layers, those
    that are faster in float stay there, and the unit's error is a bound.

    Args:
        sensitivity: measured with `INT8`.
        times: of the same model.
        share: of the time of a step with every layer in float; 1 keeps all of them there.

    Returns:
        The plan, and the relative error to expect (the root of the sum).

    Raises:
        QuantTuneError: no error of `INT8`, times of another model, or less than the fastest plan.
    """
    if INT8 not in sensitivity.precisions:
        raise QuantTuneError("A plan for a time needs the error of integer products; switch on "
                             "'int8' in 'Layer Sensitivity'.")
    if dict(sensitivity.shapes) != dict(times.shapes):
        raise QuantTuneError("The times and the sensitivity were measured on models of other "
                             "layers; connect one model to 'Layer Times' and 'Layer Sensitivity'.")
    if not share > 0:
        raise QuantTuneError(f"The time is {share:g} of the float model's, but it has to be above "
                             "0.")
    column = sensitivity.precisions.index(INT8)
    choices = {}
    for row, (unit, layers) in zip(sensitivity.mean(), sensitivity.units.items()):
        floats = sum(times.floats[n] for n in layers)
        integers = sum(times.integers[n] if times.gains(n) else times.floats[n] for n in layers)
        choices[unit] = [Choice(FLOAT, floats, 0.0)]
        if integers < floats:
            choices[unit].append(Choice(8, integers, float(row[column])))
    budget = share * times.seconds(()) - times.rest
    try:
        chosen = choose(choices, budget)
    except QuantTuneError:
        faster, every = len(times.fastest()), len(times.floats)
        if not faster:
            raise QuantTuneError(
                f"None of the {every} layers was measured to be faster in integers here, so that "
                "no plan saves time; use the model in float, or larger latents.") from None
        raise QuantTuneError(
            f"{share:g} of the float model's time cannot be had, since {faster} of {every} layers "
            f"are faster in integers here, which saves less; ask for at least "
            f"{times.least():.2f}.") from None
    taken = {name for unit, choice in chosen.items() if choice.bits
             for name in sensitivity.units[unit] if times.gains(name)}
    plan = BitPlan({name: 8 if name in taken else FLOAT for name in sensitivity.shapes},
                   f"{share:g} of the float model's time, searched")
    return plan, sum(c.error for c in chosen.values()) ** 0.5
