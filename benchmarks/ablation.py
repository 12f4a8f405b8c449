"""What input scales, experts and bit widths bring: the paper's Tables 3-4 in small.

``python dev.py bench ablation [--json FILE] [-- --seeds 3 --steps 200 --bits 8 4 3 2]``

An unconditional DDPM of real pictures (scikit-learn's handwritten digits, 8 x 8) is trained in
float, quantized once for each bit width (min/max, per output channel), and fine-tuned on the same
pictures, as the paper does with CIFAR-10: output scales alone (PEQA), experts, input scales, both,
LoRA over the integers (peft), and all float weights for comparison. Every method takes the same
examples, timesteps and noise a step, AdamW with a cosine schedule, and its best learning rate of
those in ``RATES`` by FID at 3 bits with a seed that does not count (other N take that of one N).

FID and IS over 1,000 pictures (DDIM, 50 steps) with torchmetrics, features and classes from a small
network trained on the digits, so they compare rows of this table and nothing else. Mean and
standard deviation over the seeds. A run that is in the JSON file already is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

SCALES = {
    "PEQA": {"num_experts": 1, "train_s_in": False},
    "PEQA, N = 2": {"num_experts": 2, "train_s_in": False},
    "TuneQDM, N = 1": {"num_experts": 1},
    "TuneQDM, N = 2": {"num_experts": 2},
    "TuneQDM, N = 4": {"num_experts": 4},
    "TuneQDM, N = 8": {"num_experts": 8},
}
FIRST = "N = 4, a quarter of the steps shared"
SHARED = {"num_experts": 4, "shared_share": 0.25}
"""Its settings, from which every other variant differs in one: an earlier preset."""
VARIANTS = {
    FIRST: {},
    "the same with N = 2": {"num_experts": 2},
    "the paper's settings": {"preset": "paper", "rate": 3e-6, "shared_share": 0.0},
    "the paper's settings, best rate": {"preset": "paper", "shared_share": 0.0},
    "half of the steps shared": {"shared_share": 0.5},
    "three quarters shared": {"shared_share": 0.75},
    "one optimizer for all experts": {"separate_experts": False},
    "timesteps each on its own": {"stratified": False},
    "neither, and no shared stage": {"shared_share": 0.0, "separate_experts": False,
                                     "stratified": False},
    "s_in ~ N(1, 0.01)": {"s_in_noise": 0.1},
    "s_in at a third of the rate": {"s_in_learning_rate": 1 / 3},
    "s_in at three times the rate": {"s_in_learning_rate": 3.0},
    "absolute s_out, best rate": {"absolute": True},
    "timesteps 500-900 only": {"timestep_range": (0.5, 0.9)},
    "average of the scales (0.99)": {"ema_decay": 0.99},
    "min-SNR, gamma 5": {"min_snr_gamma": 5.0},
    "experts blended": {"blended": True},
}
"""Other settings of the trainer at 3 bits, each against the first."""
OTHERS = ("QLoRA r=2", "QLoRA r=32", "full fine-tune")
RATES = (1e-3, 4e-3, 1.6e-2)
"""Learning rates of LoRA; those of scales are four times these, of full fine-tuning a tenth."""
ABSOLUTE_RATES = (3e-5, 3e-4, 3e-3)
TUNING_SEED = 99


def main(argv=None):
    """Train what is missing, train and judge every method, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".dev/bench"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--unet-steps", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args(argv)
    bench = Ablation(options)
    rates = {m: bench.best_rate(m) for m in (*SCALES, *OTHERS)}
    for seed in range(options.seeds):
        bench.result("float", None, seed)
        for method in VARIANTS:
            rate = VARIANTS[method].get("rate") or bench.best_rate(FIRST)
            if method.endswith("best rate"):
                rate = bench.best_rate(method)
            bench.result(method, 3, seed, rate)
        for bits in options.bits:
            bench.result("untuned", bits, seed)
            for method in (*SCALES, *OTHERS):
                if method != "full fine-tune" or bits == options.bits[0]:
                    bench.result(method, bits if method != "full fine-tune" else None, seed,
                                 rates[method])
    print(table(bench.runs, options))
    print(variants_table(bench.runs, options))


def tuned_as(method: str) -> str:
    """The method whose best learning rate a method takes."""
    return {"PEQA, N = 2": "PEQA", "TuneQDM, N = 2": "TuneQDM, N = 4",
            "TuneQDM, N = 8": "TuneQDM, N = 4"}.get(method, method)


class Ablation:
    """The trained and quantized models, their judge, and the runs so far."""

    def __init__(self, options):
        import torch

        from quanttune.benchmarks._digits import (
            DigitsDenoiser,
            digits,
            trained_judge,
            trained_unet,
            training_set,
        )

        self.options = options
        options.work.mkdir(parents=True, exist_ok=True)
        self.judge, right = trained_judge(options.work / "digits-judge.pt")
        print(f"The judge reads {right:.1%} of digits that it never saw", flush=True)
        self.unet = trained_unet(options.work / f"digits-unet-{options.unet_steps}.pt",
                                 options.unet_steps)
        self.make, self.data, self.torch = DigitsDenoiser, training_set(), torch
        self.real = digits()[0]
        self.settings = {k: v for k, v in vars(options).items()
                         if k in ("steps", "batch", "unet_steps", "samples")}
        self.runs: dict[str, dict] = {}
        if options.json and options.json.exists():
            found = json.loads(options.json.read_text())
            if found["settings"] == self.settings:
                self.runs = found["runs"]

    def best_rate(self, method) -> float:
        """The learning rate of the lowest FID at 3 bits."""
        method, bits = tuned_as(method), None if method == "full fine-tune" else 3
        factor = 0.1 if bits is None else 1 if method in OTHERS else 4
        absolute = method in VARIANTS and method != FIRST
        rates = ABSOLUTE_RATES if absolute else [factor * r for r in RATES]
        return min(rates, key=lambda r: self.result(method, bits, TUNING_SEED, r)["fid"])

    def result(self, method, bits, seed, rate=0.0) -> dict:
        """One run, from the file if it is there."""
        key = "/".join(map(str, (method, bits, seed, rate)))
        if key not in self.runs:
            self.torch.manual_seed(seed)
            start = time.perf_counter()
            denoiser, scales, facts = self._tuned(method, bits, seed, rate)
            facts["seconds"] = time.perf_counter() - start
            self.runs[key] = {"method": method, "bits": bits, "seed": seed, "rate": rate, **facts,
                              **self._scores(denoiser, scales, seed,
                                             VARIANTS.get(method, {}).get("blended", False))}
            print(f"{key:32} FID {self.runs[key]['fid']:8.4f}  IS {self.runs[key]['is']:.3f}  "
                  f"{facts['seconds']:.0f} s", flush=True)
            if self.options.json:
                self.options.json.write_text(json.dumps(
                    {"settings": self.settings, "runs": self.runs}, indent=1) + "\n")
        return self.runs[key]

    def _tuned(self, method, bits, seed, rate):
        from quanttune.benchmarks._weights import train_weights

        denoiser = self.make(copy.deepcopy(self.unet), bits)
        if method in ("float", "untuned"):
            return denoiser, None, {"parameters": 0}
        if method in SCALES or method in VARIANTS:
            from quanttune.training.trainer import ScaleTrainer

            with tempfile.TemporaryDirectory() as work:
                result = ScaleTrainer(denoiser, self.data, self._config(method, seed, rate),
                                      work).run()
            return denoiser, result.scale_set, {"parameters": result.scale_set.num_parameters}
        if method == "full fine-tune":
            parameters = list(denoiser.unet.parameters())
        else:
            parameters = self._lora(denoiser, int(method.rpartition("=")[2]))
        train_weights(denoiser, self.data, parameters, self._config("TuneQDM, N = 1", seed, rate))
        return denoiser, None, {"parameters": sum(p.numel() for p in parameters)}

    def _config(self, method, seed, rate):
        from quanttune.training.config import PRESETS

        changes = dict(SCALES.get(method, {**SHARED, **VARIANTS.get(method, {})}))
        preset = changes.pop("preset", "recommended")
        for name in ("rate", "blended"):
            changes.pop(name, None)
        if "s_in_learning_rate" in changes:
            changes["s_in_learning_rate"] *= rate
        return PRESETS[preset].replace(
            steps=self.options.steps, batch_size=self.options.batch, seed=seed, learning_rate=rate,
            checkpointing=False, save_every=0, **changes)

    def _lora(self, denoiser, rank):
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank,
                                           target_modules=list(denoiser.layers)), denoiser.unet)
        return [p for n, p in denoiser.unet.named_parameters() if "lora_" in n]

    def _scores(self, denoiser, scales, seed, blended) -> dict:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        from quanttune.benchmarks._digits import sample

        made = sample(denoiser, scales, self.options.samples, 1000 + seed, blended=blended)
        if not bool(made.isfinite().all()):
            return {"fid": float("inf"), "is": 1.0}
        fid = FrechetInceptionDistance(self.judge)
        fid.update(self.real, real=True)
        fid.update(made, real=False)
        classes = self.torch.nn.Sequential(self.judge, self.judge.head)
        inception = InceptionScore(classes)
        inception.update(made)
        return {"fid": float(fid.compute()), "is": float(inception.compute()[0])}


def scores(runs, options, method, bits) -> str:
    """FID with its spread, and IS, of a method at its best rate."""
    found = [r for r in runs.values() if r["method"] == method and r["bits"] == bits
             and r["seed"] < options.seeds]
    tuning = [r for r in runs.values()
              if r["method"] == tuned_as(method) and r["seed"] == TUNING_SEED]
    if tuning:
        rate = min(tuning, key=lambda r: r["fid"])["rate"]
        found = [r for r in found if r["rate"] == rate]
    if not found:
        return ""
    fids, inception = ([r[k] for r in found] for k in ("fid", "is"))
    spread = f" ± {statistics.stdev(fids):.3f}" if len(fids) > 1 else ""
    return f"{statistics.mean(fids):.3f}{spread} ({statistics.mean(inception):.2f})"


def table(runs, options) -> str:
    """FID (IS) of each method and bit width as Markdown."""
    columns = options.bits
    lines = ["", "| method | parameters | " + " | ".join(f"{b} bits" for b in columns) + " |",
             "|---|---|" + "---|" * len(columns)]
    for method in ("float", "full fine-tune", "untuned", *SCALES, *OTHERS[:2]):
        count = next((r["parameters"] for r in runs.values() if r["method"] == method), 0)
        in_float = method in ("float", "full fine-tune")
        cells = ([f"(float) {scores(runs, options, method, None)}"] + [""] * (len(columns) - 1)
                 if in_float else [scores(runs, options, method, b) for b in columns])
        lines.append(f"| {method} | {count:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variants_table(runs, options) -> str:
    """FID (IS) of the trainer's variants at 3 bits as Markdown."""
    rows = {"TuneQDM, N = 4 (no shared stage)": "TuneQDM, N = 4", **{m: m for m in VARIANTS}}
    return "\n".join(["", "| settings, 3 bits | FID (IS) |", "|---|---|", *(
        f"| {label} | {scores(runs, options, m, 3)} |" for label, m in rows.items())])


if __name__ == "__main__":
    main()
