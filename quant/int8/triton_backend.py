"""Integer products of graphics cards by Triton: Linear layers, and convolutions as no kept library
multiplies them.

Nothing here waits for the card: scales and zero points stay in its memory, and a NaN is not looked
for but kept, so that it shows in the output as it would in float.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time

import torch
from torch import Tensor

from .activation import STEPS, TINY, Granularity, QuantizedActivation
from .activation import quantize_tensor as plain_tensor
from .activation import quantize_tokens as plain_tokens
from .backend import ConvGeometry, too_many_terms
from .reference import ReferenceProduct
from .weight import Int8Weight

THIN = 16
"""Channels a convolution needs on both sides; thinner ones, a UNet's first and last, are sensitive
and small."""
OLDEST = (7, 5)
"""Compute capability that multiplies 8-bit integers in its matrix units."""
TILES = (
    (64, 64, 64, 4, 3),
    (128, 64, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (64, 128, 128, 4, 3),
    (128, 128, 128, 8, 3),
)
"""Rows, outputs and terms of a tile, warps, pipeline stages; timed once for a layer's shape."""
SMALL = 2**26
"""Products below which the first tile is taken without timing."""
VALUES = 4096
"""Values that a program quantizes at once."""
MOST_PROGRAMS = 1024
"""Programs that look for a tensor's range."""
LONGEST_ROW = 16_384
"""Columns that fit into the registers of one program."""

TOO_OLD = "the card is too old: it needs compute capability 7.5 (GeForce RTX 20) or newer"

_TILE: dict[tuple, tuple] = {}
"""The tile to use, by layer shape, image size and device."""


class TritonProduct:
    """See `backend.Prepared`; the weight with its channels last, and its row sums."""

    def __init__(self, weight: Int8Weight, conv: ConvGeometry | None):
        values = weight.values
        self.conv, self.outputs = conv or ConvGeometry((1, 1)), values.shape[0]
        self.channels = values.shape[1]
        self.linear = conv is None
        # A copy in any case: the packed codes are freed and moved by the host as it likes.
        self.values = values.clone() if conv is None else values.movedim(1, -1).contiguous()
        self.sums = values.flatten(1).sum(1, dtype=torch.int32)

    def unpack(self) -> Tensor:
        """The int8 values in their usual order."""
        return self.values if self.linear else self.values.movedim(-1, 1)

    def __call__(self, x, out_scale, bias, dtype):
        """See `backend.Prepared`."""
        values, zero_point = signed(x)
        images = values[None, :, None] if self.linear else values
        batch, height, width, _ = images.shape
        c = self.conv
        size = [
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, dilation in zip(
                (height, width), c.kernel, c.stride, c.padding, c.dilation
            )
        ]
        out = torch.empty(batch, *size, self.outputs, dtype=dtype, device=values.device)
        arguments = (images.contiguous(), x.scale, zero_point, out_scale, bias, out)
        case = (images.shape, self.outputs, c, dtype, values.device)
        tile = _TILE.get(case)
        if tile is None:
            tile = _TILE[case] = self._fastest(arguments)
        self._launch(tile, *arguments)
        return out[0, :, 0] if self.linear else out

    def _fastest(self, arguments) -> tuple:
        out = arguments[-1]
        terms = self.values[0].numel()
        if out.numel() * terms < SMALL or out.device.type == "cpu":
            return TILES[0]
        self._launch(TILES[0], *arguments)
        expected, seconds = out.float(), {}
        for tile in TILES:
            try:
                self._launch(tile, *arguments)
                torch.cuda.synchronize(out.device)
                start = time.perf_counter()
                for _ in range(3):
                    self._launch(tile, *arguments)
                torch.cuda.synchronize(out.device)
            except Exception:  # too large for the card, or for its compiler
                continue
            if alike(out, expected, out.dtype):
                seconds[tile] = time.perf_counter() - start
        return min(seconds, key=seconds.get) if seconds else TILES[0]

    def _launch(self, tile, images, scale, zero_point, out_scale, bias, out) -> None:
        from . import triton_kernels

        block_m, block_n, block_k, warps, stages = tile
        _, height, width, _ = images.shape
        _, out_height, out_width, _ = out.shape
        c = self.conv
        rows, outputs = out.shape[:-1].numel(), self.outputs // c.groups
        pointwise = c.kernel == (1, 1) == c.stride and c.padding == (0, 0)
        grid = (-(-rows // block_m), -(-outputs // block_n), c.groups)
        with _on(images.device):
            triton_kernels.product[grid](
                images, self.values, self.sums, out, scale, zero_point, out_scale, bias,
                rows, outputs, self.channels, height, width, out_height, out_width,
                *c.stride, *c.padding, *c.dilation,
                kernel_w=c.kernel[1], taps=c.kernel[0] * c.kernel[1], groups=c.groups,
                per_row=scale.dim() > 0, has_bias=bias is not None, pointwise=pointwise,
                block_m=block_m, block_n=block_n, block_k=block_k,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip


def too_old(device: torch.device) -> bool:
    """Whether a graphics card has no matrix units for 8-bit integers."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST


def signed(x: QuantizedActivation) -> tuple[Tensor, Tensor]:
    """Values and zero point as int8 and its zero point, of unsigned ones less 128."""
    if x.values.dtype == torch.int8:
        return x.values, x.zero_point
    return (x.values ^ 128).view(torch.int8), x.zero_point - 128


def quantize_tokens(x: Tensor, s_in: Tensor | None = None) -> QuantizedActivation:
    """`activation.quantize_tokens` in one pass."""
    from . import triton_kernels

    rows, columns = x.shape
    if not _applies(x, s_in) or columns > LONGEST_ROW:
        return plain_tokens(x, s_in)
    values = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, 1, device=x.device)
    block = 1 << (columns - 1).bit_length()
    with _on(x.device):
        triton_kernels.quantize_rows[(rows,)](
            x.contiguous(), s_in, values, scale, columns, TINY,
            has_s_in=s_in is not None, block=block, num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return QuantizedActivation(values, scale, _zero(x.device))


def quantize_tensor(x: Tensor, s_in: Tensor | None = None, qparams=None) -> QuantizedActivation:
    """`activation.quantize_tensor` in two passes, or one by a known range; codes are signed."""
    from . import triton_kernels

    if not _applies(x, s_in):
        return plain_tensor(x, s_in, qparams)
    x = x.contiguous()
    numel, columns = x.numel(), x.shape[-1]
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid, shared = (-(-numel // VALUES),), {"has_s_in": s_in is not None, "block": VALUES}
    if qparams is not None:
        scale, zero_point = (q.to(x.device) for q in qparams)
        kept, zero_point = scale.clone(), zero_point - 128
        with _on(x.device):
            triton_kernels.quantize_static[grid](
                x, s_in, scale, zero_point, values, kept, numel, columns, **shared
            )
        return QuantizedActivation(values, kept, zero_point)
    programs = min(grid[0], MOST_PROGRAMS)
    ends = torch.empty(2, programs, device=x.device)
    found = torch.empty(2, device=x.device)
    with _on(x.device):
        triton_kernels.block_ranges[(programs,)](
            x, s_in, ends, numel, columns, programs * VALUES, programs, **shared
        )
        triton_kernels.quantize_by_ranges[grid](
            x, s_in, ends, values, found, numel, columns, programs, STEPS, TINY,
            most_programs=MOST_PROGRAMS, **shared,
        )  # fmt: skip
    return QuantizedActivation(values, found[0], found[1])


def _applies(x: Tensor, s_in: Tensor | None) -> bool:
    """Whether the kernels do it: not to compiled code, which fuses the plain formula, nor to
    samples with scales of their own."""
    return (
        not torch.compiler.is_compiling()
        and x.numel() < 2**31
        and (s_in is None or s_in.numel() == s_in.shape[-1])
    )


@functools.cache
def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), device=device)


def _on(device: torch.device):
    """Launches go to the card that is current, which need not be the one with the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonBackend:
    """See `backend.Backend`."""

    name = "Triton"
    granularity = Granularity.TOKEN

    def refuses(self, device, conv, channels):
        """Everything but graphics cards on which a small layer comes out right."""
        if device.type != "cuda":
            return "it runs on NVIDIA and AMD graphics cards only"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if too_old(device):
            return TOO_OLD
        if conv is not None and min(channels) < THIN:
            return f"a convolution from or to fewer than {THIN} channels gains nothing"
        return too_many_terms(conv, channels) or trial(device)

    def prepare(self, weight, conv):
        """With its channels last."""
        return TritonProduct(weight, conv)

    def quantize_tokens(self, x, s_in=None):
        """See the function."""
        return quantize_tokens(x, s_in)

    def quantize_tensor(self, x, s_in=None, qparams=None):
        """See the function."""
        return quantize_tensor(x, s_in, qparams)


def alike(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a result is the expected one but for the rounding of its dtype."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    return bool((ours.float() - expected).abs().max() <= tolerance * expected.abs().max())


@functools.cache
def trial(device: torch.device) -> str | None:
    """Why the kernels cannot be used on ``device``: they do not compile, or compute wrongly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 16, generator=generator) + 0.3
    values = torch.randint(-128, 128, (24, 16, 3, 3), generator=generator, dtype=torch.int8)
    scale = torch.rand(24, generator=generator) + 0.5
    conv = ConvGeometry((3, 3), (1, 1), (1, 1))
    try:
        x, values, scale = (t.to(device) for t in (x, values, scale))
        kernel = Int8Weight(values, scale)
        matrix = Int8Weight(values[..., 0, 0].contiguous(), scale)
        for dtype, bias in (
            (torch.float32, scale - 0.7),
            (torch.float16, None),
            (torch.bfloat16, scale - 0.7),
        ):
            images, tokens = x.to(dtype), x.to(dtype).flatten(0, 2)
            for q, exact, weight, geometry in (
                (quantize_tensor(images), images, kernel, conv),
                (quantize_tensor(tokens), tokens, matrix, None),
                (quantize_tokens(tokens), tokens, matrix, None),
            ):
                if not bool(((q.dequantize() - exact.float()).abs() <= q.scale * 0.51).all()):
                    return "its codes are wrong on this card"
                ours = TritonProduct(weight, geometry)(q, scale, bias, dtype).float()
                expected = ReferenceProduct(weight, geometry)(q, scale, bias, torch.float32)
                if not alike(ours, expected, dtype):
                    return f"its results in {dtype} are wrong on this card"
    except torch.OutOfMemoryError:
        raise  # no answer to remember
    except Exception as error:  # compilers, drivers and missing libraries fail in many ways
        return f"it does not run here ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None
