"""How the names of files end that ``convert`` writes, so that the loading nodes list them."""

from __future__ import annotations

import os

from ..quant import QuantTuneError
from ..quant.tensor_file import SAFETENSORS

STATE = (".pt",)
"""Of a state of TuneQDM: the only ending under which the nodes list it for both of its halves."""
LONGEST = 255 - len(".01234567.tmp")
"""Bytes of a file's name that leave room for what it is called while it is written."""


def check_target(out: str | os.PathLike[str], endings: tuple[str, ...] = SAFETENSORS,
                 what: str = "target") -> None:
    """Refuse a name that does not end as it has to; capitals and small letters are alike.

    Args:
        out: the file to write.
        endings: what it may end in, the usual one first.
        what: to call it in the message.

    Raises:
        QuantTuneError: another ending, or a name that no file has or that is too long for one.
    """
    if "\0" in os.fspath(out):
        raise QuantTuneError(f"The {what} {os.fspath(out)!r} has a NUL in its name; choose another "
                             "name.")
    if len(os.fsencode(os.path.basename(out))) > LONGEST:
        raise QuantTuneError(f"The {what} {os.fspath(out)[:100]!r}... cannot be written because "
                             "the name is too long; choose a shorter one.")
    if not os.fspath(out).lower().endswith(endings):
        raise QuantTuneError(f"The {what} {os.fspath(out)!r} does not end in {endings[0]}, as it "
                             "has to; give it such a name.")
