"""Integer products of processors by oneDNN: AMX-INT8 or VNNI where the processor has them.

The operators are those that torch's own compiler emits for quantized models. They are no stable
interface, so they are called from here alone and tried against the reference once before use.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

from ..paging import let_go
from .activation import (
    Granularity,
    check_finite,
    quantize_tensor,
    quantize_tokens,
)
from .backend import ConvGeometry, PlainQuantizers, too_many_terms
from .reference import ReferenceProduct
from .weight import Int8Weight

OUTPUTS = (torch.float32, torch.bfloat16)
"""What the operators write themselves; any other dtype is cast from float32."""
THIN = 16
"""Channels that the integer instructions take at a time; a UNet's first and last convolution have 4
of one kind and are among its most sensitive layers."""
TRIED_SIZES = (16, 64, 1024)
"""Image sizes whose prepacked layouts are tried beside that of the actual size; see `_Conv2d`."""


class _Linear:
    def __init__(self, weight: Int8Weight):
        values = weight.values
        self.packed = torch.ops.onednn.qlinear_prepack(values, [256, values.shape[1]])
        self.zeros = torch.zeros(values.shape[0], dtype=torch.int64)

    def unpack(self) -> Tensor:
        """The int8 values again: prepacking only reorders them."""
        return self.packed.to_dense().t()

    def __call__(self, x, out_scale, bias, dtype):
        per_token = x.scale.dim() > 0
        output = torch.ops.onednn.qlinear_pointwise(
            x.values,
            1.0 if per_token else check_finite(float(x.scale)),
            int(x.zero_point),
            self.packed,
            out_scale,
            self.zeros,
            None if per_token else bias,
            1.0,
            0,
            dtype if dtype in OUTPUTS else torch.float32,
            "none",
            [],
            "",
        )
        if per_token:
            output = output.mul_(x.scale) if output.dtype == torch.float32 else output * x.scale
            output = output.to(dtype) if bias is None else output.add_(bias).to(dtype)
        return output.to(dtype)


_CHOSEN: dict[tuple, int] = {}
"""The image size to name when prepacking, by layer shape, image size and dtype of the result."""


class _Conv2d:
    """A convolution, prepacked anew when another image size wants another layout.

    oneDNN picks the layout of a weight by the size of the image and the dtype of the result, but
    the prepacking operator assumes float32 results: with the layout of the actual size, a bfloat16
    result makes oneDNN reorder the whole weight in every call (7-14 ms for 1280 x 1280 x 3 x 3).
    Which size to name for which layout is not documented, so a few are timed, once for all layers
    of one shape.
    """

    def __init__(self, weight: Int8Weight, conv: ConvGeometry):
        self.conv, self.shape = conv, tuple(weight.values.shape)
        self.zeros = torch.zeros(self.shape[0], dtype=torch.int64)
        self.packed, self.size = weight.values, 0

    def unpack(self) -> Tensor:
        """The int8 values again: prepacking only reorders them."""
        return self.packed if not self.size else self.packed.to_dense()

    def __call__(self, x, out_scale, bias, dtype):
        output_dtype = dtype if dtype in OUTPUTS else torch.float32
        arguments = (
            x.values.movedim(-1, 1),
            check_finite(float(x.scale)),
            int(x.zero_point),
            out_scale,
            bias,
            output_dtype,
        )
        height, width = x.values.shape[1:3]
        threads = torch.get_num_threads()
        case = (self.shape, self.conv, height, width, output_dtype, threads)
        if case not in _CHOSEN:
            _CHOSEN[case] = self._fastest(height, width, arguments)
        self._prepack(_CHOSEN[case])
        return self._run(*arguments).movedim(1, -1).to(dtype)

    def _fastest(self, height: int, width: int, arguments) -> int:
        seconds = {}
        for size in dict.fromkeys((max(height, width), *TRIED_SIZES)):
            self._prepack(size)
            self._run(*arguments)
            start = time.perf_counter()
            self._run(*arguments)
            seconds[size] = time.perf_counter() - start
        return min(seconds, key=seconds.get)

    def _prepack(self, size: int) -> None:
        if size == self.size:
            return
        values, c = self.unpack(), self.conv
        scales = torch.ones(self.shape[0])
        self.packed = torch.ops.onednn.qconv_prepack(
            values,
            scales,
            1.0,
            128,
            list(c.stride),
            list(c.padding),
            list(c.dilation),
            c.groups,
            [1, self.shape[1] * c.groups, size, size],
        )
        self.size = size
        let_go(values.numel())

    def _run(self, x, scale, zero_point, out_scale, bias, dtype) -> Tensor:
        c = self.conv
        return torch.ops.onednn.qconv2d_pointwise(
            x,
            scale,
            zero_point,
            self.packed,
            out_scale,
            self.zeros,
            bias,
            list(c.stride),
            list(c.padding),
            list(c.dilation),
            c.groups,
            1.0,
            0,
            dtype,
            "none",
            [],
            "",
        )


class OneDNNBackend(PlainQuantizers):
    """See `backend.Backend`."""

    name = "oneDNN"
    granularity = Granularity.TENSOR

    def refuses(self, device, conv, channels):
        """Everything but processors that pass the trial, and convolutions of few channels."""
        if device.type != "cpu":
            return "it runs on the processor only"
        if conv is not None and min(channels) < THIN:
            return f"a convolution from or to fewer than {THIN} channels gains nothing"
        return too_many_terms(conv, channels) or _trial()

    def prepare(self, weight, conv):
        """Prepacked for AMX or VNNI; the values can be read back with ``unpack``."""
        return _Linear(weight) if conv is None else _Conv2d(weight, conv)


@functools.cache
def _trial() -> str | None:
    """Why this torch or processor cannot be used, found on small layers with extreme values.

    Processors without VNNI add pairs of products in 16 bits and saturate, which the largest
    activations on the largest weights would show.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 6, 5, 16, generator=generator) - 0.1
    x[:, :3] = 0.9
    values = torch.randint(-127, 128, (8, 16, 3, 3), generator=generator, dtype=torch.int8)
    values[:4] = 127
    scale, bias = torch.rand(8, generator=generator) + 0.5, torch.randn(8, generator=generator)
    conv = ConvGeometry((3, 3), (1, 1), (1, 1))
    kernel, matrix = Int8Weight(values, scale), Int8Weight(values[..., 0, 0].contiguous(), scale)
    try:
        for q, weight, geometry in (
            (quantize_tensor(x), kernel, conv),
            (quantize_tensor(x.flatten(0, 2)), matrix, None),
            (quantize_tokens(x.flatten(0, 2)), matrix, None),
        ):
            ours = _Linear(weight) if geometry is None else _Conv2d(weight, geometry)
            expected = ReferenceProduct(weight, geometry)(q, scale, bias, torch.float32)
            if not torch.allclose(
                ours(q, scale, bias, torch.float32),
                expected,
                rtol=1e-4,
                atol=1e-4 * float(expected.abs().max()),
            ):
                return "its results are wrong on this processor (no VNNI?)"
            if not torch.equal(ours.unpack(), weight.values):
                return "prepacked weights cannot be read back with this torch"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"this torch lacks it ({str(error).splitlines()[0]})"
    return None
