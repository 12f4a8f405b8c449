"""One LoRA adapter, whatever file or training it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LoraLayer:
    """``W + alpha / rank * up @ down`` (Hu et al. 2022).

    Attributes:
        down: ``[rank, in]``, or ``[rank, in / groups, kh, kw]`` of a convolution.
        up: ``[out, rank]``, or ``[out, rank, 1, 1]``.
        alpha: see above.
        dora_scale: ``[out, 1, ...]``, DoRA's magnitudes as stock files hold them, or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]
