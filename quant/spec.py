"""What a quantization should look like: bit width, symmetry and how the range is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .errors import QuantTuneError

SUPPORTED_BITS = (2, 3, 4, 8)


class RangeMethod(str, Enum):
    """How the clipping range of an output channel is chosen.

    ``MINMAX`` covers every weight; ``MSE`` searches the shrunk range with the least squared error.
    """

    MINMAX = "minmax"
    MSE = "mse"


def check_bits(bits: int, where: str = "The bit width") -> int:
    """Return ``bits`` if it is one of `SUPPORTED_BITS`, else raise `QuantTuneError`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in SUPPORTED_BITS:
        raise QuantTuneError(f"{where} is {bits!r}, but it has to be 2, 3, 4 or 8.")
    return bits


@dataclass(frozen=True)
class QuantSpec:
    """Uniform per-output-channel quantization (TuneQDM eq. 1-2).

    Attributes:
        bits: 2, 3, 4 or 8 bits a weight.
        symmetric: True puts the zero point at ``2**(bits - 1)``; False lets it follow the range.
        range: a `RangeMethod` or its name, ``"minmax"`` or ``"mse"``.

    Raises:
        QuantTuneError: an attribute is none of the above.
    """

    bits: int
    symmetric: bool = False
    range: RangeMethod = RangeMethod.MINMAX

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not isinstance(self.symmetric, bool):
            raise QuantTuneError(
                f"The option symmetric is {self.symmetric!r}, but it has to be True or False."
            )
        try:
            object.__setattr__(self, "range", RangeMethod(self.range))
        except ValueError:
            raise QuantTuneError(
                f"The range method is {self.range!r}, but it has to be 'minmax' or 'mse'."
            ) from None
