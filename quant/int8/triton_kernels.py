"""Triton kernels of graphics cards: activations to int8, and the product with what surrounds it.

Imported by `triton_backend` alone, because Triton is not installed everywhere. Integers are signed
here, the only kind that Triton multiplies: codes of a tensor's range are those of `activation` less
128, and so is their zero point.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_rows(
    x_ptr,
    s_in_ptr,
    values_ptr,
    scale_ptr,
    columns,
    tiny,
    has_s_in: tl.constexpr,
    block: tl.constexpr,
):
    """One symmetric scale a row: ``values = round(x * s_in / scale)``; a program a row.

    A row with NaN or infinity gets NaN for its scale, so that nothing hides it.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if has_s_in:
        x *= tl.load(s_in_ptr + column, mask=inside, other=0.0)
    # x * 0 is NaN where x is not finite, and maxima do not keep NaN.
    scale = tl.maximum(tl.max(tl.abs(x), 0), tiny) / 127 + tl.sum(x * 0.0, 0)
    codes = tl.floor(x / scale + 0.5).to(tl.int32).to(tl.int8)
    tl.store(values_ptr + row * columns + column, codes, mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def block_ranges(
    x_ptr,
    s_in_ptr,
    ends_ptr,
    numel,
    columns,
    stride,
    programs,
    has_s_in: tl.constexpr,
    block: tl.constexpr,
):
    """Lowest and highest ``x * s_in`` of what each program reads, into ``ends [2, programs]``."""
    program = tl.program_id(0)
    low = tl.zeros((block,), tl.float32)
    high = tl.zeros((block,), tl.float32)
    bad = tl.zeros((block,), tl.float32)
    for start in range(program * block, numel, stride):
        index = start + tl.arange(0, block)
        inside = index < numel
        x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if has_s_in:
            x *= tl.load(s_in_ptr + index % columns, mask=inside, other=0.0)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        bad += x * 0.0
    bad = tl.sum(bad, 0)
    tl.store(ends_ptr + program, tl.min(low, 0) + bad)
    tl.store(ends_ptr + programs + program, tl.max(high, 0) + bad)


@triton.jit
def quantize_by_ranges(
    x_ptr,
    s_in_ptr,
    ends_ptr,
    values_ptr,
    qparams_ptr,
    numel,
    columns,
    programs,
    steps,
    tiny,
    has_s_in: tl.constexpr,
    block: tl.constexpr,
    most_programs: tl.constexpr,
):
    """Asymmetric codes by the range that `block_ranges` found.

    Scale and zero point go to ``qparams [2]``. Each program reduces ``ends`` by itself: that reads
    a few KiB from the cache and saves a launch.
    """
    part = tl.arange(0, most_programs)
    there = part < programs
    lows = tl.load(ends_ptr + part, mask=there, other=0.0)
    highs = tl.load(ends_ptr + programs + part, mask=there, other=0.0)
    bad = tl.sum(lows * 0.0 + highs * 0.0, 0)
    low, high = tl.min(lows, 0), tl.max(highs, 0)
    scale = tl.maximum((high - low) / steps, tiny) + bad
    zero_point = tl.floor(-low / scale + 0.5) - 128.0
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < numel
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if has_s_in:
        x *= tl.load(s_in_ptr + index % columns, mask=inside, other=0.0)
    codes = tl.floor(x / scale + (zero_point + 0.5))
    codes = tl.minimum(tl.maximum(codes, -128.0), 127.0).to(tl.int32).to(tl.int8)
    tl.store(values_ptr + index, codes, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(qparams_ptr, scale)
        tl.store(qparams_ptr + 1, zero_point)


@triton.jit
def quantize_static(
    x_ptr,
    s_in_ptr,
    scale_ptr,
    zero_ptr,
    values_ptr,
    kept_ptr,
    numel,
    columns,
    has_s_in: tl.constexpr,
    block: tl.constexpr,
):
    """Asymmetric, clamped codes by a known scale and signed zero point.

    ``kept`` holds the same scale before, and NaN after if any value is not finite.
    """
    scale = tl.load(scale_ptr)
    zero_point = tl.load(zero_ptr)
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < numel
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if has_s_in:
        x *= tl.load(s_in_ptr + index % columns, mask=inside, other=0.0)
    bad = tl.sum(x * 0.0, 0)
    codes = tl.floor(x / scale + (zero_point + 0.5))
    codes = tl.minimum(tl.maximum(codes, -128.0), 127.0).to(tl.int32).to(tl.int8)
    tl.store(values_ptr + index, codes, mask=inside)
    if bad != bad:
        tl.store(kept_ptr, bad)


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    sums_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    out_scale_ptr,
    bias_ptr,
    rows,
    outputs,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    step_h,
    step_w,
    kernel_w: tl.constexpr,
    taps: tl.constexpr,
    groups: tl.constexpr,
    per_row: tl.constexpr,
    has_bias: tl.constexpr,
    pointwise: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """Implicit matrix product of a convolution (of one pixel: a Linear), rescaled at once.

    ``out[m, n] = x_scale * out_scale[n] * sum((x - zero_point) * weight[n]) + bias[n]`` with ``m``
    counting output pixels. Input ``[B, H, W, groups * channels]``, weight ``[groups * outputs,
    taps, channels]``, ``sums`` its row sums. Outside of the image stands the zero point.
    """
    group = tl.program_id(2)
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    zero = tl.load(zero_ptr)
    outside = zero.to(tl.int32).to(tl.int8)
    row = tl.minimum(m, rows - 1).to(tl.int64)
    image = row // (out_height * out_width)
    top = (row // out_width % out_height) * stride_h - pad_h
    left = (row % out_width) * stride_w - pad_w
    n_inside = n < outputs
    column = (group * outputs + tl.minimum(n, outputs - 1)).to(tl.int64)
    blocks = tl.cdiv(channels, block_k)
    total = tl.zeros((block_m, block_n), dtype=tl.int32)
    # Taps and channels in one loop: Triton overlaps loads with products in the innermost alone.
    for step in range(0, taps * blocks):
        tap = step // blocks
        channel = (step % blocks) * block_k + k
        within = channel < channels
        if pointwise:
            pixel = row
            seen = m < rows
        else:
            y = top + (tap // kernel_w) * step_h
            x = left + (tap % kernel_w) * step_w
            seen = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = (image * height + y) * width + x
        a = tl.load(
            x_ptr + (pixel * (groups * channels) + group * channels)[:, None] + channel[None, :],
            mask=seen[:, None] & within[None, :],
            other=outside,
        )
        b = tl.load(
            weight_ptr + (column * taps + tap)[None, :] * channels + channel[:, None],
            mask=n_inside[None, :] & within[:, None],
            other=0,
        )
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    total -= zero.to(tl.int32) * tl.load(sums_ptr + column)[None, :]
    scale = tl.load(out_scale_ptr + column)[None, :]
    if per_row:
        scale = scale * tl.load(scale_ptr + row)[:, None]
    else:
        scale = scale * tl.load(scale_ptr)
    result = total.to(tl.float32) * scale
    if has_bias:
        result += tl.load(bias_ptr + column)[None, :].to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * (groups * outputs) + column[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(m < rows)[:, None] & n_inside[None, :],
    )
