"""Measure the shipped small upscaler through the host: `python starter/upscaler_evaluate.py`.

Draws held-out scenes at 512 pixels, makes them small in two ways (4 x 4 means, and the scene drawn
at 128 pixels passed through the starter's autoencoder), upscales them with the host's own sampler
and decoder, and compares with the drawn 512 pixels. Beside it bicubic enlargement, and what is left
of the 512 pixels after the upscaler's autoencoder alone: no result of the model can be expected to
be nearer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

if __package__ in (None, ""):
    import runpy

    runpy.run_module("quanttune.starter.upscaler_evaluate", run_name="__main__", alter_sys=True)
    raise SystemExit

from .captions import describe
from .classifier import Classifier, load_classifier
from .generator import SIZE, render, sample
from .upscaler_config import FACTOR, FILE, MAX_LEVEL, SETTINGS

FIRST = 6_000_000
"""Seed of the first held-out scene."""
LAYERS = (1, 2, 4)
"""The classifier's layers that are compared: a quarter, a quarter and an eighth of the side."""


def held_out(count: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Scenes of held-out triples: sentences, pictures (n, 512, 512, 3) and the same scenes drawn
    at 128 pixels (n, 128, 128, 3), in 0..1."""
    scenes = [sample(FIRST + i, held=True) for i in range(count)]
    told = [describe(s, FIRST + i, complete=True) for i, s in enumerate(scenes)]
    large, small = (
        torch.from_numpy(np.stack([render(s, side) for s in scenes])).float() / 255
        for side in (SIZE * FACTOR, SIZE)
    )
    return told, large, small


def resize(pictures: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """Pictures (n, h, w, 3) at another side; `mode` as for `torch.nn.functional.interpolate`."""
    x = F.interpolate(pictures.permute(0, 3, 1, 2), size=(side, side), mode=mode)
    return x.clamp(0, 1).permute(0, 2, 3, 1)


@torch.inference_mode()
def upscale(
    parts: tuple,
    small: torch.Tensor,
    prompts: list[str],
    *,
    steps: int = SETTINGS["steps"],
    cfg: float = SETTINGS["cfg"],
    noise_level: int = SETTINGS["noise_level"],
    sampler: str = SETTINGS["sampler"],
    scheduler: str = SETTINGS["scheduler"],
    seed: int = 0,
) -> torch.Tensor:
    """Pictures (n, h, w, 3) in 0..1 at four times the side, through the host, one at a time.

    parts: what `load_starter_upscaler` gives. noise_level: 0 to `MAX_LEVEL`.
    """
    import comfy.sample

    model, clip, vae = parts
    pictures = []
    for number, (picture, prompt) in enumerate(zip(small, prompts)):
        more = {
            "concat_image": picture.movedim(-1, 0)[None] * 2 - 1,
            "noise_augmentation": noise_level / MAX_LEVEL,
        }
        conditions = []
        for text in (prompt, ""):
            told, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
            conditions.append([[told, {"pooled_output": pooled, **more}]])
        latent = torch.zeros(1, 4, *picture.shape[:2])
        noise = comfy.sample.prepare_noise(latent, seed + number)
        latent = comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, *conditions, latent,
            seed=seed + number, disable_pbar=True,
        )  # fmt: skip
        pictures.append(vae.decode(latent).float().cpu())
    return torch.cat(pictures)


def psnr(pictures: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio in dB of each picture (n, h, w, 3) in 0..1: (n,)."""
    error = (pictures - truth).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


@torch.inference_mode()
def feature_distance(pictures: torch.Tensor, truth: torch.Tensor, judge: Classifier) -> float:
    """How far pictures look from the truth: the form of LPIPS (Zhang et al. 2018, squared distance
    of unit-length features at every place, summed over layers) with the layers of the starter's
    classifier instead of a photograph network's, unweighted. Pictures (n, h, w, 3) in 0..1."""
    total = 0.0
    for one, other in zip(pictures, truth):
        x = torch.stack([one, other]).permute(0, 3, 1, 2) * 2 - 1
        for number, layer in enumerate(judge.body):
            x = layer(x)
            if number in LAYERS:
                a, b = F.normalize(x, dim=1)
                total += float((a - b).square().sum(0).mean())
    return total / len(pictures)


def measure(
    parts: tuple, count: int, *, seed: int, **settings
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Figures by kind of small picture and method, and the pictures they are of."""
    from .load import load_vae

    told, truth, drawn = held_out(count)
    judge, vae = load_classifier(), parts[2]
    with torch.inference_mode():
        starter = load_vae(str(FILE.parents[1] / "vae.safetensors"))
        kept = torch.cat([vae.decode(vae.encode(p[None])).float().cpu() for p in truth])
        made = starter.decode(starter.encode(drawn)).float().cpu()
    small = {"means": resize(truth, SIZE, "area"), "starter": made}
    shown, seconds = {"truth": truth, "round trip": kept}, []
    for kind, pictures in small.items():
        bicubic, ours = resize(pictures, SIZE * FACTOR, "bicubic"), []
        for i in range(count):
            start = time.monotonic()
            more = {"seed": seed + i, **settings}
            ours.append(upscale(parts, pictures[i : i + 1], told[i : i + 1], **more))
            seconds.append(time.monotonic() - start)
            pair = (psnr(p, truth[i : i + 1]).item() for p in (bicubic[i : i + 1], ours[-1]))
            print(kind, told[i], *(round(p, 2) for p in pair), flush=True)
        shown |= {f"{kind}: small": pictures, f"{kind}: bicubic": bicubic}
        shown[f"{kind}: ours"] = torch.cat(ours)
    figures = {
        name: {
            "psnr": round(float(psnr(pictures, truth).mean()), 2),
            "feature_distance": round(feature_distance(pictures, truth, judge), 4),
        }
        for name, pictures in shown.items()
        if pictures.shape == truth.shape and name != "truth"
    }
    for kind in small:
        gain = psnr(shown[f"{kind}: ours"], truth) - psnr(shown[f"{kind}: bicubic"], truth)
        figures[f"{kind}: ours"]["nearer_than_bicubic"] = int((gain > 0).sum())
    return figures | {"seconds_a_picture": round(float(np.median(seconds)), 1)}, shown


def sheet(shown: dict[str, torch.Tensor], kind: str, rows: list[int]) -> np.ndarray:
    """One picture a row: small (every pixel as a square), bicubic, ours, the truth; uint8."""
    side = SIZE * FACTOR
    columns = (
        resize(shown[f"{kind}: small"], side, "nearest"), shown[f"{kind}: bicubic"],
        shown[f"{kind}: ours"], shown["truth"],
    )  # fmt: skip
    cells = [torch.cat([column[i] for column in columns], 1) for i in rows]
    return (torch.cat(cells) * 255 + 0.5).clamp(0, 255).byte().numpy()


def main(argv: list[str] | None = None) -> None:
    """Run the measurement and write `upscale/results.json` and `upscale/samples.jpg`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--cfg", type=float, default=SETTINGS["cfg"])
    parser.add_argument("--noise-level", type=int, default=SETTINGS["noise_level"])
    parser.add_argument("--sampler", default=SETTINGS["sampler"])
    parser.add_argument("--scheduler", default=SETTINGS["scheduler"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=FILE.parent, help="folder to write to")
    parser.add_argument("--sheet", type=Path, help="also save all pictures, full size, here")
    args = parser.parse_args(argv)
    from PIL import Image

    from .common import prepare_host

    prepare_host(args.device)
    from .load_upscaler import load_starter_upscaler

    with torch.inference_mode():
        parts = load_starter_upscaler(args.file)
    keys = ("steps", "cfg", "noise_level", "sampler", "scheduler", "seed")
    settings = {k: getattr(args, k) for k in keys}
    figures, shown = measure(parts, args.count, **settings)
    text = json.dumps({"settings": {"count": args.count, **settings}, **figures}, indent=2)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(text + "\n", encoding="utf-8")
    rows = list(range(min(3, args.count)))
    small = Image.fromarray(sheet(shown, "means", rows))
    small.resize((small.width // 2, small.height // 2), Image.LANCZOS).save(
        args.out / "samples.jpg", quality=88
    )
    if args.sheet:
        both = [sheet(shown, kind, list(range(args.count))) for kind in ("means", "starter")]
        Image.fromarray(np.concatenate(both)).save(args.sheet)


if __name__ == "__main__":
    main()
