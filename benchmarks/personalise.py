"""Personalisation on the starter model: what each way of fine-tuning reaches (Tables 1-2 in small).

``python dev.py bench personalise [--json FILE] [-- --seeds 3 --steps 250 --bits 4]``

Every method trains on the six pictures of a subject that no training picture of the starter shows,
with the same examples, timesteps and noise a step (``--batch`` pictures), AdamW and a cosine
schedule. Its learning rate is the best of ``RATES`` by the mean of both fidelities over the
subjects, for a seed that does not count (other N take that of *recommended*, other bit widths that
of 4 bits by ``--rates``); the paper's settings are taken as they are.

- subject fidelity (stands in for DINO-I / CLIP-I): cosine between the features of generated and of
  real pictures of the subject, in the classifier that was trained on the starter's generator,
- prompt fidelity (stands in for CLIP-T): share of the generated pictures on which that classifier
  reads the background that the prompt asks for; the chance of that is one in ten,
- parameters trained, bytes of what is kept, processor seconds a step on one thread, and peak
  memory of a training above the process with the models loaded (in a process of its own).

Mean and standard deviation over subjects and seeds. A run that is in the JSON file already is not
repeated.
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

BACKGROUNDS = ("red", "orange", "purple", "black", "blue", "green", "white", "pink")
SUBJECTS = {"pip": "a sks character", "crest": "a zwx emblem"}
SCALES = {
    "recommended": {},
    "recommended, N = 1": {"num_experts": 1},
    "recommended, N = 4": {"num_experts": 4},
    "PEQA": {"preset": "peqa"},
    "paper": {"preset": "paper"},
}
RATES = {
    **dict.fromkeys(SCALES, (1e-2, 2e-2, 4e-2)), "paper": (3e-6,),
    "QLoRA r=2": (3e-3, 1e-2, 3e-2), "QLoRA r=32": (1e-3, 3e-3, 1e-2),
    "full fine-tune": (1e-4, 3e-4, 1e-3),
}
TUNING_SEED = 99


def main(argv=None):
    """Train and judge every method, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", type=Path,
                        help="results of another bit width, to take the learning rates from")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    from quanttune.starter.common import prepare_host

    prepare_host("cpu")
    import torch

    torch.set_num_threads(1)
    bench = Bench(options)
    if options.memory:
        print(bench.peak(options.memory))
        return
    for subject in options.subjects:
        for seed in range(options.seeds):
            bench.result("untuned", subject, seed, 0.0)
    for method in options.methods:
        rate = bench.best_rate(method)
        for seed in range(options.seeds):
            for subject in options.subjects:
                bench.result(method, subject, seed, rate)
        if method not in bench.peaks:
            bench.peaks[method] = _child_peak(method, options)
            bench.write()
    print(table(bench, options))


def _child_peak(method, options) -> int:
    command = [sys.executable, __file__, "--memory", method]
    for name in ("batch", "bits"):
        command += [f"--{name}", str(getattr(options, name))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.strip().splitlines()[-1])


class Bench:
    """The starter, quantized, with its judge."""

    def __init__(self, options):
        import torch

        from quanttune.host.quantize import quantize_model
        from quanttune.quant import QuantSpec
        from quanttune.starter.classifier import load_classifier
        from quanttune.starter.load import load_starter

        self.options, self.judge_model = options, load_classifier()
        self.settings = {k: getattr(options, k) for k in ("steps", "batch", "bits")}
        self.runs, self.peaks, self.borrowed = {}, {}, []
        if options.json and options.json.exists():
            found = json.loads(options.json.read_text())
            if found["settings"] == self.settings:
                self.runs, self.peaks = found["runs"], found["peak_bytes"]
        if options.rates:
            self.borrowed = list(json.loads(options.rates.read_text())["runs"].values())
        with torch.inference_mode():
            self.model, self.clip, self.vae = load_starter()
            self.quantized, _ = quantize_model(self.model, QuantSpec(options.bits, range="mse"),
                                               name="starter")

    def data(self, subject):
        """Encoded pictures of a subject, and the pictures ``[n, 3, H, W]``."""
        import torch

        from quanttune.host.encode import encode
        from quanttune.host.images import read_folder

        images = read_folder(f"starter: {subject}", resolution=128).images
        pictures = torch.stack(images.images).permute(0, 3, 1, 2)
        return encode(images, self.quantized, self.clip, self.vae), pictures

    def best_rate(self, method) -> float:
        """The learning rate of `RATES` with the best fidelities."""
        method = "recommended" if method.startswith("recommended") else method
        rates = RATES[method]
        if len(rates) == 1:
            return rates[0]
        runs = [r for r in self.borrowed if r["method"] == method and r["seed"] == TUNING_SEED]
        runs = runs or [self.result(method, subject, TUNING_SEED, rate)
                        for rate in rates for subject in self.options.subjects]
        return max(rates, key=lambda rate: statistics.mean(
            [r["subject_fidelity"] + r["prompt_fidelity"] for r in runs if r["rate"] == rate]
            or [0.0]))

    def result(self, method, subject, seed, rate) -> dict:
        """Train one method once and judge it; taken from the file if it is there."""
        import torch

        key = "/".join(map(str, (method, subject, seed, rate)))
        if key not in self.runs:
            torch.manual_seed(seed)
            tuned, facts = self.quantized, {}
            if method != "untuned":
                tuned, facts = self.train(method, self.data(subject)[0], seed, rate)
            found = self.runs[key] = {"method": method, "subject": subject, "seed": seed,
                                      "rate": rate, **facts, **self.judge(tuned, subject, seed)}
            print(f"{key:40} {found['subject_fidelity']:.3f} {found['prompt_fidelity']:.3f} "
                  f"{found.get('seconds', 0):.3f} s", flush=True)
            self.write()
        return self.runs[key]

    def write(self) -> None:
        """Keep what has been found."""
        if self.options.json:
            self.options.json.write_text(json.dumps(
                {"settings": self.settings, "peak_bytes": self.peaks, "runs": self.runs},
                indent=1) + "\n")

    def peak(self, method) -> int:
        """Peak resident bytes of four steps above this process as it is."""
        from quanttune.benchmarks.quantized_unet import rss

        self.options.steps = 4
        data = self.data("pip")[0]
        Path("/proc/self/clear_refs").write_text("5")
        idle = rss()
        self.train(method, data, 0, RATES[method][0])
        return rss("VmHWM") - idle

    def train(self, method, data, seed, rate):
        """The tuned MODEL, and what it took."""
        return (self._scales if method in SCALES else self._weights)(method, data, seed, rate)

    def _config(self, method, seed, rate):
        from quanttune.training.config import PRESETS

        changes = dict(SCALES.get(method, {"num_experts": 1}))
        preset = changes.pop("preset", "recommended")
        return PRESETS[preset].replace(
            steps=self.options.steps, batch_size=self.options.batch, seed=seed, learning_rate=rate,
            checkpointing=False, save_every=0, **changes)

    def _scales(self, method, data, seed, rate):
        from quanttune.host.routing import apply_scale_set
        from quanttune.host.training import training_copy
        from quanttune.training.trainer import ScaleTrainer

        start = time.process_time()
        with training_copy(self.quantized) as denoiser, tempfile.TemporaryDirectory() as work:
            result = ScaleTrainer(denoiser, data, self._config(method, seed, rate),
                                  work).run()
        scales = result.scale_set
        return apply_scale_set(self.quantized, scales, 1.0, method)[0], {
            "seconds": (time.process_time() - start) / self.options.steps,
            "parameters": scales.num_parameters, "bytes": scales.nbytes}

    def _weights(self, method, data, seed, rate):
        """LoRA over the integers (peft), or all float weights."""
        from quanttune.benchmarks._lora import inject_lora
        from quanttune.benchmarks._weights import train_weights
        from quanttune.host.training import training_copy

        full = method == "full fine-tune"
        with training_copy(self.quantized) as denoiser:
            unet = denoiser.base.diffusion_model
            if full:
                parameters = list(_float_weights(unet, self.model).parameters())
            else:
                parameters = inject_lora(unet, denoiser.shapes, int(method.rpartition("=")[2]))
            start = time.process_time()
            train_weights(denoiser, data, parameters, self._config(method, seed, rate))
            seconds = (time.process_time() - start) / self.options.steps
            count = sum(p.numel() for p in parameters)
            return denoiser.patcher, {"seconds": seconds, "parameters": count,
                                      "bytes": count * (2 if full else 4)}

    def judge(self, model, subject, seed) -> dict:
        """Fidelities of two pictures for each background (one where only rates compete)."""
        import torch

        from quanttune.host.pictures import SamplingSettings, sample_pictures

        words, (_, real) = SUBJECTS[subject], self.data(subject)
        asked = [b for b in BACKGROUNDS for _ in range(1 if seed == TUNING_SEED else 2)]
        pictures = sample_pictures(model, self.clip, self.vae,
                                   [f"{words} on a {b} background" for b in asked],
                                   SamplingSettings(128, 128, seed=1000 + seed))
        with torch.inference_mode():
            made, real = (torch.nn.functional.normalize(self.judge_model.embed(p), dim=1)
                          for p in (pictures.permute(0, 3, 1, 2), real))
            likeness = float((made @ real.t()).mean())
            said = self.judge_model.read(pictures)
        obeyed = statistics.mean(a["background"] == b for a, b in zip(said, asked))
        return {"subject_fidelity": likeness, "prompt_fidelity": obeyed}


def _float_weights(unet, source):
    """The float weights of ``source`` in a quantized model, as trainable parameters."""
    import torch

    from quanttune.host.ops import scaled_layers

    state = source.model.diffusion_model.state_dict()
    for name, layer in scaled_layers(unet).items():
        weight = state[f"{name}.weight"].float().clone()
        layer._parameters["weight"] = torch.nn.Parameter(weight)
    for module in unet.modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[key] = torch.nn.Parameter(value.detach().float().clone())
    return unet


def _spread(values) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def table(bench: Bench, options) -> str:
    """All methods as Markdown, over subjects and seeds."""
    rows = {}
    for method in ("untuned", *options.methods):
        rate = bench.best_rate(method) if method in RATES else 0.0
        rows[method] = [r for r in bench.runs.values() if r["method"] == method
                        and r["rate"] == rate and r["seed"] < options.seeds
                        and r["subject"] in options.subjects]
    likeness = {m: statistics.mean(r["subject_fidelity"] for r in f) for m, f in rows.items()}
    whole = likeness.get("full fine-tune", 0.0) - likeness["untuned"]
    lines = ["", "| method | learning rate | subject fidelity | prompt fidelity | gap closed | "
             "parameters | MB kept | s a step | peak MiB |", "|---" * 9 + "|"]
    for method, found in rows.items():
        first = found[0]
        closed = f"{(likeness[method] - likeness['untuned']) / whole:.0%}" if whole > 0 else ""
        lines.append(
            f"| {method} | {first['rate']:g} | {_spread([r['subject_fidelity'] for r in found])} | "
            f"{_spread([r['prompt_fidelity'] for r in found])} | "
            f"{closed} | {first.get('parameters', 0):,} | "
            f"{first.get('bytes', 0) / 1e6:.2f} | "
            f"{statistics.median(r.get('seconds', 0) for r in found):.3f} | "
            f"{bench.peaks.get(method, 0) / 2**20:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
