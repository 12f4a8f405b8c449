"""Pictures of the committed results, beside their tables: ``python dev.py bench plots``."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
BLUE, ORANGE, GREY = "#2f6fbf", "#e08a2e", "#9a9a9a"


def main(argv=None):
    """Draw every result whose JSON file is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="taken for the interface; nothing is measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    for name, draw in (("train_cost", train_cost), ("ablation", ablation),
                       ("static_int8", static_int8),
                       *((f"personalise-{bits}bit", personalise) for bits in (8, 4, 3))):
        source = options.results / f"{name}.json"
        if source.exists():
            figure = draw(json.loads(source.read_text()))
            figure.savefig(source.with_suffix(".png"), dpi=110)
            print(source.with_suffix(".png"))


def _figure(columns: int = 1):
    """A figure without a window, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.6), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def train_cost(result):
    """Memory and time of a training step, as bars."""
    figure, axes = _figure(2)
    methods = ("tuneqdm", "peqa", "lora", "dequant")
    labels = ("TuneQDM", "PEQA", "LoRA r=4", "TuneQDM,\ndequantize +\nautograd")
    for axis, key, unit, title in ((axes[0], "peak_bytes", 2**30, "peak memory, GiB"),
                                   (axes[1], "seconds", 1, "seconds a step")):
        for shift, suffix, colour, name in ((-0.2, "", BLUE, "activations recomputed"),
                                            (0.2, " (activations kept)", GREY, "kept")):
            values = [result["rows"][m + suffix][key] / unit for m in methods]
            bars = axis.bar([i + shift for i in range(4)], values, 0.38, color=colour, label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(4), labels, fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("A training step of SD1.5 at 4 bits, 512 px, batch 1", fontsize=11)
    return figure


def personalise(result):
    """Subject fidelity of each method, with its learning rate and the size of what is kept."""
    figure, axis = _figure()
    rows: dict[tuple, list] = {}
    for run in result["runs"].values():
        if run["seed"] < 90:
            rows.setdefault((run["method"], run["rate"]), []).append(run)
    labels = []
    for index, ((method, rate), runs) in enumerate(rows.items()):
        values = [r["subject_fidelity"] for r in runs]
        size = f", {runs[0]['bytes'] / 1e6:.2f} MB" if "bytes" in runs[0] else ""
        labels.append(f"{method}{f' ({rate:g})' if rate else ''}{size}")
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axis.errorbar(statistics.mean(values), index, xerr=spread, fmt="o",
                      color=BLUE if method.startswith("recommended") else ORANGE, capsize=2)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", linewidth=0.4)
    axis.set_xlabel("subject fidelity (mean and standard deviation)", fontsize=9)
    axis.set_title(f"Starter model, {result['settings']['bits']} bits, "
                   f"{result['settings']['steps']} steps", fontsize=10)
    return figure


def static_int8(result):
    """Output error and likeness of pictures of each way of quantizing."""
    figure, axes = _figure(2)
    names = sorted(result["runs"])
    for axis, key, title in ((axes[0], "error", "error of the output"),
                             (axes[1], "ssim", "SSIM with the float pictures")):
        bars = axis.barh(range(len(names)), [result["runs"][n][key] for n in names], color=[
            BLUE if "QAT" in n else ORANGE if "GPTQ" in n else GREY for n in names])
        axis.bar_label(bars, fmt="%.3f", fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[1].set_yticks([])
    axes[1].set_xlim(0.8, 1.0)
    figure.suptitle(f"Starter model, {result['settings']['images']} pictures", fontsize=11)
    return figure


def ablation(result):
    """FID of each method against the bit width."""
    figure, axis = _figure()
    runs = [r for r in result["runs"].values() if r["seed"] < 90]
    widths = sorted({r["bits"] for r in runs if r["bits"]}, reverse=True)
    for method in dict.fromkeys(r["method"] for r in runs):
        points = [[r["fid"] for r in runs if r["method"] == method and r["bits"] == b]
                  for b in widths]
        if not all(points):
            continue
        dashed = method == "untuned" or "LoRA" in method
        axis.plot(range(len(widths)), [statistics.mean(p) for p in points], marker="o",
                  markersize=3, linewidth=1.3, linestyle="--" if dashed else "-", label=method)
    plain = [r["fid"] for r in runs if r["method"] == "float"]
    axis.axhline(statistics.mean(plain), color=GREY, linestyle=":", linewidth=1, label="float")
    axis.set_yscale("log")
    axis.set_xticks(range(len(widths)), [f"{b} bits" for b in widths])
    axis.set_ylabel("FID (of digits)")
    axis.set_title("DDPM of handwritten digits, quantized and fine-tuned", fontsize=10)
    axis.legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    main()
