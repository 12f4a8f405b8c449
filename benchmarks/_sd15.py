"""A full-size SD1.5 with random weights in every precision, and the memory that one takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

FP32, BF16, DYNAMIC, MIXED = "FP32", "BF16", "INT8, dynamic", "mixed: INT8 convolutions, BF16"
ROWS = (f"{FP32} (ComfyUI's default)", f"{FP32}, PyTorch's attention", BF16, DYNAMIC,
        "INT8, PTQ and QAT", MIXED, "4-bit weights, INT8 products")
"""Of the table of costs."""


class FullSize:
    """The rows as MODELs; several made by one share what they are made from."""

    def __init__(self):
        import torch

        draw = torch.Generator().manual_seed(3)
        self.prompt = [[torch.randn(1, 77, 768, generator=draw), {}]]
        self._shared: dict[str, object] = {}

    def make(self, row: str):
        """The MODEL of one of `ROWS`."""
        import torch

        from quanttune.host.calibrate import Calibration, calibrate
        from quanttune.host.dynamic_int8 import dynamic_int8
        from quanttune.host.quantize import quantize_model
        from quanttune.quant import QuantSpec

        if row == ROWS[0]:
            return self._float()
        if row == ROWS[1]:
            return _with_fast_attention(_patcher(torch.float32))
        if row == BF16:
            return _with_fast_attention(_patcher(torch.bfloat16))
        if row == DYNAMIC:
            return self._dynamic()
        if row == MIXED:
            return dynamic_int8(self._float(), "convolutions", "bfloat16")[0]
        if row == ROWS[4]:
            how = Calibration(samples=8, steps=8, dynamic_cross_attention=False)
            latent = {"samples": torch.zeros(1, 4, 32, 32)}
            return calibrate(self._dynamic(), latent, self.prompt, (), how)[0]
        four, _ = quantize_model(self._float(), QuantSpec(4), dtypes=(torch.bfloat16, None))
        return dynamic_int8(four)[0]

    def _float(self):
        import torch

        return self._once(FP32, lambda: _patcher(torch.float32))

    def _dynamic(self):
        from quanttune.host.dynamic_int8 import dynamic_int8

        return self._once(DYNAMIC, lambda: dynamic_int8(self._float(), precision="bfloat16")[0])

    def _once(self, name: str, make: Callable):
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]


def _patcher(dtype):
    import comfy.model_patcher
    import torch

    from quanttune.benchmarks.quantized_unet import random_unet

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(random_unet(dtype), cpu, cpu)


def _with_fast_attention(patcher):
    from quanttune.host.dynamic_int8 import use_pytorch_attention

    patcher.model_options["transformer_options"]["optimized_attention_override"] = (
        use_pytorch_attention)
    return patcher


def memory_of(row: str, side: int = 64, steps: int = 2) -> dict:
    """MiB that a row takes in this process, which has to be fresh: see `memory_above_idle`.

    side: of the latents. steps: of the sampler with guidance.
    """
    import torch

    from quanttune.host.benchmark import one_step

    def run(made) -> None:
        patcher, prompt = made
        for _ in range(steps):
            one_step(patcher, torch.zeros(1, 4, side, side), prompt, prompt, 7.0)

    def build():
        models = FullSize()
        return models.make(row), models.prompt

    return memory_above_idle(build, run)


def memory_above_idle(build: Callable, run: Callable) -> dict:
    """MiB of resident memory above what this process has before ``build()``.

    Returns:
        ``built``, when what ``build`` returns is all that is left of it, and ``peak``, of
        ``run(build())``, the former included; what building takes in between does not count.
    """
    from quanttune.benchmarks.quantized_unet import rss

    _give_back()
    idle = rss()
    made = build()
    _give_back()
    built = rss()
    Path("/proc/self/clear_refs").write_text("5")
    run(made)
    return {"built_mib": (built - idle) / 2**20, "peak_mib": (rss("VmHWM") - idle) / 2**20}


def _give_back() -> None:
    """What is free, to the system: the C library keeps small blocks for the next ones."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
