"""Static INT8 and QAT on the starter model: what each way of quantizing loses.

``python dev.py bench static_int8 [--json FILE] [-- --images 300 --samples 160]``

Calibrated and trained on prompts of the starter's own captions; judged on others:

- error: of the model's output against the float model's, relative, over forwards that a sampler
  makes (both guidance rows, all noise levels),
- SSIM (torchmetrics): of each picture with the float model's from the same noise and prompt,
- feature distance: one minus the cosine of their features, in the classifier that was trained on
  the starter's generator, times 1,000.

float32 beside the integers, so that nothing else differs. A way that is in the JSON file already is
not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

SAMPLING = {"steps": 20, "cfg": 5.0, "sampler": "dpmpp_2m", "scheduler": "karras"}
BUCKETS = (1, 4)
ESTIMATORS = ("minmax", "percentile", "mse", "entropy")


def main(argv=None):
    """Quantize, sample and judge every way, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--samples", type=int, default=160, help="forwards to calibrate on")
    parser.add_argument("--steps", type=int, default=200, help="of QAT")
    parser.add_argument("--ways", nargs="+")
    options = parser.parse_args(argv)
    from quanttune.starter.common import prepare_host

    prepare_host("cpu")
    import folder_paths
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        bench = Bench(options)
        for name in options.ways or bench.ways:
            bench.result(name)
        print(table(bench.runs))


class Bench:
    """The starter, its float pictures, and the ways."""

    def __init__(self, options):
        from quanttune.host.calibrate import Calibration
        from quanttune.host.observe import ForwardRecord
        from quanttune.host.samples import Samples, conditioning_of
        from quanttune.starter.classifier import load_classifier
        from quanttune.starter.evaluate import held_out_prompts
        from quanttune.starter.load import load_starter

        self.options = options
        self.settings = {k: getattr(options, k) for k in ("images", "samples", "steps")}
        self.runs: dict[str, dict] = {}
        if options.json and options.json.exists():
            found = json.loads(options.json.read_text())
            if found["settings"] == self.settings:
                self.runs = found["runs"]
        self.model, self.clip, self.vae = load_starter()
        self.judge = load_classifier()
        prompts = [text for _, text in held_out_prompts(40 + options.images)]
        self.conditioning = conditioning_of(self.clip, "\n".join(prompts[:32]), None, None)
        self.prompts = prompts[40:]
        self.latent = {"samples": _zeros()}
        unseen, negative = conditioning_of(self.clip, "\n".join(prompts[32:40]), None, None)
        samples = Samples(self.latent, unseen, negative,
                          Calibration(samples=160, seed=7000, **SAMPLING))
        self.record = ForwardRecord(lambda number: number % 3 == 1)
        with self.record.recording(self.model.model.diffusion_model):
            for index in range(len(samples)):
                samples.run(self.model, index)
        self.pictures = None
        self.ways = {
            "8 bits, ranges of the moment": lambda: self.dynamic(8),
            "8 bits, mse, 4 intervals": lambda: self.static(8),
            "8 bits, QAT": lambda: self.trained(8),
            "8 bits, QAT, a tenth of the rates": lambda: self.trained(8, 1e-3, 1e-4),
            "4 bits, static": lambda: self.static(4),
            "4 bits, static, GPTQ": lambda: self.static(4, rounding="gptq"),
            "4 bits, QAT": lambda: self.trained(4),
            "4 bits, GPTQ, QAT": lambda: self.trained(4, rounding="gptq"),
            **{f"8 bits, {e}, {b} interval{'s' if b > 1 else ''}":
               lambda e=e, b=b: self.static(8, estimator=e, timestep_buckets=b)
               for e in ESTIMATORS for b in BUCKETS},
            "4 bits, ranges of the moment": lambda: self.dynamic(4),
            "4 bits, GPTQ, QAT of step sizes": lambda: self.trained(
                4, weights=0.0, rounding="gptq"),
            "3 bits, static": lambda: self.static(3),
            "3 bits, static, GPTQ": lambda: self.static(3, rounding="gptq"),
            "3 bits, GPTQ, QAT": lambda: self.trained(3, rounding="gptq"),
        }

    def calibration(self, **settings):
        """Settings of a calibration, four intervals and the least squared error by default."""
        from quanttune.host.calibrate import Calibration

        return Calibration(**{"samples": self.options.samples, "timestep_buckets": 4,
                              "precision": "float32", **SAMPLING, **settings})

    def dynamic(self, bits):
        """Ranges found at run time."""
        from quanttune.host.dynamic_int8 import dynamic_int8

        return dynamic_int8(self.static(bits), precision="float32", ranges="dynamic")[0]

    def static(self, bits, **settings):
        """Calibrated."""
        from quanttune.host.calibrate import calibrate

        return calibrate(self.model, self.latent, *self.conditioning,
                         self.calibration(bits=bits, **settings))[0]

    def trained(self, bits, weights=1e-2, scales=1e-3, **settings):
        """Calibrated, then trained."""
        from quanttune.host.qat import train_qat
        from quanttune.training.qat import QatTraining

        config = QatTraining(steps=self.options.steps, weight_learning_rate=weights,
                             learning_rate=scales,
                             checkpointing=False, precision="fp32", save_every=0)
        how = self.calibration(samples=2 * self.options.samples, seed=1000)
        name = f"{bits}-{weights}-{scales}-{settings}".translate(
            {ord(c): "-" for c in "{}':, "}).strip("-")
        return train_qat(self.static(bits, **settings), self.model, self.latent,
                         *self.conditioning, how, config, name).model

    def result(self, name) -> dict:
        """One way, from the file if it is there."""
        if name not in self.runs:
            import comfy.model_management

            start = time.process_time()
            model = self.ways[name]()
            seconds = time.process_time() - start
            comfy.model_management.load_models_gpu([model])
            self.runs[name] = {"error": self.record.error(model), "seconds": seconds,
                               **self.compare(model)}
            print(f"{name:40} {self.runs[name]}", flush=True)
            if self.options.json:
                self.options.json.write_text(json.dumps(
                    {"settings": self.settings, "runs": self.runs}, indent=1) + "\n")
        return self.runs[name]

    def compare(self, model) -> dict:
        """SSIM and feature distance of its pictures from the float model's."""
        import torch
        from torchmetrics.functional.image import structural_similarity_index_measure

        if self.pictures is None:
            self.pictures = self.sample(self.model)
        made, floats = self.sample(model), self.pictures
        ssim = structural_similarity_index_measure(made, floats, data_range=1.0)
        features = [torch.nn.functional.normalize(self.judge.embed(p), dim=1)
                    for p in (made, floats)]
        return {"ssim": float(ssim), "distance": float(1000 * (
            1 - (features[0] * features[1]).sum(1)).mean())}

    def sample(self, model):
        """A picture of each prompt, ``[n, 3, H, W]``."""
        import torch

        from quanttune.starter.evaluate import generate

        made = generate(model, self.clip, self.vae, self.prompts, seed=9000)
        return torch.from_numpy(made).movedim(-1, 1)


def _zeros():
    import torch

    return torch.zeros(1, 4, 16, 16)


def table(runs: dict) -> str:
    """The ways beside each other, as Markdown."""
    lines = ["", "| starter model | output error | SSIM | feature distance | s to make |",
             "|---|---|---|---|---|"]
    for name, run in runs.items():
        lines.append(f"| {name} | {run['error']:.1%} | {run['ssim']:.3f} | {run['distance']:.2f} | "
                     f"{run['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
