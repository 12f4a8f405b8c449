"""What PyTorch says of inputs that do not fit a model, as a sentence for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..quant import QuantTuneError


@contextmanager
def explained(sentence: str) -> Iterator[None]:
    """Turn an error of shapes or types inside into QuantTuneError.

    Too little memory, what was explained already and the host's interrupt come through.

    Args:
        sentence: names the input and what to do; ``{reason}`` in it becomes the error's first
            line.
    """
    try:
        yield
    except (torch.OutOfMemoryError, QuantTuneError):
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise QuantTuneError(sentence.replace("{reason}", reason)) from error
