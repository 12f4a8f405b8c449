"""The exact integer product, anywhere, at no speed: what every backend is held against."""

from __future__ import annotations

import torch.nn.functional as F

from .activation import Granularity
from .backend import ConvGeometry, PlainQuantizers
from .weight import Int8Weight


class ReferenceProduct:
    """float64 holds every sum of 8-bit products exactly (2**53 against 2**16 a product)."""

    def __init__(self, weight: Int8Weight, conv: ConvGeometry | None):
        self.values, self.conv = weight.values.double(), conv

    def __call__(self, x, out_scale, bias, dtype):
        """See `backend.Prepared`."""
        q = x.values.double() - x.zero_point.double()
        if self.conv is None:
            y = F.linear(q, self.values)
        else:
            c = self.conv
            y = F.conv2d(
                q.movedim(-1, 1), self.values, None, c.stride, c.padding, c.dilation, c.groups
            ).movedim(1, -1)
        y = y * x.scale.double() * out_scale.double()
        return (y if bias is None else y + bias.double()).to(dtype)


class ReferenceBackend(PlainQuantizers):
    """See `backend.Backend`; for tests."""

    name = "reference"
    granularity = Granularity.TENSOR

    def refuses(self, device, conv, channels):
        """Metal alone."""
        return "Metal has no float64" if device.type == "mps" else None

    def prepare(self, weight, conv):
        """In float64."""
        return ReferenceProduct(weight, conv)
