"""What a quantized MODEL is, in the few characters of a badge on its node."""

from __future__ import annotations

from collections import Counter

import torch

from .bnb import LABELS
from .bnb_quantize import bnb_kind
from .build import quantized_model
from .int8 import OPTION

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
          torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}


def badge_of(patcher) -> str:
    """Such as "4-bit · 0.40 GiB" or "8-bit · INT8 · 41.2 MiB": bits of the weights, whether
    integers are multiplied, and the size of all weights as the host accounts it."""
    parts = [_weights(patcher)]
    if patcher.model_options["transformer_options"].get(OPTION) is not None:
        parts.append("INT8")
    return " · ".join([*parts, size_text(patcher.model_size())])


def size_text(count: float) -> str:
    """Bytes in MiB or GiB, three figures at most."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= 0.1 * unit:
            value = count / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return f"{count / 2**10:.1f} KiB"


def _weights(patcher) -> str:
    if kind := bnb_kind(patcher):
        return LABELS[kind]
    quantized = quantized_model(patcher)
    if quantized is None or not quantized.checkpoint.layers:
        sizes = Counter()
        for p in patcher.model.diffusion_model.parameters():
            sizes[p.dtype] += p.nbytes
        dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
        return DTYPES.get(dtype, str(dtype).removeprefix("torch."))
    layers = quantized.checkpoint.layers.values()
    counts = Counter()
    for weight in layers:
        counts[weight.bits] += weight.numel
    mean = sum(bits * n for bits, n in counts.items()) / sum(counts.values())
    return f"{mean:.0f}-bit" if len(counts) == 1 else f"{mean:.1f}-bit"
