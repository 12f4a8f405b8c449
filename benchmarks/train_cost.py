"""What a training step of the full-size SD1.5 UNet costs: time and peak memory, side by side.

``python dev.py bench train_cost [--json FILE] [-- --steps 3 --latent 64 --dtype bfloat16]``

One packed 4-bit UNet (random weights, written once), the same latents, timesteps and loss; what
differs is what trains and how its gradient is made:

- ``tuneqdm``: r_out and s_in of all layers, 4 experts, our closed-form gradients (the product),
- ``peqa``: r_out alone, one expert, the same gradients,
- ``lora``: rank 4 on the same layers over the same integers (peft), base gradients as ours,
- ``dequant``: the same scales as tuneqdm, but each weight is dequantized, scaled and left to
  autograd, which is what the formula says when typed in.

Each runs in a process of its own, in turn for ``--rounds`` rounds, with recomputed activations
(``--checkpointing 1``, the product's default) and without. Time is the process's processor time on
one thread (``--threads``); memory is the peak resident set above the process with the host
imported and idle, the packed weights included. On CUDA: wall time after synchronisation and the
allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("tuneqdm", "peqa", "lora", "dequant")
EXPERTS, RANK = 4, 4
TARGETS = {"ratio_time_vs_lora": 1.0, "ratio_mem_vs_dequant": 0.6}


def trainable(method: str, unet, shapes):
    """``(parameters, scales_of(expert))`` of a method on the loaded UNet, patched in place."""
    from quanttune.training.scales import TrainableScales

    if method == "lora":
        from quanttune.benchmarks._lora import inject_lora

        return inject_lora(unet, shapes, RANK), None
    scales = TrainableScales(shapes, 1 if method == "peqa" else EXPERTS, method != "peqa")
    scales = scales.to(next(unet.parameters()).device)
    if method == "dequant":
        _materialise(unet)
    return list(scales.parameters()), lambda expert: scales.select([expert % scales.num_experts])


def _materialise(unet) -> None:
    """Make every quantized layer build ``r * W * s`` as a float weight that autograd follows."""
    import torch
    import torch.nn.functional as F

    from quanttune.host.layout import unwrap
    from quanttune.host.ops import scaled_layers

    def weight_of(layer, x):
        packed, active = unwrap(layer.weight), layer.active_scales
        weight = packed.dequantize(x.dtype)
        ones = [1] * (weight.dim() - 2)
        s = active.s_in[0].to(x.dtype).view(1, -1, *ones)
        rows = active.r_out[0].to(x.dtype).chunk(packed.parts)
        parts = weight.split([packed.split, weight.shape[1] - packed.split], 1) \
            if packed.split else [weight]
        return torch.cat([r.view(-1, 1, *ones) * p for r, p in zip(rows, parts)], 1) * s

    def bias_of(layer, x):
        return None if layer.bias is None else layer.bias.to(x.dtype)

    for layer in scaled_layers(unet).values():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = lambda x, m=layer: F.linear(x, weight_of(m, x), bias_of(m, x))
        else:
            layer.forward = lambda x, m=layer: F.conv2d(
                x, weight_of(m, x), bias_of(m, x), m.stride, m.padding, m.dilation, m.groups)


def measure(method: str, path: str, options) -> dict:
    """Steps of one method in this process."""
    from quanttune.benchmarks.quantized_unet import rss, start_host

    start_host()
    from comfy.cli_args import args

    args.cpu = options.device == "cpu"
    args.use_pytorch_cross_attention = True
    import torch

    from quanttune.host.build import load_model
    from quanttune.host.training import training_copy

    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    with open(path, "rb") as file:  # every method meets a warm file cache
        while file.read(1 << 24):
            pass
    idle = rss()
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")
    generator = torch.Generator().manual_seed(0)
    size = options.latent
    clean = torch.randn(options.batch, 4, size, size, generator=generator)
    context = torch.randn(options.batch, 77, 768, generator=generator)
    precision = {"bfloat16": "bf16", "float32": "fp32"}[options.dtype]
    times = []
    with training_copy(load_model(path), precision) as denoiser:
        unet, device = denoiser.base.diffusion_model, denoiser.device
        parameters, select = trainable(method, unet, denoiser.shapes)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        clean, context = clean.to(device), context.to(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for step in range(options.steps + 1):
            start = _clock(cuda)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            t = torch.full((options.batch,), 125.0 + 250 * (step % EXPERTS), device=device)
            sigma = denoiser.sigma(t)
            scales = select(step) if select else {}
            out = denoiser.denoise(denoiser.noised(clean, noise, sigma), sigma,
                                   {"c_crossattn": context}, scales, bool(options.checkpointing))
            loss = ((out - clean) / sigma.view(-1, 1, 1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step:  # the first one warms up
                times.append(_clock(cuda) - start)
    peak = torch.cuda.max_memory_allocated() if cuda else rss("VmHWM") - idle
    return {"seconds": times, "peak_bytes": peak, "loss": float(loss.detach()),
            "trainable": sum(p.numel() for p in parameters)}


def _clock(cuda: bool) -> float:
    if not cuda:
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def main(argv=None):
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".dev/bench"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--checkpointing", type=int, choices=[0, 1], help="default: both")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(*options.measure, options)))
        return
    from quanttune.benchmarks.quantized_unet import prepare, start_host

    start_host()
    path = str(prepare(options.work)["4"].resolve())
    modes = [1, 0] if options.checkpointing is None else [options.checkpointing]
    runs = {}
    for _ in range(options.rounds):
        for checkpointing in modes:
            for method in METHODS:
                name = f"{method}{'' if checkpointing else ' (activations kept)'}"
                found = _child(method, path, options, checkpointing)
                runs.setdefault(name, []).append(found)
                print(f"{name:36} {statistics.median(found['seconds']):7.2f} s "
                      f"{found['peak_bytes'] / 2**30:6.2f} GiB", flush=True)
    result = summary(runs, options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _child(method: str, path: str, options, checkpointing: int) -> dict:
    command = [sys.executable, __file__, "--measure", method, path, "--checkpointing",
               str(checkpointing)]
    for name in ("device", "threads", "steps", "batch", "latent", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def summary(runs: dict[str, list[dict]], options) -> dict:
    """Medians over the rounds and the ratios asked for."""
    rows = {name: {"seconds": statistics.median(s for r in found for s in r["seconds"]),
                   "peak_bytes": max(r["peak_bytes"] for r in found),
                   "trainable": found[0]["trainable"], "loss": found[0]["loss"]}
            for name, found in runs.items()}
    ours = rows.get("tuneqdm", next(iter(rows.values())))
    suffix = "" if "tuneqdm" in rows else " (activations kept)"
    result = {
        "ratio_time_vs_lora": ours["seconds"] / rows[f"lora{suffix}"]["seconds"],
        "ratio_mem_vs_lora": ours["peak_bytes"] / rows[f"lora{suffix}"]["peak_bytes"],
        "ratio_time_vs_dequant": ours["seconds"] / rows[f"dequant{suffix}"]["seconds"],
        "ratio_mem_vs_dequant": ours["peak_bytes"] / rows[f"dequant{suffix}"]["peak_bytes"],
        "peak_bytes": ours["peak_bytes"],
    }
    kept = " (activations kept)"
    if not suffix and f"tuneqdm{kept}" in rows:
        result["ratio_mem_vs_dequant_kept"] = (
            rows[f"tuneqdm{kept}"]["peak_bytes"] / rows[f"dequant{kept}"]["peak_bytes"])
        result["ratio_time_vs_lora_kept"] = (
            rows[f"tuneqdm{kept}"]["seconds"] / rows[f"lora{kept}"]["seconds"])
        # The product recomputes activations; the formula typed in does not.
        result["ratio_mem_vs_dequant_plain"] = (
            ours["peak_bytes"] / rows[f"dequant{kept}"]["peak_bytes"])
    facts = {k: getattr(options, k) for k in ("device", "threads", "steps", "rounds", "batch",
                                              "latent", "dtype")}
    return {**result, "rows": rows, "settings": facts}


def table(result: dict) -> str:
    """Costs and ratios as Markdown."""
    lines = ["", "| method | trainable | s a step | peak GiB |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['trainable']:,} | {row['seconds']:.2f} | "
              f"{row['peak_bytes'] / 2**30:.2f} |" for name, row in result["rows"].items()]
    lines += ["", "| ratio | measured | target |", "|---|---|---|"]
    for name, value in result.items():
        if name.startswith("ratio"):
            target = TARGETS.get(name)
            lines.append(f"| {name} | {value:.3f} | {'<= ' + str(target) if target else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
