"""Diffusia's tables in this code: quality, cost, layer sensitivity and trade-offs.

``python dev.py bench diffusia [--json FILE] [-- --parts quality cost sensitivity plans]``

1. *quality*: the starter model in float32, bfloat16 and mixed precision, judged by
   `_starter_quality.StarterQuality`; INT8 by PTQ and QAT are rows of `static_int8`, whose file is
   read (``--static``);
2. *cost*: the same on a full-size SD1.5 UNet with random weights, steps of the sampler with
   guidance at 64 x 64 latents, by *Benchmark Model*; *memory*: the peak of the resident set in two
   such steps, each model in a process of its own, above that process with the host imported and
   idle, weights included, what quantizing took not;
3. *sensitivity*: of the starter's kinds of layers, by *Layer Sensitivity*;
4. *plans*: searched mixed precision against uniform bits of the same size, on the starter.

What is in the JSON file already is not measured again. In place of LPIPS, whose weights are not at
hand for a model of 128-pixel pictures of shapes, stands the distance of features of a classifier
that was trained on such pictures; FID is of those features, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from quanttune.benchmarks import static_int8
from quanttune.benchmarks._sd15 import BF16, DYNAMIC, FP32, MIXED, ROWS, FullSize, memory_of
from quanttune.benchmarks._starter_quality import SAMPLING, StarterQuality

PARTS = ("quality", "sensitivity", "plans", "cost", "memory")
BUDGETS = (8.2, 6.0, 4.2, 3.2)
"""Bits a weight of the searched plans, scales included: 8.2, 4.2 and 3.2 are the sizes of uniform
8, 4 and 3 bits of a model as small as the starter."""
STATIC = {DYNAMIC: static_int8.DYNAMIC, "INT8, PTQ": static_int8.PTQ,
          "INT8, QAT": static_int8.QAT, "4-bit weights, PTQ": static_int8.GPTQ,
          "4-bit weights, QAT": static_int8.GPTQ_QAT}
"""Rows of the quality table to rows of `static_int8`."""


def main(argv=None):
    """Measure what is missing, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--static", type=Path,
                        default=Path(__file__).parent / "results" / "static_int8.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--runs", type=int, default=10, help="timed steps of the cost")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    from quanttune.benchmarks.quantized_unet import start_host

    start_host(cpu=True)
    import folder_paths
    import torch

    torch.set_num_threads(options.threads)
    if options.memory_of:
        with torch.inference_mode():
            print(json.dumps(memory_of(options.memory_of)))
        return
    results = Results(options.json)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        if set(options.parts) & set(PARTS[:3]):
            starter = Starter(options.images, results)
            results.keep_only("settings", starter.judge.settings,
                              ("quality", "plans", "sensitivity"))
            for part in PARTS[:3]:
                if part in options.parts:
                    getattr(starter, part)()
        if "cost" in options.parts:
            how = {"runs": options.runs, "threads": options.threads}
            results.keep_only("cost_settings", how, ("cost",))
            results.once("cost", "table", lambda: cost(options.runs))
    if "memory" in options.parts:
        results.keep_only("memory_settings", {"threads": options.threads}, ("memory",))
        for row in ROWS:
            results.once("memory", row, lambda row=row: memory(row, options.threads))
    print(tables(results.found, integers(options.static, results.found.get("settings"))))


class Results:
    """What was measured, by part and name, on disk after each."""

    def __init__(self, path: Path | None):
        self.path = path
        self.found = json.loads(path.read_text()) if path and path.exists() else {}

    def keep_only(self, key: str, settings: dict, parts) -> None:
        """Forget ``parts`` that were measured with other settings."""
        if self.found.get(key) != settings:
            for part in parts:
                self.found.pop(part, None)
            self.found[key] = settings

    def once(self, part: str, name: str, measure):
        """What is known under that name, or ``measure()``."""
        own = self.found.setdefault(part, {})
        if name not in own:
            own[name] = measure()
            print(f"{part}: {name}: {str(own[name])[:200]}", flush=True)
            self.save()
        return own[name]

    def save(self) -> None:
        """To disk, where there is a path."""
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


class Starter:
    """The parts that are measured on the starter model.

    Args:
        images: pictures to judge by.
        results: where they go.
    """

    def __init__(self, images: int, results: Results):
        self.judge, self.results = StarterQuality(images), results
        self.model, self.latent = self.judge.model, self.judge.latent
        self.conditioning = self.judge.conditioning

    def quality(self) -> None:
        """Table I. Everything beside integers is float32, except where bfloat16 is said."""
        from quanttune.host.dynamic_int8 import dynamic_int8

        ways = {
            FP32: lambda: self.model, BF16: self._bfloat16,
            MIXED: lambda: dynamic_int8(self.model, "convolutions", "bfloat16")[0],
        }
        for name, make in ways.items():
            self.results.once("quality", name, lambda make=make: self.judge.measure(make()))

    def sensitivity(self) -> None:
        """Table III: error of the output when a kind of layer alone is quantized."""
        found = self._sensitivity("group")
        self.results.once("sensitivity", "groups", lambda: {
            group: dict(zip(found.precisions, (e**0.5 for e in row)))
            for group, row in found.by_group().items()})

    def plans(self) -> None:
        """Table IV: uniform bits and searched plans, weights alone and with INT8 products."""
        from quanttune.host.dynamic_int8 import dynamic_int8
        from quanttune.quant import QuantSpec

        for bits in (8, 4, 3):
            self._plan(f"{bits} bits", lambda b=bits: self._quantized(QuantSpec(b, range="mse")))
        for budget in BUDGETS:
            self._plan(f"searched, {budget:g} bits", lambda b=budget: self._searched(b))
        self._plan("8 bits, INT8 products", lambda: dynamic_int8(
            self._quantized(QuantSpec(8, range="mse")), precision="float32")[0])
        self._plan("searched, 8.2 bits, INT8 products",
                   lambda: dynamic_int8(self._searched(8.2), precision="float32")[0])

    def _plan(self, name: str, make) -> None:
        def measure():
            model = make()
            return {"bits": self._bits(model), **self.judge.measure(model)}

        self.results.once("plans", name, measure)

    def _bits(self, model) -> float:
        """Bits a weight of the layers that can be quantized, scales included."""
        from quanttune.host.build import quantized_model
        from quanttune.host.quantize import quantizable_layers
        from quanttune.quant.plan import FLOAT_BYTES

        own = quantized_model(model).checkpoint.layers
        counts = {n: m.weight.numel() for n, m in quantizable_layers(self.model.model).items()}
        taken = sum(w.nbytes for w in own.values()) + sum(
            count * FLOAT_BYTES for name, count in counts.items() if name not in own)
        return 8 * taken / sum(counts.values())

    def _quantized(self, spec, plan=None):
        from quanttune.host.quantize import quantize_model

        return quantize_model(self.model, spec, plan=plan)[0]

    def _searched(self, budget: float):
        from quanttune.host.plan import SEARCHED, bit_plan
        from quanttune.quant import QuantSpec

        plan, _ = bit_plan(self.model, SEARCHED, self._sensitivity("layer"), budget)
        return self._quantized(QuantSpec(4, range="mse"), plan)

    def _sensitivity(self, unit: str):
        from quanttune.host.sensitivity import SensitivitySettings, layer_sensitivity
        from quanttune.metrics.sensitivity import Sensitivity

        weights = ("8", "4", "3", "2")
        how = SensitivitySettings(precisions=weights if unit == "layer" else (*weights, "int8"),
                                  unit=unit, forwards=16, **SAMPLING)
        text = self.results.once("sensitivity", f"by {unit}", lambda: layer_sensitivity(
            self.model, self.latent, *self.conditioning, how).to_json())
        return Sensitivity.from_json(text)

    def _bfloat16(self):
        import torch

        model = self.model.clone(disable_dynamic=True)
        model.set_model_compute_dtype(torch.bfloat16)
        return model


def cost(runs: int) -> dict:
    """Table II: name to time and size of a step of SD1.5 with guidance."""
    import torch

    from quanttune.host.benchmark import benchmark

    models = FullSize()
    found = benchmark([(row, models.make(row)) for row in ROWS],
                      {"samples": torch.zeros(1, 4, 64, 64)}, models.prompt, models.prompt, 7.0,
                      runs, 2, 20)
    # Not the peaks: rows that share integers share what is laid out of them in their first step.
    return {"setting": found.setting, "rows": {
        row[0]: dict(zip(("seconds", "spread", "ratio", "images_per_hour", "weights_mib"),
                         row[1:])) for row in found.rows()}}


def memory(row: str, threads: int) -> dict:
    """What `_sd15.memory_of` finds in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", row, "--threads", str(threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def integers(path: Path, settings: dict | None) -> dict[str, dict]:
    """The rows of `STATIC` in a file of `static_int8` that was judged in the same way."""
    known = json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": {}}
    alike = settings and settings.items() <= known["settings"].items()
    found = {name: known["runs"][row] for name, row in STATIC.items()
             if alike and row in known["runs"]}
    if missing := [row for name, row in STATIC.items() if name not in found]:
        print(f"Not in {path}, judged in this way: {', '.join(missing)}; measure them with "
              "`python dev.py bench static_int8`.")
    return found


def tables(found: dict, static: dict[str, dict]) -> str:
    """All that was measured, as Markdown; ``static`` are rows of the quality table."""
    lines = []
    if quality := {**found.get("quality", {}), **static}:
        lines += ["", "| quality, starter | output error | SSIM | feature distance | FID | obeys |",
                  "|---|---|---|---|---|---|"]
        lines += [f"| {name} | {_judged(run)} |" for name, run in quality.items()]
    if cost_ := found.get("cost", {}).get("table"):
        lines += ["", cost_["setting"], "", "| cost, SD1.5 | s a step | x FP32 | images an hour | "
                  "weights, MiB | peak memory, MiB (weights included) |",
                  "|---|---|---|---|---|---|"]
        peaks = {name: f"{m['peak_mib']:,.0f}" for name, m in found.get("memory", {}).items()}
        lines += [f"| {name} | {r['seconds']:.2f} ± {r['spread']:.0%} | {r['ratio']:.2f} | "
                  f"{r['images_per_hour']:,.0f} | {r['weights_mib']:,.0f} | {peaks.get(name, '')} |"
                  for name, r in cost_["rows"].items()]
    if groups := found.get("sensitivity", {}).get("groups"):
        names = list(next(iter(groups.values())))
        lines += ["", f"| sensitivity, starter | {' | '.join(names)} |",
                  "|" + "---|" * (len(names) + 1)]
        lines += [f"| {group} | " + " | ".join(f"{row[n]:.2%}" for n in names) + " |"
                  for group, row in groups.items()]
    if plans := found.get("plans"):
        lines += ["", "| plans, starter | bits a weight | output error | SSIM | feature distance | "
                  "FID | obeys |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {name} | {run['bits']:.2f} | {_judged(run)} |"
                  for name, run in sorted(plans.items(), key=lambda p: -p[1]["bits"])]
    return "\n".join(lines)


def _judged(run: dict) -> str:
    return (f"{run['error']:.1%} | {run['ssim']:.4f} | {run['distance']:.2f} | {run['fid']:.2f} | "
            f"{run['obeys']:.0%}")


if __name__ == "__main__":
    main()
