"""Loading, resident size, routing and weight-only forward of a full-size SD1.5 UNet.

``python dev.py bench quantized_unet [--json FILE] [-- --threads 1 --rounds 5 --batch 2]``

Random weights, written once to a work folder; every figure is a ratio to the obvious alternative
(the stock loader on the fp16 file, the float forward in the same dtype, the same quantized model
without scales) measured in the same run. Each load is measured in a process of its own: wall time,
and peak resident memory above that process with the host imported and idle. Since our files are
mapped, the integers are also read through once before the peak is taken. Forwards alternate so
that a drift of the machine meets all of them; processor time of the process is taken, the median
of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "use_checkpoint": False,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
EXPERTS = 4
TARGETS = {
    "load_memory": 1.35,
    "load_time": 0.6,
    "resident_4": 0.27,
    "resident_8": 0.52,
    "routing": 1.03,
    "forward_8": 1.15,
    "forward_4": 1.15,
}


def start_host(cpu: bool = True):
    """Import ComfyUI, for the processor or the graphics card, with its command line off."""
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = cpu
    import comfy.sd


def rss(field="VmRSS") -> int:
    """Resident bytes of this process now, or its peak (``VmHWM``)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def random_unet(dtype):
    """The full-size UNet with random weights in ``dtype``, as the host builds it."""
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(dict(SD15))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            values = torch.randn(parameter.shape, generator=generator).div_(fan_in**0.5)
            parameter.copy_(values)
    return model


def prepare(work: Path) -> dict[str, Path]:
    """Write the fp16 file and the 8- and 4-bit files once; returns their paths."""
    import comfy.model_patcher
    import torch
    from safetensors.torch import save_file

    from quanttune.host.build import quantized_model
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec, save_quantized_unet

    paths = {name: work / f"sd15-{name}.safetensors" for name in ("fp16", "8", "4")}
    if all(p.exists() for p in paths.values()):
        return paths
    work.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        model = random_unet(torch.float16)
        state = {
            f"model.diffusion_model.{k}": v for k, v in model.diffusion_model.state_dict().items()
        }
        save_file(state, paths["fp16"])
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.CoreModelPatcher(model, cpu, cpu)
        for bits in (8, 4):
            quantized, report = quantize_model(patcher, QuantSpec(bits), name="sd15-random")
            print(report)
            checkpoint = quantized_model(quantized).checkpoint
            save_quantized_unet(
                paths[str(bits)], checkpoint.layers, checkpoint.floats, checkpoint.metadata
            )
    return paths


def measure_load(kind: str, path: str) -> dict:
    """Load ``path`` in this process: seconds, and peak resident bytes above the idle host."""
    start_host()
    import comfy.sd
    import torch

    from quanttune.host.build import load_model, quantized_model

    with open(path, "rb") as file:  # both loaders meet a warm file cache
        while file.read(1 << 24):
            pass
    idle = rss()
    Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        start = time.perf_counter()
        patcher = comfy.sd.load_diffusion_model(path) if kind == "fp16" else load_model(path)
        seconds = time.perf_counter() - start
        if kind != "fp16":
            for weight in quantized_model(patcher).checkpoint.layers.values():
                weight.packed.sum()
        with_reading = time.perf_counter() - start
    return {
        "seconds": seconds,
        "seconds_with_reading": with_reading,
        "peak_rss_above_idle": rss("VmHWM") - idle,
        "file": os.path.getsize(path),
    }


def random_scales(patcher):
    """Four experts near 1 for every layer."""
    import torch

    from quanttune.host.routing import layer_shapes
    from quanttune.quant import LayerScales, ScaleSet

    generator = torch.Generator().manual_seed(1)

    def near_one(n):
        return 1 + 0.01 * torch.randn(EXPERTS, n, generator=generator)

    return ScaleSet(
        {
            name: LayerScales(near_one(out), near_one(inp))
            for name, (out, inp) in layer_shapes(patcher.model.diffusion_model).items()
        },
        EXPERTS,
    )


def measure_forward(
    paths: dict, dtype: str, batch: int, rounds: int, size: int, threads: int
) -> dict:
    """Alternating forwards of float, 8-bit, 4-bit and routed 4-bit models in one dtype."""
    start_host()
    import comfy.sd
    import torch

    from quanttune.host.build import build_model
    from quanttune.host.routing import apply_scale_set
    from quanttune.quant import load_quantized_unet

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, size, size, generator=generator).to(kind)
    context = torch.randn(batch, 77, 768, generator=generator).to(kind)
    with torch.inference_mode():
        models = {
            "float": comfy.sd.load_diffusion_model(paths["fp16"], model_options={"dtype": kind})
        }
        for bits in ("8", "4"):
            models[bits] = build_model(load_quantized_unet(paths[bits]), bits, dtypes=(kind, None))
        models["4 routed"] = apply_scale_set(models["4"], random_scales(models["4"]), 1.0, "s")[0]
        times, outputs = {name: [] for name in models}, {}
        for round_ in range(rounds + 1):
            for name, patcher in models.items():
                # A timestep of another expert in every round: the switch is part of the cost.
                t = torch.full((batch,), 999.0 - 250.0 * (round_ % EXPERTS))
                options = patcher.model_options["transformer_options"]
                start = time.process_time()
                outputs[name] = patcher.model.diffusion_model(
                    x, t, context=context, transformer_options=options
                )
                if round_:
                    times[name].append(time.process_time() - start)
        sizes = {name: models[name].model_size() for name in ("8", "4")}
        error = {
            b: (
                (outputs[b] - outputs["float"]).float().norm() / outputs["float"].float().norm()
            ).item()
            for b in ("8", "4")
        }
    return {
        "seconds": {n: statistics.median(t) for n, t in times.items()},
        "all": times,
        "model_size": sizes,
        "error": error,
        "ratio": {
            n: statistics.median(a / b for a, b in zip(times[n], times["float"]))
            for n in ("8", "4")
        },
        "routing": statistics.median(a / b for a, b in zip(times["4 routed"], times["4"])),
    }


def _child(*arguments) -> dict:
    """Run one measurement of this script in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, "--measure", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.strip().splitlines()[-1])


def main(argv=None):
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".dev/bench"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        what, *rest = options.measure
        if what == "load":
            print(json.dumps(measure_load(*rest)))
        else:
            paths = json.loads(rest[0])
            print(json.dumps(measure_forward(paths, rest[1], *map(int, rest[2:]))))
        return
    start_host()
    paths = {name: str(path.resolve()) for name, path in prepare(options.work).items()}
    loads = {kind: _child("load", kind, path) for kind, path in paths.items()}
    result = {
        "load": loads,
        "forward": {},
        "threads": options.threads,
        "batch": options.batch,
        "latent": options.latent,
    }
    for dtype in options.dtypes.split(","):
        result["forward"][dtype] = _child(
            "forward",
            json.dumps(paths),
            dtype,
            options.batch,
            options.rounds,
            options.latent,
            options.threads,
        )
    # The stock loader keeps the file's fp16 on a GPU; its size there is that of the weights.
    fp16 = loads["fp16"]["file"]
    first = next(iter(result["forward"].values()))
    result["ratios"] = {
        "load_memory": loads["4"]["peak_rss_above_idle"] / loads["4"]["file"],
        "load_time": loads["4"]["seconds"] / loads["fp16"]["seconds"],
        "load_time_with_reading": loads["4"]["seconds_with_reading"] / loads["fp16"]["seconds"],
        "resident_4": first["model_size"]["4"] / fp16,
        "resident_8": first["model_size"]["8"] / fp16,
        **{
            f"{name}_{dtype}": value
            for dtype, run in result["forward"].items()
            for name, value in (
                ("routing", run["routing"]),
                ("forward_8", run["ratio"]["8"]),
                ("forward_4", run["ratio"]["4"]),
            )
        },
    }
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def table(result: dict) -> str:
    """The ratios beside their targets, as Markdown."""
    lines = ["| ratio | measured | target |", "|---|---|---|"]
    for name, value in result["ratios"].items():
        base = name.removesuffix("_float32").removesuffix("_bfloat16")
        target = TARGETS.get(base)
        lines.append(f"| {name} | {value:.3f} | {'<= ' + str(target) if target else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
