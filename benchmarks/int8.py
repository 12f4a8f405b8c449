"""INT8 on a full-size SD1.5 UNet: time, error, warm-up, against every float there is.

``python dev.py bench int8 [--json FILE] [-- --threads 1 --rounds 5 --latents 64 32]``

Random weights, batch 2, all ways alternating in one process so that a drift of the machine meets
all of them; processor time, median of the rounds' ratios. The ways:

- ``fp32``: what ComfyUI does on a processor by default, float32 and its own attention,
- ``bf16``: bfloat16, convolution weights channels last, PyTorch's attention,
- ``bf16 compiled``: the same through torch.compile (with ``--compile``: it takes minutes),
- ``int8``: *Dynamic INT8* on the float model, ``int8 convolutions`` with Linear layers in bfloat16,
- ``int8 static``: the same integers with ranges from *Calibrate INT8*, four sets of them,
- ``w4a8``: *Dynamic INT8* on the 4-bit model, ``w4a8 routed`` with four experts' scales on it.

The error is that of the output against float32, relative, at one timestep. Warm-up is the wall time
of the first forward above that of the others: weights are laid out for the processor, and the
layout is found by trying.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

TARGETS = {"fp32": 4.0, "best float": {64: 1.25, 32: 1.6}}


def main(argv=None):
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latents", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(argv)
    from quanttune.benchmarks.quantized_unet import start_host

    start_host()
    import torch

    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        models, notes = _models(torch)
        result = {"threads": options.threads, "batch": options.batch, "note": notes,
                  "latents": {str(s): _measure(torch, models, s, options)
                              for s in options.latents}}
    first = result["latents"][str(options.latents[0])]
    result["cpu"] = {k: first[k] for k in ("speedup_vs_fp32", "speedup_vs_best_float", "error")}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _models(torch):
    """Name to MODEL, and the note of the node."""
    import comfy.model_patcher

    from quanttune.benchmarks.quantized_unet import random_scales, random_unet
    from quanttune.host.dynamic_int8 import dynamic_int8, use_pytorch_attention
    from quanttune.host.quantize import quantize_model
    from quanttune.host.routing import apply_scale_set
    from quanttune.quant import QuantSpec

    cpu = torch.device("cpu")
    fp32 = comfy.model_patcher.CoreModelPatcher(random_unet(torch.float32), cpu, cpu)
    bf16 = comfy.model_patcher.CoreModelPatcher(random_unet(torch.bfloat16), cpu, cpu)
    for module in bf16.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    bf16.model_options["transformer_options"]["optimized_attention_override"] = (
        use_pytorch_attention)
    int8, note = dynamic_int8(fp32)
    four_bits, _ = quantize_model(fp32, QuantSpec(4), dtypes=(torch.bfloat16, None))
    w4a8, _ = dynamic_int8(four_bits)
    return {
        "fp32": fp32, "bf16": bf16, "int8": int8, "int8 static": _static(torch, int8),
        "int8 convolutions": dynamic_int8(fp32, "convolutions")[0], "w4a8": w4a8,
        "w4a8 routed": apply_scale_set(w4a8, random_scales(w4a8), 1.0, "s")[0],
    }, note.splitlines()[-2:]


def _static(torch, int8):
    """The calibrated MODEL; the ranges come from eight steps, enough to measure time by."""
    from quanttune.host.calibrate import Calibration, calibrate

    prompt = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(3)), {}]]
    how = Calibration(samples=8, steps=8, timestep_buckets=4, dynamic_cross_attention=False)
    return calibrate(int8, {"samples": torch.zeros(1, 4, 32, 32)}, prompt, (), how)[0]


def _measure(torch, models, size, options) -> dict:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(options.batch, 4, size, size, generator=generator)
    context = torch.randn(options.batch, 77, 768, generator=generator)
    runs = {name: _run(torch, model, x, context) for name, model in models.items()}
    if options.compile:
        runs["bf16 compiled"] = _run(torch, models["bf16"], x, context, compiled=True)
    outputs, warm_up = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        outputs[name] = run(0)
        warm_up[name] = time.perf_counter() - start
    seconds = {name: [] for name in runs}
    wall = dict.fromkeys(runs, float("inf"))
    for round_ in range(options.rounds):
        for name, run in runs.items():
            start, start_wall = time.process_time(), time.perf_counter()
            run(round_)
            seconds[name].append(time.process_time() - start)
            wall[name] = min(wall[name], time.perf_counter() - start_wall)
    floats = [n for n in runs if n.startswith("bf16")]
    best = min(floats, key=lambda n: statistics.median(seconds[n]))

    def ratio(of, to):
        return statistics.median(a / b for a, b in zip(seconds[of], seconds[to]))

    exact = outputs["fp32"].float()
    return {
        "seconds": {n: statistics.median(s) for n, s in seconds.items()}, "all": seconds,
        "errors": {n: float((y.float() - exact).norm() / exact.norm()) for n, y in outputs.items()},
        "warm_up": {n: warm_up[n] - wall[n] for n in runs},
        "best_float": best,
        "ratios": {n: {"vs_fp32": ratio("fp32", n), "vs_best_float": ratio(best, n)}
                   for n in runs},
        "speedup_vs_fp32": ratio("fp32", "int8"), "speedup_vs_best_float": ratio(best, "int8"),
        "speedup_static_vs_dynamic": ratio("int8", "int8 static"),
        "error": float((outputs["int8"].float() - exact).norm() / exact.norm()),
    }


def _run(torch, model, x, context, compiled=False):
    """``run(round)``: one forward in the MODEL's dtype, at a timestep of another expert a round."""
    unet = model.model.diffusion_model
    forward = torch.compile(unet, options={"guard_filter_fn": _no_options}) if compiled else unet
    dtype = model.model.get_dtype()
    x, context = x.to(dtype), context.to(dtype)

    def run(round_):
        t = torch.full((x.shape[0],), 999.0 - 250.0 * (round_ % 4))
        return forward(x, t, context=context,
                       transformer_options=model.model_options["transformer_options"])

    return run


def _no_options(guards):
    """As ComfyUI's own compile node has it."""
    return ["transformer_options" not in g.name for g in guards]


def table(result: dict) -> str:
    """The ways beside each other, as Markdown."""
    lines = []
    for size, run in result["latents"].items():
        lines += ["", f"| {size} x {size} latents | s | x fp32 | x {run['best_float']} | error | "
                  "warm-up s |", "|---|---|---|---|---|---|"]
        for name, seconds in run["seconds"].items():
            ratios = run["ratios"][name]
            lines.append(f"| {name} | {seconds:.2f} | {ratios['vs_fp32']:.2f} | "
                         f"{ratios['vs_best_float']:.2f} | {run['errors'][name]:.1%} | "
                         f"{run['warm_up'][name]:.0f} |")
        target = TARGETS["best float"].get(int(size))
        lines.append(f"\nTargets for int8: {TARGETS['fp32']} x fp32"
                     + (f", {target} x the best float" if target else ""))
    return "\n".join([*lines, "", *result["note"]])


if __name__ == "__main__":
    main()
