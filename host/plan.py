"""A bit plan for a MODEL: searched from a sensitivity, or a preset."""

from __future__ import annotations

from ..metrics.sensitivity import Sensitivity
from ..quant import QuantTuneError, shortcut_splits
from ..quant.plan import FLOAT, BitPlan, by_group, layer_bytes, preset
from .build import quantized_model
from .quantize import quantizable_layers

SEARCHED = "searched"


def bit_plan(patcher, plan: str, sensitivity: Sensitivity | None,
             bits_per_weight: float) -> tuple[BitPlan, str]:
    """A plan for the layers of a float MODEL, and what to expect of it, in words.

    Args:
        patcher: float MODEL.
        plan: `SEARCHED`, or one of ``quant.plan.PRESETS``.
        sensitivity: of the same model; needed to search.
        bits_per_weight: the size of a searched plan.

    Raises:
        QuantTuneError: a quantized MODEL, no sensitivity, one of another model, too little size.
    """
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
    else:
        made, expected = sensitivity.plan(bits_per_weight)
    return made, _report(made, shapes, parts, expected)


def _report(plan: BitPlan, shapes: dict, parts: dict, expected: float | None) -> str:
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
    for group, counts in by_group(plan.bits).items():
        widths = ", ".join(f"{count} in {'float' if bits == FLOAT else f'{bits} bits'}"
                           for bits, count in sorted(counts.items(), reverse=True))
        lines.append(f"{group}: {widths}")
    return "\n".join(lines)
