"""A bit plan for a MODEL: searched from a sensitivity, or a preset."""

from __future__ import annotations

from ..metrics.layer_times import LayerTimes
from ..metrics.sensitivity import Sensitivity
from ..metrics.time_plan import time_plan
from ..quant import QuantTuneError, shortcut_splits
from ..quant.plan import FLOAT, BitPlan, by_group, layer_bytes, preset
from .build import quantized_model
from .quantize import quantizable_layers

SEARCHED = "searched"
SIZE, TIME = "size", "time"
BUDGETS = (SIZE, TIME)
"""What a searched plan has to keep to."""


def bit_plan(patcher, plan: str, sensitivity: Sensitivity | None, bits_per_weight: float,
             times: LayerTimes | None = None, budget: str = SIZE,
             time: float = 0.8) -> tuple[BitPlan, str]:
    """A plan for the layers of a float MODEL, and what to expect of it, in words.

    Args:
        patcher: float MODEL.
        plan: `SEARCHED`, or one of ``quant.plan.PRESETS``.
        sensitivity: of the same model; needed to search.
        bits_per_weight: the size of a searched plan.
        times: of the same model; needed to search for a time, and else for what is told.
        budget: of `BUDGETS`. A plan of a time has layers of 8 bits, which *Dynamic INT8* is to
            multiply as integers, and float ones.
        time: of a step in such a plan, over that of a step with every layer in float.

    Raises:
        QuantTuneError: a quantized MODEL, no sensitivity or times, those of another model, too
            little size or time.
    """
    if budget not in BUDGETS:
        raise QuantTuneError(f"budget is '{budget}', but it has to be one of {', '.join(BUDGETS)}.")
    if quantized_model(patcher) is not None:
        raise QuantTuneError("This MODEL is quantized already; connect the float model that the "
                             "plan is for.")
    shapes = {n: tuple(m.weight.shape) for n, m in quantizable_layers(patcher.model).items()}
    parts = dict.fromkeys(shortcut_splits(shapes), 2)
    if plan != SEARCHED:
        made, expected = preset(plan, shapes), None
    elif sensitivity is None:
        raise QuantTuneError("A searched plan needs a sensitivity; connect 'Layer Sensitivity', or "
                             "choose one of the recommendations.")
    elif dict(sensitivity.shapes) != shapes:
        raise QuantTuneError("The sensitivity was measured on a model with other layers; measure "
                             "this one.")
    elif budget == SIZE:
        made, expected = sensitivity.plan(bits_per_weight)
    elif times is None:
        raise QuantTuneError("A plan for a time needs the layers' times; connect 'Layer Times', or "
                             "set budget to 'size'.")
    else:
        made, expected = time_plan(sensitivity, times, time)
    if times is not None and dict(times.shapes) != shapes:
        raise QuantTuneError("The times were measured on a model with other layers; measure this "
                             "one.")
    return made, _report(made, shapes, parts, expected, times)


def _report(plan: BitPlan, shapes: dict, parts: dict, expected: float | None,
            times: LayerTimes | None) -> str:
    total = sum(layer_bytes(s, plan.bits[n], parts.get(n, 1)) for n, s in shapes.items())
    floats = sum(layer_bytes(s, FLOAT) for s in shapes.values())
    lines = [f"{plan.label}: {total / 2**20:.1f} MiB of weights "
             f"({8 * total / (floats / 2):.2f} bits each on average, float16 takes "
             f"{floats / 2**20:.1f} MiB)."]
    if plan.kept() == set(plan.bits):
        lines.append("Nothing is quantized: use the model as it is.")
    if expected is not None:
        lines.append(f"Expected error of the output: {100 * expected:.1f} %, if the layers' errors "
                     "add up as independent ones do.")
    if times is not None and set(plan.bits.values()) <= {8, FLOAT}:
        fast = [n for n, bits in plan.bits.items() if bits and times.integers[n] is not None]
        lines.append(f"Expected time with 'Dynamic INT8': {times.share(fast):.2f} of a step with "
                     f"every layer in float ({times.seconds(fast):.3g} s of "
                     f"{times.seconds(()):.3g} s); {len(fast)} of {len(shapes)} layers multiply "
                     "integers.")
    for group, counts in by_group(plan.bits).items():
        widths = ", ".join(f"{count} in {'float' if bits == FLOAT else f'{bits} bits'}"
                           for bits, count in sorted(counts.items(), reverse=True))
        lines.append(f"{group}: {widths}")
    return "\n".join(lines)
