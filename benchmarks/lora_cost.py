"""What a LoRA costs a full-size SD1.5 UNet: a forward with it on 4-bit weights, and its training.

``python dev.py bench lora_cost [--json FILE] [-- --parts infer train --rounds 5]``

1. *infer*: forwards of one packed 4-bit UNet (random weights) without LoRA, with one and with four
   of rank 16 on all layers, with one on attention alone; beside them the same LoRA as the host's
   weight function, which dequantizes, adds and multiplies a float weight in every forward (what
   ComfyUI does under partial loading), and as the host's bypass loader. The ways alternate.
   *difference* is that of the output from the weight function's, largest over largest. "INT8" is
   the same 4-bit model under *Dynamic INT8*, LoRAs put on after it, bfloat16 beside the integers.
2. *train*: steps of a LoRA of rank 16 on all layers with recomputed activations, over the 4-bit
   base and over a float one that is held in the precision of the training, each in a process of
   its own, in turn, by the node's own trainer.

Time is the process's processor time on one thread (``--threads``); memory is the peak resident set
above the process with the host imported and idle, the weights included. What is in the JSON file
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quanttune.benchmarks.diffusia import Results

RANK = 16
NONE, ONE, FOUR = "no LoRA", "1 LoRA", "4 LoRAs"
ATTENTION, FUNCTION, BYPASS = "1 LoRA, attention", "1 LoRA, weight function", "1 LoRA, bypass"
INT8 = "INT8"
DTYPES, SIZES, BASES = ("float32", "bfloat16"), (64, 32), ("4 bits", "float")
MAIN = "float32, 64 x 64"
"""ComfyUI's default precision on a processor, at SD1.5's own size."""
TARGETS = {"ratio_infer_1": 1.10, "ratio_infer_4": 1.25, "ratio_train_mem": 0.5,
           "ratio_train_time": 1.15}


def main(argv=None):
    """Measure what is missing, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".dev/bench"))
    parser.add_argument("--parts", nargs="+", choices=["infer", "train"],
                        default=["infer", "train"])
    parser.add_argument("--dtypes", nargs="+", choices=(*DTYPES, INT8), default=(*DTYPES, INT8))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of the latents")
    parser.add_argument("--ways", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of forwards")
    parser.add_argument("--batch", type=int, default=2, help="of a forward")
    parser.add_argument("--train-rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed, of a training")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        what, *rest = options.measure
        print(json.dumps((infer if what == "infer" else train)(*rest, options)))
        return
    from quanttune.benchmarks.quantized_unet import prepare, start_host

    start_host()
    path = str(prepare(options.work)["4"].resolve())
    results = Results(options.json)
    common = ("threads",)
    for part, names in (("infer", ("rounds", "batch")), ("train", ("steps",))):
        settings = {name: getattr(options, name) for name in (*common, *names)}
        results.keep_only(f"{part}_settings", settings, (part,))
    if "infer" in options.parts:
        for dtype in options.dtypes:
            for size in options.sizes:
                results.once("infer", f"{dtype}, {size} x {size}",
                             lambda d=dtype, s=size: _child(options, "infer", path, d, s))
    if "train" in options.parts:
        for number in range(options.train_rounds):
            for dtype in (d for d in options.dtypes if d != INT8):
                for base in BASES:
                    results.once("train", f"{dtype}, {base}, run {number + 1}",
                                 lambda d=dtype, b=base: _child(options, "train", path, d, b))
    results.found.update(ratios(results.found))
    results.save()
    print(tables(results.found))


def _child(options, *arguments) -> dict:
    """Run one measurement of this script in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    for name in ("threads", "rounds", "batch", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.ways:
        command += ["--ways", *options.ways]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def infer(path: str, dtype: str, size: str, options) -> dict:
    """Way to seconds of its forwards, ratio to no LoRA, and difference from the weight function."""
    from quanttune.benchmarks.quantized_unet import start_host

    start_host()
    import torch

    torch.set_num_threads(options.threads)
    kind, side = torch.bfloat16 if dtype == INT8 else getattr(torch, dtype), int(size)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(options.batch, 4, side, side, generator=generator).to(kind)
    context = torch.randn(options.batch, 77, 768, generator=generator).to(kind)
    t = torch.full((options.batch,), 500.0)
    with torch.inference_mode():
        models = integer_ways(path) if dtype == INT8 else ways(path, kind)
        if options.ways:
            models = {name: models[name] for name in options.ways}
        for patcher in models.values():
            patcher.patch_model(patcher.load_device)
        if FUNCTION in models:
            _as_weight_functions(models[FUNCTION])
        times, outputs = {name: [] for name in models}, {}
        for round_ in range(options.rounds + 1):
            for name, patcher in models.items():
                how = patcher.model_options["transformer_options"]
                start = time.process_time()
                out = patcher.model.diffusion_model(x, t, context=context, transformer_options=how)
                if round_:  # the first one warms up
                    times[name].append(time.process_time() - start)
                outputs[name] = out.float()
    exact = outputs.get(FUNCTION)
    rows = {}
    for name, seconds in times.items():
        row = rows[name] = {"seconds": statistics.median(seconds), "all": seconds}
        if NONE in times:
            row["ratio"] = statistics.median(a / b for a, b in zip(seconds, times[NONE]))
        if exact is not None and name in (NONE, ONE, BYPASS):
            row["difference"] = ((outputs[name] - exact).abs().max() / exact.abs().max()).item()
    return rows


def ways(path: str, dtype) -> dict:
    """Way to MODEL, all over the same integers."""
    import comfy.sd

    from quanttune.host.build import build_model
    from quanttune.host.routing import layer_shapes
    from quanttune.quant import load_quantized_unet

    checkpoint = load_quantized_unet(path)

    def model():
        return build_model(checkpoint, "4 bits", (dtype, None), disable_dynamic=True)

    def with_loras(count, attention=False, load=comfy.sd.load_lora_for_models):
        patcher = model()
        names = [n for n in layer_shapes(patcher.model.diffusion_model)
                 if not attention or ".attn" in n]
        for seed in range(count):
            lora = random_lora(patcher.model.diffusion_model, names, seed)
            patcher = load(patcher, None, lora, 0.8, 0.0)[0]
        return patcher

    return {NONE: model(), ONE: with_loras(1), FOUR: with_loras(4),
            ATTENTION: with_loras(1, attention=True), FUNCTION: with_loras(1),
            BYPASS: with_loras(1, load=comfy.sd.load_bypass_lora_for_models)}


def integer_ways(path: str) -> dict:
    """Way to MODEL that multiplies integers."""
    import comfy.sd

    from quanttune.host.build import load_model
    from quanttune.host.dynamic_int8 import dynamic_int8
    from quanttune.host.routing import layer_shapes

    def model(count):
        patcher = dynamic_int8(load_model(path), precision="bfloat16")[0]
        names = layer_shapes(patcher.model.diffusion_model)
        for seed in range(count):
            lora = random_lora(patcher.model.diffusion_model, names, seed)
            patcher = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0.0)[0]
        return patcher

    return {NONE: model(0), ONE: model(1), FOUR: model(4)}


def random_lora(unet, names, seed: int) -> dict:
    """A LoRA of `RANK` in the keys stock loaders read, that moves each weight by some percent."""
    import torch

    generator, state = torch.Generator().manual_seed(seed), {}
    for name in names:
        out, inputs, *kernel = unet.get_submodule(name).weight.shape
        down = torch.randn(RANK, inputs, *kernel, generator=generator)
        up = torch.randn(out, RANK, *[1] * len(kernel), generator=generator)
        key = f"diffusion_model.{name}"
        state[f"{key}.lora_down.weight"] = (down / down[0].numel() ** 0.5).half()
        state[f"{key}.lora_up.weight"] = (up * 0.05 / RANK**0.5).half()
        state[f"{key}.alpha"] = torch.tensor(float(RANK))
    return state


def _as_weight_functions(patcher) -> None:
    """Give the patches of a loaded MODEL back to the host's own weight functions."""
    from comfy.model_patcher import LowVramPatch

    from quanttune.host.ops import scaled_layers

    for name, module in scaled_layers(patcher.model).items():
        if module.low_rank is not None:
            module.low_rank = None
            module.weight_function = [LowVramPatch(f"{name}.weight", patcher.patches)]


def train(path: str, dtype: str, base: str, options) -> dict:
    """Seconds of the steps of a LoRA training over one kind of base, and its peak of memory."""
    from quanttune.benchmarks.quantized_unet import rss, start_host

    start_host()
    import torch
    from peft import inject_adapter_in_model  # noqa: F401  its libraries are no cost of a training

    from quanttune.host.lora_train import pupil
    from quanttune.training.lora_config import LoraTraining
    from quanttune.training.lora_trainer import LoraTrainer

    torch.set_num_threads(options.threads)
    idle = rss()
    Path("/proc/self/clear_refs").write_text("5")
    config = LoraTraining(
        steps=options.steps + 1, rank=RANK, targets="all layers", warmup_steps=0, save_every=0,
        precision={"bfloat16": "bf16", "float32": "fp32"}[dtype])
    with torch.inference_mode():  # as the executor does
        model = _base(path, base, getattr(torch, dtype))
    times = []
    with pupil(model, config) as learner, tempfile.TemporaryDirectory() as folder:
        trainer = LoraTrainer(learner.denoiser, learner.learns, _examples(), config, folder)
        for step in range(config.steps):
            start = time.process_time()
            record = trainer.one_step()
            if step:  # the first one warms up
                times.append(time.process_time() - start)
        count = sum(p.numel() for p in trainer.parameters)
    return {"seconds": statistics.median(times), "all": times,
            "peak_bytes": rss("VmHWM") - idle, "loss": record.loss, "trainable": count}


def _examples():
    """Two random ones of SD1.5's shape."""
    import torch

    from quanttune.training.data import TrainingSet

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return TrainingSet(
            tuple(torch.randn(4, 64, 64, generator=generator) for _ in range(2)),
            tuple({"c_crossattn": torch.randn(1, 77, 768, generator=generator)}
                  for _ in range(2)), (False, False), ("", ""), "random")


def _base(path: str, base: str, dtype):
    """The MODEL to train on; the float one is held in ``dtype``."""
    import comfy.model_patcher
    import torch

    from quanttune.benchmarks.quantized_unet import random_unet
    from quanttune.host.build import load_model

    if base != "float":
        return load_model(path)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(random_unet(dtype), cpu, cpu)


def ratios(found: dict) -> dict[str, float]:
    """The figures asked for; those of the training in float32, with ``_bfloat16`` added else."""
    result = {}
    if main_ := found.get("infer", {}).get(MAIN):
        result |= {"ratio_infer_1": main_[ONE]["ratio"], "ratio_infer_4": main_[FOUR]["ratio"]}
    for dtype in DTYPES:
        four, whole = (summary(found, dtype, base) for base in BASES)
        if four and whole:
            end = "" if dtype == DTYPES[0] else f"_{dtype}"
            result[f"ratio_train_mem{end}"] = four["peak_bytes"] / whole["peak_bytes"]
            result[f"ratio_train_time{end}"] = four["seconds"] / whole["seconds"]
    return result


def summary(found: dict, dtype: str, base: str) -> dict | None:
    """Of the runs of one training: median of the step times, largest memory; None without any."""
    runs = [run for name, run in found.get("train", {}).items()
            if name.startswith(f"{dtype}, {base}, ")]
    return {"seconds": statistics.median(s for run in runs for s in run["all"]),
            "peak_bytes": max(run["peak_bytes"] for run in runs)} if runs else None


def tables(found: dict) -> str:
    """All that was measured, as Markdown."""
    lines = []
    for setting, rows in found.get("infer", {}).items():
        lines += ["", f"| forward, {setting} | s | x no LoRA | difference |", "|---|---|---|---|"]
        for name, row in rows.items():
            ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
            difference = f"{row['difference']:.1e}" if "difference" in row else ""
            lines.append(f"| {name} | {row['seconds']:.2f} | {ratio} | {difference} |")
    trained = {(d, b): row for d in DTYPES for b in BASES if (row := summary(found, d, b))}
    if trained:
        lines += ["", "| LoRA training | s a step | peak GiB |", "|---|---|---|"]
        lines += [f"| {dtype}, base in {base} | {row['seconds']:.2f} | "
                  f"{row['peak_bytes'] / 2**30:.2f} |" for (dtype, base), row in trained.items()]
    lines += ["", "| ratio | measured | target |", "|---|---|---|"]
    for name, value in found.items():
        if name.startswith("ratio"):
            target = TARGETS.get(name)
            lines.append(f"| {name} | {value:.3f} | {'<= ' + str(target) if target else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
