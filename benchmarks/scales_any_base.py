"""Scales that were trained on the starter's 4-bit weights, on every other form of its weights.

``python dev.py bench scales_any_base [--json FILE] [-- --images 24]``

The reference is the 4-bit base with its scales. For each base: the relative error of the model's
output over the timesteps, and SSIM of pictures from the same noise; beside each, the same between
the bases without scales, which is what their precision alone makes of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUBJECTS = {"crest": "a zwx emblem", "pip": "a sks character"}
PLACES = ("", " on a red background", " on a blue background", " on a green background",
          " on a yellow background", " on a white background")
TIMESTEPS = (999, 900, 750, 600, 450, 300, 150, 50, 5)
STARTER = Path(__file__).resolve().parent.parent / "starter"


def main(argv=None):
    """Measure every base with both subjects, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=24, help="a subject")
    options = parser.parse_args(argv)
    from quanttune.starter.common import prepare_host

    prepare_host("cpu")
    import torch

    with torch.inference_mode():
        rows = measure(options.images)
    text = table(rows)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"images": options.images, "rows": rows}, indent=1))


def bases(floats):
    """Name to MODEL: the starter in every form, the reference first."""
    import torch

    from quanttune.host.bnb_quantize import quantize_bnb
    from quanttune.host.build import load_model
    from quanttune.host.export_unet import export_unet
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec
    from quanttune.starter.load import load_unet

    four = load_model(str(STARTER / "quanttune" / "starter-4bit.safetensors"), "4 bits")
    found = {"4 bits (trained on)": four,
             "the same weights as float32": export_unet(four, "no file", "float32")[0],
             "float32": floats}
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        found[f"{name} weights"] = load_unet(str(STARTER / "unet.safetensors"), {"dtype": dtype})
    for bits in (8, 3):
        found[f"{bits} bits"] = quantize_model(floats, QuantSpec(bits, range="mse"))[0]
    for kind in ("nf4", "int8"):
        found[f"bitsandbytes {kind}"] = quantize_bnb(floats, kind)[0]
    return found


def measure(images: int) -> list[dict]:
    """A row a base and subject."""
    import numpy as np
    import torch

    from quanttune.host.routing import apply_scale_set
    from quanttune.metrics.similarity import ssim
    from quanttune.quant import load_scale_set
    from quanttune.starter.evaluate import generate
    from quanttune.starter.load import load_starter

    floats, clip, vae = load_starter()
    models, rows = bases(floats), []
    for subject, words in SUBJECTS.items():
        scales = load_scale_set(STARTER / "quanttune_scales" / f"starter-{subject}.safetensors")
        prompts = [words + PLACES[i % len(PLACES)] for i in range(images)]
        reference = None
        for name, model in models.items():
            scaled = apply_scale_set(model, scales, 1.0, subject)[0]
            made = []
            for each in (scaled, model):
                pictures = generate(each, clip, vae, prompts, seed=4000)
                made.append((torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, 1),
                             outputs(each, clip, words)))
            reference = reference or made
            row = {"subject": subject, "base": name}
            for what, (pictures, out), (own, exact) in zip(("scaled", "plain"), made, reference):
                row[f"{what}_ssim"] = float(ssim(pictures.float(), own.float()).mean())
                row[f"{what}_error"] = float((out - exact).norm() / exact.norm())
            row["effect_ssim"] = float(ssim(made[0][0].float(), made[1][0].float()).mean())
            print(row, flush=True)
            rows.append(row)
    return rows


def outputs(model, clip, words: str):
    """The diffusion model's output at `TIMESTEPS`, one noise."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model])
    context = clip.encode_from_tokens(clip.tokenize(words))
    x = torch.randn(len(TIMESTEPS), 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return model.model.diffusion_model(
        x, torch.tensor(TIMESTEPS, dtype=torch.float32),
        context.expand(len(TIMESTEPS), -1, -1).float(),
        transformer_options=model.model_options["transformer_options"]).float().clone()


def table(rows: list[dict]) -> str:
    """Markdown, the mean of the subjects."""
    lines = ["| base | SSIM with scales | without | error with scales | without |",
             "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["base"] for row in rows):
        own = [row for row in rows if row["base"] == name]
        values = [sum(row[key] for row in own) / len(own) for key in (
            "scaled_ssim", "plain_ssim", "scaled_error", "plain_error")]
        lines.append(f"| {name} | {values[0]:.4f} | {values[1]:.4f} | {values[2]:.2g} | "
                     f"{values[3]:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
