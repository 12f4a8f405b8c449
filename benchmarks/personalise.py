"""Personalisation on the starter model: what each way of fine-tuning reaches (Tables 1-2 in small).

``python dev.py bench personalise [--json FILE] [-- --seeds 3 --steps 400 --bits 4]``

Every method trains on the six pictures of a subject that no training picture of the starter shows,
with the same examples, timesteps and noise a step (``--batch`` pictures), AdamW and a cosine
schedule. Learning rates are each method's best of a few tried by hand, except for the paper's.

- subject fidelity (stands in for DINO-I / CLIP-I): cosine between the features of generated and of
  real pictures of the subject, in the classifier that was trained on the starter's generator,
- prompt fidelity (stands in for CLIP-T): share of the generated pictures on which that classifier
  reads the background that the prompt asks for; the chance of that is one in ten,
- parameters trained, bytes of what is kept, seconds a step (this machine, one after the other).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

BACKGROUNDS = ("red", "orange", "purple", "black", "blue", "green", "white", "pink")
SUBJECTS = {"pip": "a sks character", "crest": "a zwx emblem"}
RATES = {"recommended": None, "recommended, N = 2": None, "PEQA": None, "paper": None,
         "QLoRA r=2": 3e-3, "QLoRA r=32": 1e-3, "full fine-tune": 3e-4}


def main(argv=None):
    """Train and judge every method, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rate", type=float, help="of the scales, instead of the preset's")
    options = parser.parse_args(argv)
    from quanttune.starter.common import prepare_host

    prepare_host("cpu")
    bench = Bench(options)
    rows = {"untuned": [bench.judge(bench.quantized, s, None, 0) for s in options.subjects]}
    print(line("untuned", rows["untuned"]), flush=True)
    for method in options.methods:
        rows[method] = [bench.run(method, subject, seed)
                        for subject in options.subjects for seed in range(options.seeds)]
        print(line(method, rows[method]), flush=True)
    print(table(rows))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


class Bench:
    """The starter, quantized, with its judge."""

    def __init__(self, options):
        import torch

        from quanttune.host.quantize import quantize_model
        from quanttune.quant import QuantSpec
        from quanttune.starter.classifier import load_classifier
        from quanttune.starter.load import load_starter

        self.options, self.judge_model = options, load_classifier()
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

    def run(self, method, subject, seed) -> dict:
        """Train one method once and judge it."""
        import torch

        torch.manual_seed(seed)
        data, _ = self.data(subject)
        if method in ("recommended", "recommended, N = 2", "PEQA", "paper"):
            tuned, facts = self._scales(method, data, seed)
        else:
            tuned, facts = self._weights(method, data, seed)
        return {**self.judge(tuned, subject, facts, seed), "subject": subject, "seed": seed}

    def _config(self, method, seed):
        from quanttune.training.config import PRESETS

        preset = {"paper": "paper", "PEQA": "peqa"}.get(method, "recommended")
        changes = {"num_experts": 2} if method.endswith("N = 2") else {}
        if self.options.rate and method != "paper":
            changes["learning_rate"] = self.options.rate
        return PRESETS[preset].replace(steps=self.options.steps, batch_size=self.options.batch,
                                       seed=seed, checkpointing=False, save_every=0, **changes)

    def _scales(self, method, data, seed):
        from quanttune.host.routing import apply_scale_set
        from quanttune.host.training import training_copy
        from quanttune.training.trainer import ScaleTrainer

        start = time.perf_counter()
        with training_copy(self.quantized) as denoiser, tempfile.TemporaryDirectory() as work:
            result = ScaleTrainer(denoiser, data, self._config(method, seed), work).run()
        scales = result.scale_set
        return apply_scale_set(self.quantized, scales, 1.0, method)[0], {
            "seconds": (time.perf_counter() - start) / self.options.steps,
            "parameters": scales.num_parameters, "bytes": scales.nbytes}

    def _weights(self, method, data, seed):
        """LoRA over the integers (peft), or all float weights."""
        import torch

        from quanttune.host.training import training_copy
        from quanttune.training.objective import denoising_loss, loss_weight
        from quanttune.training.optimizers import rate_factor
        from quanttune.training.sampling import ExampleOrder, TimestepSampler, generator_of

        config = self._config("recommended, N = 2", seed).replace(num_experts=1)
        order = ExampleOrder(data.buckets(), config.batch_size, seed)
        draw = TimestepSampler(1, 1000, (0.0, 1.0), True, seed)
        full = method == "full fine-tune"
        with training_copy(self.quantized) as denoiser:
            unet = denoiser.base.diffusion_model
            if full:
                unet = _float_weights(unet, self.model)
                parameters = [p.requires_grad_(True) for p in unet.parameters()]
            else:
                from quanttune.benchmarks._lora import inject_lora

                parameters = inject_lora(unet, denoiser.shapes, int(method.rpartition("=")[2]))
            optimizer = torch.optim.AdamW(parameters, lr=RATES[method], weight_decay=0.0)
            factor, start = rate_factor(config), time.perf_counter()
            for step in range(config.steps):
                clean, conditions = data.batch(order.batch(step))
                noise = torch.randn(clean.shape, generator=generator_of(seed, "noise", 0, step))
                sigma = denoiser.sigma(draw.timesteps(step, len(clean)).float())
                out = denoiser.denoise(denoiser.noised(clean, noise, sigma), sigma, conditions, {})
                loss = denoising_loss(clean, out, loss_weight("eps", sigma)).mean()
                optimizer.param_groups[0]["lr"] = RATES[method] * factor(step)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            seconds = (time.perf_counter() - start) / config.steps
            for p in parameters:
                p.requires_grad_(False)
            count = sum(p.numel() for p in parameters)
            return denoiser.patcher, {"seconds": seconds, "parameters": count,
                                      "bytes": count * (2 if full else 4)}

    def judge(self, model, subject, facts, seed) -> dict:
        """Fidelities of two pictures for each background."""
        import torch

        from quanttune.host.pictures import SamplingSettings, sample_pictures

        words, (_, real) = SUBJECTS[subject], self.data(subject)
        asked = [b for b in BACKGROUNDS for _ in range(2)]
        pictures = sample_pictures(model, self.clip, self.vae,
                                   [f"{words} on a {b} background" for b in asked],
                                   SamplingSettings(128, 128, seed=1000 + seed))
        with torch.inference_mode():
            made, real = (torch.nn.functional.normalize(self.judge_model.embed(p), dim=1)
                          for p in (pictures.permute(0, 3, 1, 2), real))
            likeness = float((made @ real.t()).mean())
            said = self.judge_model.read(pictures)
        obeyed = statistics.mean(a["background"] == b for a, b in zip(said, asked))
        return {"subject_fidelity": likeness, "prompt_fidelity": obeyed, **(facts or {})}


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


def line(method, runs) -> str:
    """One row of the table."""
    first = runs[0]
    return (f"| {method} | {_spread([r['subject_fidelity'] for r in runs])} | "
            f"{_spread([r['prompt_fidelity'] for r in runs])} | "
            f"{first.get('parameters', 0):,} | {first.get('bytes', 0) / 1e6:.2f} | "
            f"{statistics.median(r.get('seconds', 0) for r in runs):.3f} |")


def table(rows) -> str:
    """All methods as Markdown, over subjects and seeds."""
    return "\n".join(["", "| method | subject fidelity | prompt fidelity | parameters | MB kept | "
                      "s a step |", "|---|---|---|---|---|---|",
                      *(line(m, r) for m, r in rows.items())])


if __name__ == "__main__":
    main()
