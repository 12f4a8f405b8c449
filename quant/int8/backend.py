"""What a backend of integer products is, and how one is chosen by what it declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .activation import Granularity, QuantizedActivation, quantize_tensor, quantize_tokens
from .weight import Int8Weight


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-D convolution walks: kernel and, for height and width, the rest as in torch."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


MOST_TERMS = 65_000
"""Products that 32 bits can add: 2**31 over 255 * 128."""


def too_many_terms(conv: ConvGeometry | None, channels: tuple[int, int]) -> str | None:
    """Why a layer of ``channels`` in and out cannot be added up in 32 bits, or None if it can."""
    terms = channels[0]
    if conv is not None:
        terms = terms // conv.groups * conv.kernel[0] * conv.kernel[1]
    return (
        f"more than {MOST_TERMS} products may not fit into 32 bits"
        if (terms > MOST_TERMS)
        else None
    )


class Prepared(Protocol):
    """A weight in whatever form a backend's product wants it.

    One may have a method ``fused(x, out_scale, bias, dtype)``, too, which does the same to float
    tokens ``[tokens, in]`` and quantizes them by itself, a scale a token; `Int8Layer` prefers it
    where it can.
    """

    def __call__(
        self, x: QuantizedActivation, out_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """``x_scale * out_scale * sum((q - zero_point) * values) + bias``.

        Args:
            x: ``[tokens, in]``, or ``[batch, height, width, in]`` for a convolution; uint8 or
                int8 with a zero point to match.
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

    def quantize_tensor(self, x: Tensor, s_in: Tensor | None = None, qparams=None):
        """As `activation.quantize_tensor`."""

    def quantize_tokens(self, x: Tensor, s_in: Tensor | None = None) -> QuantizedActivation:
        """As `activation.quantize_tokens`."""


class PlainQuantizers:
    """The quantizers of `activation`, for backends that have none of their own."""

    quantize_tensor = staticmethod(quantize_tensor)
    quantize_tokens = staticmethod(quantize_tokens)


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
