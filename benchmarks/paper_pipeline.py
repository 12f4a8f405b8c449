"""What the pipeline LoRA -> dynamic INT8 -> Stable Diffusion x4 upscale costs (Singh & Kumar).

``python dev.py bench paper_pipeline [--json FILE] [-- --parts generate upscale --threads 2]``

Full-size SD1.5 and x4 upscaler with random weights: what a step costs does not depend on them.

1. *generate*: pictures of 256 x 256 (latents of 32 x 32) by 50, 25 and 10 steps with guidance of
   20, as the paper has them, from the float model, the float one with a LoRA of rank 16 on all
   layers by the stock loader, the same in bfloat16 (the obvious alternative to integers), and the
   same LoRA under *Dynamic INT8*. Text encoder and VAE, which are equal for all, do not count.
2. *upscale*: the node's own tiles against the whole picture at once, one step without guidance in
   float32 (as ComfyUI does on a processor; ``--dtype``), with the decoding. A way that ended for
   want of memory says so. ``--tiles 4`` computes only the first 4 tiles of the sampling and of the
   decoding, to learn the peak of a large picture in minutes: each tile takes what the first took,
   which the peaks after each tile in the JSON file show. Such a row has no time.

Each row runs in a process of its own. Time is the process's processor time; memory is the peak
resident set above the process with the host imported and idle, the model's weights included. What
is in the JSON file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from quanttune.benchmarks.diffusia import Results

STEPS = (50, 25, 10)
GUIDANCE = 20.0
FLOAT, TUNED, TUNED_BF16, INT8 = ("float", "fine-tuned float", "fine-tuned bfloat16",
                                  "fine-tuned INT8")
ROWS = (FLOAT, TUNED, TUNED_BF16, INT8)
SIDES = (256, 512, 1024)
TILED, WHOLE, TILED_8 = "tiled", "whole picture at once", "tiled, 8-bit UNet"
WAYS = (TILED, WHOLE, TILED_8)
TARGETS = {"upscale_mem_ratio_1024_vs_256": 1.1, "upscale_time_ratio_tiled": 1.25,
           "upscale_resident_ratio_8bit": 0.6}
X4_UNET = {
    "image_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "model_channels": 256,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 1024,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "disable_self_attentions": [True, True, True, False],
    "num_classes": 1000,
    "num_heads": 8,
    "num_head_channels": -1,
}
"""The published upscaler's UNet (473 M parameters) as the host describes it."""
X4_VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
          "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [],
          "dropout": 0.0}


def main(argv=None):
    """Measure what is missing, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=["generate", "upscale"],
                        default=["generate", "upscale"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="of generate")
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES,
                        help="of the pictures to upscale")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of upscale")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the upscaler")
    parser.add_argument("--tiles", type=int, default=0,
                        help="of the way 'tiled', only so many, for the memory alone")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        what, *rest = options.measure
        print(json.dumps((generate if what == "generate" else upscale)(options.threads, *rest)))
        return
    results = Results(options.json)
    for part in options.parts:
        settings = {"threads": options.threads}
        if part == "upscale":
            settings["dtype"] = options.dtype
        results.keep_only(f"{part}_settings", settings, (part,))
    if "generate" in options.parts:
        for row in options.rows:
            results.once("generate", row, lambda r=row: _child(options, "generate", r))
    if "upscale" in options.parts:
        for side in options.sides:
            for way in options.ways:
                if way == WHOLE and options.tiles or way == TILED_8 and side != min(SIDES):
                    continue
                results.once("upscale", _row(way, side, options.tiles),
                             lambda w=way, s=side: _child(options, "upscale", w, s, options.dtype,
                                                          options.tiles))
    results.found.update(ratios(results.found))
    results.save()
    print(tables(results.found))


def _row(way: str, side: int, tiles: int = 0) -> str:
    return f"{way}, {side}" + (f", first {tiles} tiles" if tiles else "")


def _child(options, *arguments) -> dict:
    """Run one measurement of this script in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(options.threads), "--measure",
               *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:  # the system ends whoever takes too much memory
        return {"failed": f"ended by signal {-done.returncode}"}
    done.check_returncode()
    return json.loads(done.stdout.strip().splitlines()[-1])


def generate(threads: int, row: str) -> dict:
    """Seconds of each number of steps, and peak MiB, of one of `ROWS`."""
    from quanttune.benchmarks._sd15 import memory_above_idle
    from quanttune.benchmarks.quantized_unet import start_host

    start_host()
    import comfy.sample
    import torch

    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(3)
    prompt = [[torch.randn(1, 77, 768, generator=draw), {}]]
    latent = torch.zeros(1, 4, 32, 32)
    seconds = {}

    def sample(patcher, steps: int) -> float:
        start = time.process_time()
        noise = comfy.sample.prepare_noise(latent, 0)
        comfy.sample.sample(patcher, noise, steps, GUIDANCE, "ddim", "normal", prompt, prompt,
                            latent, disable_pbar=True, seed=0)
        return time.process_time() - start

    def run(patcher) -> None:
        sample(patcher, 1)
        for steps in STEPS:
            seconds[str(steps)] = sample(patcher, steps)

    with torch.inference_mode():
        memory = memory_above_idle(lambda: _generator(row), run)
    return {"seconds": seconds, **memory}


def _generator(row: str):
    """The MODEL of a row of *generate*."""
    import comfy.model_patcher
    import comfy.sd
    import torch

    from quanttune.benchmarks.lora_cost import random_lora
    from quanttune.benchmarks.quantized_unet import random_unet
    from quanttune.host.dynamic_int8 import dynamic_int8, fast_float
    from quanttune.host.routing import layer_shapes

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(random_unet(torch.float32), cpu, cpu)
    if row == FLOAT:
        return patcher
    unet = patcher.model.diffusion_model
    lora = random_lora(unet, layer_shapes(unet), 0)
    patcher = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0.0)[0]
    if row == TUNED_BF16:
        return fast_float(patcher, "bfloat16")
    return patcher if row == TUNED else dynamic_int8(patcher, precision="bfloat16")[0]


def upscale(threads: int, way: str, side: str, dtype: str, tiles: str) -> dict:
    """Seconds and peak MiB of one step and the decoding of a picture of ``side`` pixels; of only
    so many tiles, unless 0, the peaks after each and no seconds."""
    from quanttune.benchmarks._sd15 import memory_above_idle
    from quanttune.benchmarks.quantized_unet import rss, start_host

    start_host()
    import torch

    from quanttune.host import upscale as module

    torch.set_num_threads(threads)
    if int(tiles):
        _only_first(int(tiles))
    side = int(side)
    draw = torch.Generator().manual_seed(3)
    prompt = [[torch.randn(1, 77, 1024, generator=draw), {}]]
    image = torch.rand(1, side, side, 3, generator=draw)
    seconds, peaks = [], []
    size = {} if way != WHOLE else {"tile_size": side, "tile_vae": False}

    def run(made) -> None:
        model, vae = made
        start = time.process_time()
        out = module.upscale(model, vae, image, prompt, prompt, noise_level=20, steps=1, cfg=1.0,
                             seed=0, progress=lambda *_: peaks.append(rss("VmHWM")), **size)
        seconds.append(time.process_time() - start)
        assert tuple(out.shape) == (1, side * 4, side * 4, 3), out.shape

    with torch.inference_mode():
        memory = memory_above_idle(lambda: _upscaler(way, getattr(torch, dtype)), run)
    if int(tiles):
        return {**memory, "below_peak_mib_after_each_tile":
                [round((max(peaks) - p) / 2**20, 1) for p in peaks]}
    return {"seconds": seconds[0], **memory}


def _only_first(count: int) -> None:
    """Let every tiling, and the measuring of norms before decoding, end after so many tiles."""
    from itertools import islice

    from quanttune.host import tiled_decode, tiles

    tiles_of, batches = tiles.Tiling.__iter__, tiled_decode._batches
    tiles.Tiling.__iter__ = lambda self: islice(tiles_of(self), count)
    tiled_decode._batches = lambda *arguments: islice(batches(*arguments), count)


def _upscaler(way: str, dtype):
    """(MODEL, VAE) of the full-size upscaler, PyTorch's attention in all ways."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from quanttune.host.dynamic_int8 import hasten_attention
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec

    cpu = torch.device("cpu")
    config = comfy.supported_models.SD_X4Upscaler(dict(X4_UNET))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    _randomize(model.diffusion_model)
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    if way == TILED_8:
        patcher = quantize_model(patcher, QuantSpec(8), name="x4")[0]
    hasten_attention(patcher.model_options["transformer_options"], cpu)
    parts = {"ddconfig": X4_VAE, "embed_dim": 4}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**parts).state_dict(), config={"params": parts},
                       dtype=dtype)
    vae.downscale_ratio = vae.upscale_ratio = 4
    _randomize(vae.first_stage_model)
    return patcher, vae


def _randomize(module) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator).div_(fan_in**0.5))


def ratios(found: dict) -> dict:
    """The figures asked for; those of time by number of steps."""
    result, rows, ways = {}, found.get("generate", {}), found.get("upscale", {})
    if INT8 in rows and TUNED in rows:
        result["mem_ratio_int8"] = rows[INT8]["peak_mib"] / rows[TUNED]["peak_mib"]
        result["time_ratio_int8"] = {
            n: rows[INT8]["seconds"][n] / rows[TUNED]["seconds"][n] for n in rows[INT8]["seconds"]}
    if pair := _compared(ways):
        small, large = pair
        result["upscale_mem_ratio_1024_vs_256"] = large["peak_mib"] / small["peak_mib"]
    for side in SIDES:
        tiled, whole = (ways.get(f"{way}, {side}", {}) for way in (TILED, WHOLE))
        if "seconds" in tiled and "seconds" in whole:
            end = "" if side == SIDES[0] else f"_{side}"
            result[f"upscale_time_ratio_tiled{end}"] = tiled["seconds"] / whole["seconds"]
            result[f"upscale_mem_ratio_tiled{end}"] = tiled["peak_mib"] / whole["peak_mib"]
    small, eight = (ways.get(_row(way, SIDES[0]), {}) for way in (TILED, TILED_8))
    if "built_mib" in eight and "built_mib" in small:
        result["upscale_resident_ratio_8bit"] = eight["built_mib"] / small["built_mib"]
    return result


def _compared(ways: dict) -> tuple[dict, dict] | None:
    """The tiled rows of the smallest and the largest picture: of all tiles, or else both of as
    many of the first; None without such a pair."""
    names = [_row(TILED, side) for side in (SIDES[0], SIDES[-1])]
    ends = [k.removeprefix(names[0]) for k in ways if k.startswith(names[0])]
    for end in sorted(ends, key=len):
        pair = tuple(ways.get(name + end, {}) for name in names)
        if all("peak_mib" in row for row in pair):
            return pair
    return None


def tables(found: dict) -> str:
    """All that was measured, as Markdown."""
    lines = []
    if rows := found.get("generate"):
        head = " | ".join(f"{n} steps, s" for n in STEPS)
        lines += [f"| model, 256 x 256 | {head} | peak, MiB |", "|---|" + "---|" * (len(STEPS) + 1)]
        for name, row in rows.items():
            cells = " | ".join(f"{row['seconds'][str(n)]:.1f}" for n in STEPS)
            lines.append(f"| {name} | {cells} | {row['peak_mib']:.0f} |")
    if ways := found.get("upscale"):
        lines += ["", "| upscaling to four times the side | s a step, with decoding | weights, MiB "
                      "| peak, MiB |", "|---|---|---|---|"]
        for name, row in ways.items():
            time = f"{row['seconds']:.0f}" if "seconds" in row else ""
            cells = (f"{row['failed']} | | " if "failed" in row else
                     f"{time} | {row['built_mib']:.0f} | {row['peak_mib']:.0f}")
            lines.append(f"| {name} | {cells} |")
    lines += ["", "| ratio | measured | target |", "|---|---|---|"]
    for name, value in ratios(found).items():
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        told = (", ".join(f"{n} steps {v:.3f}" for n, v in value.items())
                if isinstance(value, dict) else f"{value:.3f}")
        lines.append(f"| {name} | {told} | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
