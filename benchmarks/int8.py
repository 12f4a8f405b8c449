"""INT8 on a full-size SD1.5 UNet: time, error, warm-up, against every float there is.

``python dev.py bench int8 [--json FILE] [-- --threads 1 --rounds 5 --latents 64 32 --gpu]``

Random weights, batch 2, all ways alternating in one process so that a drift of the machine meets
all of them; processor time, median of the rounds' ratios. With ``--gpu`` the same on the graphics
card, in float16 in place of bfloat16, wall time between synchronizations, and the peak of its
memory with that model alone loaded. The ways:

- ``fp32``: what ComfyUI does on a processor by default, float32 and its own attention,
- ``bf16``: bfloat16, convolution weights channels last, PyTorch's attention,
- ``bf16 compiled``: the same through torch.compile (with ``--compile``: it takes minutes),
- ``int8``: *Dynamic INT8* on the float model, ``int8 convolutions`` with Linear layers in bfloat16,
- ``int8 static``: the same integers with ranges from *Calibrate INT8*, four sets of them,
- ``w4a8``: *Dynamic INT8* on the 4-bit model, ``w4a8 routed`` with four experts' scales on it.

The error is that of the output against float32, relative, at one timestep. Warm-up is the wall time
of the first forward above that of the others: weights are laid out for the processor, and the
layout is found by trying.

The file keeps what a run on the other device wrote: ``cpu`` and ``gpu`` in it are summaries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

SUMMARY = ("speedup_vs_fp32", "speedup_vs_best_float", "speedup_static_vs_dynamic", "error",
           "ratio_memory")
TARGETS = {"cpu": {"fp32": 4.0, "best float": {64: 1.25, 32: 1.6}},
           "gpu": {"fp32": 1.0, "best float": {64: 1.25}}}


def main(argv=None):
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latents", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args(argv)
    from quanttune.benchmarks.quantized_unet import start_host

    start_host(cpu=not options.gpu)
    import torch

    if options.gpu and not torch.cuda.is_available():
        parser.error("this machine has no graphics card that PyTorch can use; leave --gpu away")
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        machine = _Machine(torch, options.gpu)
        models, notes = _models(torch, machine)
        details = {"threads": options.threads, "batch": options.batch, "note": notes,
                   "device": machine.name,
                   "latents": {str(s): _measure(torch, machine, models, s, options)
                               for s in options.latents}}
    first = details["latents"][str(options.latents[0])]
    summary = {k: first[k] for k in SUMMARY if first.get(k) is not None}
    print(table(details, TARGETS[machine.kind]))
    if options.json:
        result = json.loads(options.json.read_text()) if options.json.exists() else {}
        result |= {machine.kind: summary, f"{machine.kind}_details": details}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


class _Machine:
    """Where models run, and how time and memory are read there."""

    def __init__(self, torch, gpu: bool):
        self.cuda = torch.cuda if gpu else None
        self.kind = "gpu" if gpu else "cpu"
        self.device = torch.device("cuda" if gpu else "cpu")
        self.dtype = torch.float16 if gpu else torch.bfloat16
        self.name = self.cuda.get_device_name() if gpu else "processor"

    def seconds(self) -> float:
        """Time of this process, or, when the card has done all it was told, of the clock."""
        if self.cuda is None:
            return time.process_time()
        self.cuda.synchronize()
        return time.perf_counter()

    def load(self, patcher) -> None:
        """To the card, and nothing else on it."""
        import comfy.model_management

        if self.cuda is not None:
            comfy.model_management.unload_all_models()
            comfy.model_management.load_models_gpu([patcher], force_full_load=True)

    def peak(self, run) -> int:
        """Bytes of the card that a forward takes at most, its model included."""
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats()
        run(0)
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated()


def _models(torch, machine):
    """Name to MODEL, and the note of the node."""
    import comfy.model_patcher

    from quanttune.benchmarks.quantized_unet import random_scales, random_unet
    from quanttune.host.dynamic_int8 import dynamic_int8, use_pytorch_attention
    from quanttune.host.quantize import quantize_model
    from quanttune.host.routing import apply_scale_set
    from quanttune.quant import QuantSpec

    cpu, short = torch.device("cpu"), _short(machine.dtype)
    # As on disk: quantizing and calibrating happen where the model will run.
    patcher = comfy.model_patcher.ModelPatcher
    fp32 = patcher(random_unet(torch.float32), machine.device, cpu)
    bf16 = patcher(random_unet(machine.dtype), machine.device, cpu)
    for module in bf16.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    bf16.model_options["transformer_options"]["optimized_attention_override"] = (
        use_pytorch_attention)
    kind = str(machine.dtype).removeprefix("torch.")
    int8, note = dynamic_int8(fp32, precision=kind)
    four_bits, _ = quantize_model(fp32, QuantSpec(4), dtypes=(machine.dtype, None))
    w4a8, _ = dynamic_int8(four_bits)
    return {
        "fp32": fp32, short: bf16, "int8": int8, "int8 static": _static(torch, int8),
        "int8 convolutions": dynamic_int8(fp32, "convolutions", kind)[0], "w4a8": w4a8,
        "w4a8 routed": apply_scale_set(w4a8, random_scales(w4a8), 1.0, "s")[0],
    }, note.splitlines()[-2:]


def _static(torch, int8):
    """The calibrated MODEL; the ranges come from eight steps, enough to measure time by."""
    from quanttune.host.calibrate import Calibration, calibrate

    prompt = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(3)), {}]]
    how = Calibration(samples=8, steps=8, timestep_buckets=4, dynamic_cross_attention=False)
    return calibrate(int8, {"samples": torch.zeros(1, 4, 32, 32)}, prompt, (), how)[0]


def _short(dtype) -> str:
    return {"bfloat16": "bf16", "float16": "fp16"}[str(dtype).removeprefix("torch.")]


def _measure(torch, machine, models, size, options) -> dict:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(options.batch, 4, size, size, generator=generator).to(machine.device)
    context = torch.randn(options.batch, 77, 768, generator=generator).to(machine.device)
    runs = {name: _run(torch, model, x, context) for name, model in models.items()}
    short, owner = _short(machine.dtype), {name: name for name in models}
    if options.compile:
        runs[f"{short} compiled"] = _run(torch, models[short], x, context, compiled=True)
        owner[f"{short} compiled"] = short
    outputs, warm_up, peaks = {}, {}, {}
    for name, run in runs.items():
        machine.load(models[owner[name]])
        start = time.perf_counter()
        outputs[name] = run(0).float().cpu()
        warm_up[name] = time.perf_counter() - start
        if machine.cuda is not None:
            peaks[name] = machine.peak(run)
    seconds = {name: [] for name in runs}
    wall = dict.fromkeys(runs, float("inf"))
    for round_ in range(options.rounds):
        for name, run in runs.items():
            machine.load(models[owner[name]])
            if machine.cuda is not None:
                run(round_)
            start, start_wall = machine.seconds(), time.perf_counter()
            run(round_)
            seconds[name].append(machine.seconds() - start)
            wall[name] = min(wall[name], time.perf_counter() - start_wall)
    floats = [n for n in runs if n.startswith(short)]
    best = min(floats, key=lambda n: statistics.median(seconds[n]))

    def ratio(of, to):
        return statistics.median(a / b for a, b in zip(seconds[of], seconds[to]))

    exact = outputs["fp32"]
    return {
        "peak_bytes": peaks,
        "ratio_memory": peaks["int8"] / peaks[short] if peaks else None,
        "seconds": {n: statistics.median(s) for n, s in seconds.items()}, "all": seconds,
        "errors": {n: float((y - exact).norm() / exact.norm()) for n, y in outputs.items()},
        "warm_up": {n: warm_up[n] - wall[n] for n in runs},
        "best_float": best,
        "ratios": {n: {"vs_fp32": ratio("fp32", n), "vs_best_float": ratio(best, n)}
                   for n in runs},
        "speedup_vs_fp32": ratio("fp32", "int8"), "speedup_vs_best_float": ratio(best, "int8"),
        "speedup_static_vs_dynamic": ratio("int8", "int8 static"),
        "error": float((outputs["int8"] - exact).norm() / exact.norm()),
    }


def _run(torch, model, x, context, compiled=False):
    """``run(round)``: one forward in the MODEL's dtype, at a timestep of another expert a round."""
    unet = model.model.diffusion_model
    forward = torch.compile(unet, options={"guard_filter_fn": _no_options}) if compiled else unet
    dtype = model.model.get_dtype()
    x, context = x.to(dtype), context.to(dtype)

    def run(round_):
        t = torch.full((x.shape[0],), 999.0 - 250.0 * (round_ % 4), device=x.device)
        return forward(x, t, context=context,
                       transformer_options=model.model_options["transformer_options"])

    return run


def _no_options(guards):
    """As ComfyUI's own compile node has it."""
    return ["transformer_options" not in g.name for g in guards]


def table(result: dict, targets: dict) -> str:
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
        target = targets["best float"].get(int(size))
        lines.append(f"\nTargets for int8: {targets['fp32']} x fp32"
                     + (f", {target} x the best float" if target else ""))
    return "\n".join([*lines, "", *result["note"]])


if __name__ == "__main__":
    main()
