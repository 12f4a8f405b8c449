"""What a loader offers for the precision of a UNet."""

from __future__ import annotations

from ..quant import QuantSpec, QuantTuneError
from .dynamic_int8 import dynamic_int8
from .quantize import quantize_model

PRECISIONS = {"float": None, "8-bit": QuantSpec(8), "4-bit": QuantSpec(4, range="mse"),
              "dynamic INT8": None}
"""What the UNet's weights can be, and how each is quantized."""


def check_precision(precision: str) -> None:
    """Raise `QuantTuneError` unless ``precision`` is a key of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise QuantTuneError(
            f"precision is '{precision}', but it has to be one of {', '.join(PRECISIONS)}.")


def at_precision(model, precision: str, name: str, keep: str = "none"):
    """A float MODEL in one of `PRECISIONS` other than float.

    keep: layers that 8 and 4 bits leave in float, as in `quantize.quantize_model`.
    """
    if PRECISIONS[precision] is None:
        return dynamic_int8(model, name=name)[0]
    return quantize_model(model, PRECISIONS[precision], keep, name=name)[0]
