"""Static INT8 and QAT on the starter model: what each way of quantizing loses.

``python dev.py bench static_int8 [--json FILE] [-- --images 300 --samples 640]``

Calibrated and trained on prompts of the starter's own captions; judged on others, see
`_starter_quality.StarterQuality`. float32 beside the integers, so that nothing else differs. A way
that is in the JSON file already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from quanttune.benchmarks._starter_quality import SAMPLING, StarterQuality

DYNAMIC, PTQ, QAT = "8 bits, ranges of the moment", "8 bits, static", "8 bits, QAT"
GPTQ, GPTQ_QAT = "4 bits, static, GPTQ", "4 bits, GPTQ, QAT"
ESTIMATORS = ("percentile", "mse", "entropy")


def main(argv=None):
    """Quantize, sample and judge every way, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--samples", type=int, default=640, help="forwards to calibrate on")
    parser.add_argument("--steps", type=int, default=400, help="of QAT")
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0],
                        help="of the noise that is calibrated and trained on")
    options = parser.parse_args(argv)
    from quanttune.starter.common import prepare_host

    prepare_host("cpu")
    import folder_paths
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        bench = Bench(options)
        for seed in options.seeds:
            for name in options.ways or bench.ways:
                bench.result(name, seed)
        print(table(bench.runs))


class Bench:
    """The starter and the ways of quantizing it.

    Args:
        options: ``images``, ``samples``, ``steps`` and ``json`` of the command line.

    Attributes:
        quality: what judges them.
        ways: name to a function that makes the MODEL.
        runs: name to what was measured.
    """

    def __init__(self, options):
        self.options = options
        self.quality = StarterQuality(options.images)
        self.settings = {"samples": options.samples, "qat_steps": options.steps,
                         **self.quality.settings}
        self.runs: dict[str, dict] = {}
        if options.json and options.json.exists():
            found = json.loads(options.json.read_text())
            if found["settings"] == self.settings:
                self.runs = found["runs"]
        self.seed = 0
        self.ways = {
            DYNAMIC: lambda: self.dynamic(8),
            PTQ: lambda: self.static(8),
            QAT: lambda: self.trained(8),
            "8 bits, QAT, even": lambda: self.trained(8, weighting="even"),
            "4 bits, static": lambda: self.static(4),
            GPTQ: lambda: self.static(4, rounding="gptq"),
            GPTQ_QAT: lambda: self.trained(4, rounding="gptq"),
            "4 bits, QAT": lambda: self.trained(4),
            **{f"8 bits, static, {e}": lambda e=e: self.static(8, estimator=e)
               for e in ESTIMATORS},
            "3 bits, static": lambda: self.static(3),
            "3 bits, static, GPTQ": lambda: self.static(3, rounding="gptq"),
            "3 bits, GPTQ, QAT": lambda: self.trained(3, rounding="gptq"),
            "8 bits, static, one interval": lambda: self.static(8, timestep_buckets=1),
            "4 bits, ranges of the moment": lambda: self.dynamic(4),
        }

    def calibration(self, **settings):
        """Settings of a calibration, four intervals and all values by default."""
        from quanttune.host.calibrate import Calibration

        return Calibration(**{"samples": self.options.samples, "timestep_buckets": 4,
                              "estimator": "minmax", "precision": "float32", **SAMPLING,
                              "seed": self.seed, **settings})

    def dynamic(self, bits):
        """Ranges found at run time."""
        from quanttune.host.dynamic_int8 import dynamic_int8

        return dynamic_int8(self.static(bits), precision="float32", ranges="dynamic")[0]

    def static(self, bits, **settings):
        """Calibrated."""
        from quanttune.host.calibrate import calibrate

        return calibrate(self.quality.model, self.quality.latent, *self.quality.conditioning,
                         self.calibration(bits=bits, **settings))[0]

    def trained(self, bits, weighting="picture", **settings):
        """Calibrated, then trained on twice as many forwards with other prompts."""
        from quanttune.host.qat import train_qat
        from quanttune.training.qat import QatTraining

        config = QatTraining(steps=self.options.steps, checkpointing=False, precision="fp32",
                             save_every=0, weighting=weighting)
        how = self.calibration(samples=2 * self.options.samples, seed=1000 + self.seed)
        quality = self.quality
        positive, negative = quality.conditioning
        # A sample is a whole picture and has a prompt of its own: these begin after those.
        positive = positive[self.options.samples // SAMPLING["steps"]:]
        name = f"{bits}-{weighting}-{self.seed}-{'-'.join(settings.values())}".strip("-")
        return train_qat(self.static(bits, **settings), quality.model, quality.latent,
                         positive, negative, how, config, name).model

    def result(self, name, seed=0) -> dict:
        """One way with one seed, from the file if it is there."""
        way, self.seed = name, seed
        name = f"{way}, seed {seed}" if seed else way
        if name not in self.runs:
            start = time.process_time()
            model = self.ways[way]()
            seconds = time.process_time() - start
            self.runs[name] = {"seconds": seconds, **self.quality.measure(model)}
            print(f"{name:40} {self.runs[name]}", flush=True)
            if self.options.json:
                self.options.json.write_text(json.dumps(
                    {"settings": self.settings, "runs": self.runs}, indent=1) + "\n")
        return self.runs[name]


def table(runs: dict) -> str:
    """The ways beside each other, as Markdown."""
    lines = ["", "| starter model | output error | SSIM | feature distance | FID | obeys | "
             "s to make |", "|---|---|---|---|---|---|---|"]
    for name, run in runs.items():
        lines.append(f"| {name} | {run['error']:.1%} | {run['ssim']:.3f} | {run['distance']:.2f} | "
                     f"{run['fid']:.2f} | {run['obeys']:.0%} | {run['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
