"""What a backend of integer products is, and how one is chosen by what it declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .activation import Granularity, QuantizedActivation
from .weight import Int8Weight


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-D convolution walks: kernel and, for height and width, the rest as in torch."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Prepared(Protocol):
    """A weight in whatever form a backend's product wants it."""

    def __call__(
        self, x: QuantizedActivation, out_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """``x_scale * out_scale * sum((q - zero_point) * values) + bias``.

        Args:
            x: ``[tokens, in]``, or ``[batch, height, width, in]`` for a convolution.
            out_scale: ``[out]`` float32.
            bias: ``[out]`` or None.
            dtype: of the result.

        Returns:
            ``[tokens, out]`` or ``[batch, height, width, out]``.
        """


class Backend(Protocol):
    """One way to multiply 8-bit integers.

    Attributes:
        name: as shown to users.
        granularity: what shares an activation scale here unless asked otherwise.
    """

    name: str
    granularity: Granularity

    def refuses(self, device: torch.device, conv: ConvGeometry | None, channels: tuple[int, int]):
        """Why such a layer cannot run here, as the end of a sentence, or None if it can.

        Args:
            device: where the layer computes.
            conv: None for a Linear.
            channels: ``(in, out)``.
        """

    def prepare(self, weight: Int8Weight, conv: ConvGeometry | None) -> Prepared:
        """Bring a weight into the backend's form."""


def choose(
    backends: list[Backend],
    device: torch.device,
    conv: ConvGeometry | None,
    channels: tuple[int, int],
) -> tuple[Backend | None, dict[str, str]]:
    """The first backend that takes a layer, and why those before it did not."""
    refused = {}
    for backend in backends:
        reason = backend.refuses(device, conv, channels)
        if reason is None:
            return backend, refused
        refused[backend.name] = reason
    return None, refused
