"""bitsandbytes, which some machines lack."""

from __future__ import annotations

from types import ModuleType

from ..quant import QuantTuneError


def bitsandbytes(what: str, instead: str) -> ModuleType:
    """The library.

    Args:
        what: needs it, for the message: "An NF4 base".
        instead: what the user can do without it: "put 'Quantize UNet' before the training".

    Raises:
        QuantTuneError: it is not installed, or cannot be loaded here.
    """
    try:
        import bitsandbytes as library
    except Exception as error:  # its native part fails in as many ways as there are systems
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise QuantTuneError(f"{what} needs bitsandbytes, which cannot be loaded here ({reason}); "
                             f"install it, or {instead} instead.") from error
    return library
