"""The uniform quantizer of TuneQDM eq. 1-2, one scale and zero point per output channel.

``q = clamp(round(w / scale) + zero_point, 0, 2**bits - 1)`` and ``w ~ scale * (q - zero_point)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import QuantTuneError
from .spec import QuantSpec, RangeMethod

# Elements worked on at once: small enough for the scratch tensors to stay in a core's L2 cache.
BLOCK_ELEMENTS = 128 * 1024
# A row whose largest weight is below this is stored as zeros: its scale would be subnormal.
TINY = 1e-35
# Fractions of the full range that the MSE search tries; fewer bits profit from stronger clipping.
SHRINK_STEPS = 24
SMALLEST_SHRINK = {2: 0.30, 3: 0.42, 4: 0.52, 8: 0.80}


def row_blocks(rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of consecutive rows holding about `BLOCK_ELEMENTS` elements each."""
    step = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def choose_qparams(w2d: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row.

    Args:
        w2d: ``[rows, K]`` weights of any float dtype.
        spec: bit width, symmetry and range method.

    Returns:
        ``scale`` and ``zero_point``, both ``[rows]`` float32; zero points hold integers between 0
        and ``2**bits - 1``. Zero is always representable. A row of zeros gets scale 1.

    Raises:
        QuantTuneError: the weights hold NaN or infinity, or are not a float matrix.
    """
    if w2d.dim() != 2 or not w2d.is_floating_point() or w2d.numel() == 0:
        raise QuantTuneError(
            f"Only a non-empty float matrix can be quantized, but the weight has shape "
            f"{tuple(w2d.shape)} and type {w2d.dtype}; load the model's float file instead."
        )
    scale = torch.empty(w2d.shape[0], dtype=torch.float32, device=w2d.device)
    zero_point = torch.empty_like(scale)
    for block in row_blocks(*w2d.shape):
        w = w2d[block].detach().float()
        low, high = torch.aminmax(w, dim=1)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise QuantTuneError(
                "The weights hold NaN or infinite values and cannot be quantized; "
                "download or export the model again."
            )
        low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
        if spec.range is RangeMethod.MSE:
            scale[block], zero_point[block] = _search_mse(w, low, high, spec)
        else:
            scale[block], zero_point[block] = _qparams_of_range(low, high, spec)
    return scale, zero_point


def _qparams_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of rows whose weights lie in ``[low, high]``, which includes 0."""
    levels = 2**spec.bits - 1
    if spec.symmetric:
        half = 2 ** (spec.bits - 1)
        # The integers reach one step further down than up, so each side has its own need.
        scale = torch.maximum(high / (half - 1), low / -half)
        scale = torch.where(scale > TINY, scale, torch.ones_like(scale))
        return scale, torch.full_like(scale, half)
    # Divided before the difference is taken: high - low can overflow float32.
    scale = high / levels - low / levels
    scale = torch.where(scale > TINY, scale, torch.ones_like(scale))
    return scale, (-low / scale).round_().clamp_(0, levels)


def _search_mse(w: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The shrunk range with the least squared error per row, among `SHRINK_STEPS` fractions."""
    best_scale, best_zero = _qparams_of_range(low, high, spec)
    scratch = torch.empty_like(w)
    best_error = _row_error(w, best_scale, best_zero, spec.bits, scratch)
    for shrink in torch.linspace(SMALLEST_SHRINK[spec.bits], 1.0, SHRINK_STEPS + 1)[:-1].tolist():
        scale, zero = _qparams_of_range(low * shrink, high * shrink, spec)
        error = _row_error(w, scale, zero, spec.bits, scratch)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _row_error(w: Tensor, scale: Tensor, zero: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """Norm of ``w - dequantized`` of every row, computed in ``scratch``."""
    scale, zero = scale[:, None], zero[:, None]
    torch.div(w, scale, out=scratch).round_()
    torch.maximum(scratch, -zero, out=scratch)
    torch.minimum(scratch, 2**bits - 1 - zero, out=scratch)
    scratch.mul_(scale).sub_(w)
    return torch.linalg.vector_norm(scratch, dim=1)


def quantize_codes(w2d: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integer codes of a weight matrix (eq. 1).

    Args:
        w2d: ``[rows, K]`` float weights.
        scale, zero_point: ``[rows]`` float32, as from `choose_qparams`.
        bits: bit width.

    Returns:
        ``[rows, K]`` uint8 in ``0 .. 2**bits - 1``.
    """
    codes = torch.empty(w2d.shape, dtype=torch.uint8, device=w2d.device)
    for block in row_blocks(*w2d.shape):
        q = w2d[block].detach().float() / scale[block, None]
        q.round_().add_(zero_point[block, None]).clamp_(0, 2**bits - 1)
        codes[block].copy_(q)
    return codes


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The plain reference of eq. 2: ``scale * (codes - zero_point)``, ``[rows, K]`` float32."""
    return (codes.float() - zero_point[:, None]) * scale[:, None]
