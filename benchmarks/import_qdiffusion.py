"""Reading a full-size Q-Diffusion checkpoint of SD1.5 (6.4 GiB): seconds and peak memory.

``python dev.py bench import_qdiffusion [--json FILE] [-- --bits 4 8 --work FOLDER]``

Random weights in the authors' format, written once to a work folder (it needs 7 GB of disk and,
while it is written, of memory). Each way of reading runs in a process of its own: wall time, and
peak resident memory above that process idle, with the host imported, after the same way has read
the starter's small file (the code that it runs is resident memory as well). The largest set of
tensors that belongs together is the weight, the alpha, the step and the zero point of one layer; a
MODEL needs its packed integers, too. The opponent is `torch.load` of the same file alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quanttune.benchmarks.quantized_unet import SD15, rss, start_host

MIB = 2**20
WAYS = {
    "open": "load_qdiffusion: bits and checks",
    "convert": "python -m quanttune convert",
    "model": "Load Quantized UNet, integers in memory",
    "torch": "torch.load of the file alone",
}
SMALL = "starter.pth"
"""A small file of the same format, in the work folder."""
TARGET = 1.3
"""Peak over the largest set of tensors that is needed at once."""


def write_file(path: Path, bits: int) -> None:
    """A checkpoint of random weights with min-max steps; every seventh channel lies above 0."""
    import comfy.supported_models
    import torch

    from quanttune.quant import shortcut_splits

    config = comfy.supported_models.SD15(dict(SD15))
    skeleton = config.get_model({}, "", device="meta").diffusion_model
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    splits = shortcut_splits({n.removesuffix(".weight"): s for n, s in shapes.items()})
    draw = torch.Generator().manual_seed(bits)
    state = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=draw)
        state[f"model.{name}"] = weight
        layer = name.removesuffix(".weight")
        if len(shape) < 2:
            continue
        weight.flatten(1).div_(weight[0].numel() ** 0.5)
        weight[::7] += 6 / weight[0].numel() ** 0.5
        border = splits.get(layer)
        for part, suffix in ((weight[:, :border], ""), (weight[:, border:], "_0")):
            if suffix and border is None:
                continue
            low, high = torch.aminmax(part.flatten(1), dim=1)
            delta = ((high - low) / (2**bits - 1)).view(-1, *[1] * (len(shape) - 1))
            key = f"model.{layer}.weight_quantizer{suffix}"
            state[f"{key}.delta"] = delta
            state[f"{key}.zero_point"] = (-low.view(delta.shape) / delta).round()
            state[f"{key}.alpha"] = torch.randn(part.shape, generator=draw)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def read(way: str, path: str, out: str) -> dict:
    """A file by one of `WAYS`; what is known of it then."""
    import torch

    from quanttune.host.build import load_model, quantized_model
    from quanttune.host.convert_command import convert_qdiffusion
    from quanttune.quant import load_qdiffusion

    if way == "open":
        state = load_qdiffusion(path)
        largest = max(layer.numel * 8 + 16 * layer.shape[0] for layer in state.layers.values())
        return {"bits": state.bits, "layers": len(state.layers), "largest_layer": largest,
                "split": sum(layer.split is not None for layer in state.layers.values())}
    if way == "convert":
        print(convert_qdiffusion(path, argparse.Namespace(out=out, bits=None, overwrite=True)),
              file=sys.stderr)
        return {"file": os.path.getsize(out)}
    if way == "model":
        return {"integers": quantized_model(load_model(path)).checkpoint.nbytes}
    torch.load(path, weights_only=True)
    return {}


def measure(way: str, path: str, out: str) -> dict:
    """One of `WAYS` in this process."""
    start_host()
    import torch

    facts = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        read(way, str(Path(path).with_name(SMALL)), os.path.join(folder, "small.safetensors"))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that what it took is not there to be taken again
    with open(path, "rb") as file:  # each way meets as warm a file cache as the memory allows
        while file.read(1 << 24):
            pass
    idle = rss()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    with torch.inference_mode():
        facts |= read(way, path, out)
    facts["seconds"] = time.perf_counter() - start
    facts["peak_rss_above_idle"] = rss("VmHWM") - idle
    return facts


def run(bits: int, work: Path, ways) -> dict:
    """All ways of one bit width, each in a process of its own."""
    path = work / f"sd_w{bits}a8_ckpt.pth"
    if not path.exists():
        command = [sys.executable, __file__, "--write", str(bits), "--work", str(work)]
        subprocess.run(command, check=True)
    subprocess.run([sys.executable, "-m", "quanttune.starter.qdiffusion_file", str(work / SMALL),
                    "--bits", str(bits)], check=True)
    result = {"source": path.stat().st_size}
    for way in ways:
        command = [sys.executable, __file__, "--measure", way, str(path),
                   str(work / f"sd-{bits}bit.safetensors")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[way] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict) -> str:
    """Markdown."""
    lines = ["| bits | way | seconds | peak MiB | needed at once MiB | ratio |",
             "|---|---|---|---|---|---|"]
    for bits, result in results.items():
        largest = result["open"]["largest_layer"]
        for way, told in WAYS.items():
            if way not in result:
                continue
            own = result[way]
            needed = {"model": largest + own.get("integers", 0), "torch": result["source"]}.get(
                way, largest)
            ratio = own["peak_rss_above_idle"] / needed
            target = "" if way == "torch" else f" (<= {TARGET})"
            lines.append(f"| {bits} | {told} | {own['seconds']:.1f} | "
                         f"{own['peak_rss_above_idle'] / MIB:.0f} | {needed / MIB:.0f} | "
                         f"{ratio:.2f}{target} |")
    return "\n".join(lines)


def main(argv=None):
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".dev/bench"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=(2, 3, 4, 8))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    if options.write:
        start_host()
        write_file(options.work / f"sd_w{options.write}a8_ckpt.pth", options.write)
        return
    results = {str(bits): run(bits, options.work, options.ways) for bits in options.bits}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
