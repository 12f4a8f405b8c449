"""What integer products gain on this machine: one short measurement, once a process."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

from ..quant import QuantizedWeight, QuantSpec
from ..quant.int8 import BACKENDS, ConvGeometry, Int8Layer, choose
from .benchmark import wait_for

ROUNDS = 3
CASES = {
    "convolution": ((2, 320, 64, 64), (320, 320, 3, 3)),
    "Linear": ((2, 1024, 1280), (1280, 1280)),
}
"""Input and weight shapes of two layers that are typical of SD1.5."""


@functools.cache
def gains(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, dict]]:
    """Time in float over time in integers, quantizing the activation included.

    Args:
        device: where models compute.
        dtype: what the model computes in elsewhere.

    Returns:
        For "convolution" and "Linear", if they can be had here: the name of the backend, and float
        dtype (``dtype`` and float32) to ratio.
    """
    found = {}
    with torch.inference_mode():
        for name, (inputs, shape) in CASES.items():
            generator = torch.Generator().manual_seed(0)
            x, weight = (torch.randn(s, generator=generator) for s in (inputs, shape))
            conv = None if len(shape) == 2 else ConvGeometry((3, 3), (1, 1), (1, 1))
            backend, _ = choose(BACKENDS, device, conv, (shape[1], shape[0]))
            if backend is None:
                continue
            x, weight = x.to(device), weight.to(device)
            packed = QuantizedWeight.quantize(weight, QuantSpec(8, symmetric=True))
            ways = {"int8": _integers(Int8Layer(packed, conv, backend), _laid_out(x, dtype))}
            for kind in dict.fromkeys((dtype, torch.float32)):
                ways[kind] = _floats(weight, x, kind)
            seconds = _fastest(ways, device)
            found[name] = backend.name, {
                k: seconds[k] / seconds["int8"] for k in ways if k != "int8"}
    return found


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """`gains` as a sentence."""
    found = gains(device, dtype)
    parts = []
    for name, (_, ratios) in found.items():
        against = " and ".join(f"{ratio:.1f} x {str(kind).removeprefix('torch.')}"
                               for kind, ratio in ratios.items())
        parts.append(f"a {name} runs at {against}")
    backends = " and ".join(dict.fromkeys(backend for backend, _ in found.values()))
    return f"{backends}: {', '.join(parts)} (measured here on one layer each)"


def _laid_out(x, dtype):
    x = x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _integers(layer, x):
    return lambda: layer(x)


def _floats(weight, x, dtype):
    """The float layer as the host runs it: its own dtype, images channels first."""
    weight, x = weight.to(dtype), x.to(dtype)
    if weight.dim() == 2:
        return lambda: F.linear(x, weight)
    return lambda: F.conv2d(x, weight, padding=1)


def _fastest(ways: dict, device: torch.device) -> dict:
    best = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()
    wait_for(device)
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            wait_for(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best
