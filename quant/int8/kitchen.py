"""Integer Linear layers of graphics cards by comfy-kitchen, the library of the host's own INT8."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..limits import is_finite
from . import activation, triton_backend
from .activation import Granularity
from .backend import too_many_terms
from .reference import ReferenceProduct
from .triton_backend import TritonProduct
from .weight import Int8Weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What the library reads and writes."""


class KitchenLinear:
    """See `backend.Prepared`.

    The library's Linear takes floats; a product of codes that exist already (those of static
    ranges, or with ``s_in`` in them) is Triton's, or where there is none the library's own with the
    rescaling after it.
    """

    def __init__(self, weight: Int8Weight, device: torch.device):
        self.product = TritonProduct(weight, None)
        self.has_triton = triton_backend.trial(device) is None

    def unpack(self) -> Tensor:
        """The int8 values."""
        return self.product.values

    def fused(self, x: Tensor, out_scale: Tensor, bias: Tensor | None, dtype) -> Tensor:
        """Float tokens to the float output, quantized on the way."""
        import comfy_kitchen

        kind = dtype if dtype in FLOATS else torch.float32
        return comfy_kitchen.int8_linear(x, self.unpack(), out_scale, bias, kind).to(dtype)

    def __call__(self, x, out_scale, bias, dtype):
        """See `backend.Prepared`."""
        if self.has_triton:
            return self.product(x, out_scale, bias, dtype)
        import comfy_kitchen

        values, zero_point = triton_backend.signed(x)
        total = comfy_kitchen.mm_int8(values.contiguous(), self.unpack().t())
        total -= zero_point.to(torch.int32) * self.product.sums
        y = total.float() * x.scale * out_scale
        return (y if bias is None else y + bias).to(dtype)


class KitchenBackend:
    """See `backend.Backend`."""

    name = "comfy-kitchen"
    granularity = Granularity.TOKEN

    def refuses(self, device, conv, channels):
        """Everything but Linear layers on graphics cards on which a small one comes out right."""
        if device.type != "cuda":
            return "it runs on NVIDIA and AMD graphics cards only"
        if conv is not None:
            return "it has no convolution"
        if importlib.util.find_spec("comfy_kitchen") is None:
            return "the package comfy-kitchen is not installed"
        if triton_backend.too_old(device):
            return triton_backend.TOO_OLD
        return too_many_terms(conv, channels) or trial(device)

    def prepare(self, weight, conv):
        """As it is."""
        return KitchenLinear(weight, weight.values.device)

    def quantize_tokens(self, x, s_in=None):
        """By Triton where it is."""
        return _quantizers(x.device).quantize_tokens(x, s_in)

    def quantize_tensor(self, x, s_in=None, qparams=None):
        """By Triton where it is."""
        return _quantizers(x.device).quantize_tensor(x, s_in, qparams)


def _quantizers(device: torch.device):
    return triton_backend if triton_backend.trial(device) is None else activation


@functools.cache
def trial(device: torch.device) -> str | None:
    """Why the library cannot be used on ``device``: it does not run, or computes wrongly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=generator)
    values = torch.randint(-128, 128, (32, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(32, generator=generator) + 0.5
    try:
        x, values, scale = (t.to(device) for t in (x, values, scale))
        weight = Int8Weight(values, scale)
        ours = KitchenLinear(weight, device)
        for dtype, bias, rows in (
            (torch.float32, scale - 0.7, 48),
            (torch.float16, None, 48),
            (torch.bfloat16, scale - 0.7, 1),
        ):
            tokens = x[:rows].to(dtype)
            q = activation.quantize_tokens(tokens)
            exact = ReferenceProduct(weight, None)(q, scale, bias, torch.float32)
            # Its quantizer may round halves in another way, or in the dtype of the input.
            fused = ours.fused(tokens, scale, bias, dtype).float()
            if not float((fused - exact).norm()) <= 2e-2 * float(exact.norm()):
                return f"its results in {dtype} are wrong on this card"
            if not triton_backend.alike(ours(q, scale, bias, dtype), exact, dtype):
                return f"its products in {dtype} are wrong on this card"
        x[3, 5] = float("nan")
        if is_finite(ours.fused(x, scale, None, torch.float32)[3]):
            return "it hides NaN"
    except torch.OutOfMemoryError:
        raise  # no answer to remember
    except Exception as error:  # compilers, drivers and missing libraries fail in many ways
        return f"it does not run here ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None
