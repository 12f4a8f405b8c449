"""Measure the shipped starter model through the host: `python starter/evaluate.py [options]`.

Draws held-out prompts (triples of shape, colour and background that no training picture shows),
samples a picture for each with the host's own text encoder, sampler and decoder, and lets the
classifier read the pictures. Prints and writes the share that obeys, with chance beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    import runpy

    runpy.run_module("quanttune.starter.evaluate", run_name="__main__", alter_sys=True)
    raise SystemExit

from .captions import describe
from .classifier import ATTRIBUTES, load_classifier
from .generator import Scene, sample

FIRST_PROMPT = 5_000_000
"""Seed of the first held-out prompt."""


def held_out_prompts(count: int) -> list[tuple[Scene, str]]:
    """Scenes of held-out triples, each with a complete sentence."""
    scenes = [sample(FIRST_PROMPT + i, held=True) for i in range(count)]
    return [(s, describe(s, FIRST_PROMPT + i, complete=True)) for i, s in enumerate(scenes)]


def generate(
    model,
    clip,
    vae,
    prompts: list[str],
    seed: int = 0,
    steps: int = 20,
    cfg: float = 5.0,
    sampler: str = "dpmpp_2m",
    scheduler: str = "karras",
    batch: int = 20,
) -> np.ndarray:
    """Pictures for prompts through the host: float32 (n, 128, 128, 3) in 0..1.

    Prompts share a batch by one concatenated conditioning per picture; picture i starts from the
    noise of seed + i, so it does not depend on the batch.
    """
    import comfy.sample
    import torch

    def condition(texts):
        parts = [clip.encode_from_tokens(clip.tokenize(t), return_pooled=True) for t in texts]
        length = max(c.shape[1] for c, _ in parts)
        stacked = torch.cat([c.repeat(1, length // c.shape[1], 1) for c, _ in parts])
        return [[stacked, {"pooled_output": torch.cat([p for _, p in parts])}]]

    pictures = []
    with torch.inference_mode():
        for start in range(0, len(prompts), batch):
            texts = prompts[start : start + batch]
            empty = torch.zeros(1, 4, 16, 16)
            noise = torch.cat(
                [comfy.sample.prepare_noise(empty, seed + start + i) for i in range(len(texts))]
            )
            latent = comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, condition(texts),
                condition([""] * len(texts)), torch.zeros_like(noise), seed=seed,
                disable_pbar=True,
            )  # fmt: skip
            pictures.append(vae.decode(latent).float().cpu().numpy())
    return np.concatenate(pictures)


def obedience(scenes: list[Scene], pictures: np.ndarray, classifier=None) -> dict[str, float]:
    """Share of pictures that show what their scene says, per attribute; `all` of the first three.

    pictures: (n, 128, 128, 3) in 0..1.
    """
    said = (classifier or load_classifier()).read(pictures)
    table = {
        name: [answer[name] == getattr(s, name) for s, answer in zip(scenes, said)]
        for name in ATTRIBUTES
    }
    result = {name: float(np.mean(right)) for name, right in table.items()}
    both = np.all([table[n] for n in ("shape", "colour", "background")], axis=0)
    return {**result, "all": float(both.mean())}


def chance(scenes: list[Scene]) -> dict[str, float]:
    """What always answering the most frequent value of these scenes would score."""
    result = {}
    for name in ATTRIBUTES:
        values = [getattr(s, name) for s in scenes]
        result[name] = max(values.count(v) for v in values) / len(values)
    return result


def main(argv: list[str] | None = None) -> None:
    """Run the measurement and write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="default: results.json in the folder")
    parser.add_argument("--pictures", type=Path, help="also save a contact sheet here")
    args = parser.parse_args(argv)
    from .common import prepare_host

    prepare_host(args.device)
    import torch

    from .load import load_starter
    from .stage_classifier import accuracy

    with torch.inference_mode():
        parts = load_starter(folder=args.folder)
    prompts = held_out_prompts(args.count)
    scenes = [s for s, _ in prompts]
    pictures = generate(
        *parts,
        [text for _, text in prompts],
        args.seed,
        args.steps,
        args.cfg,
        args.sampler,
        args.scheduler,
    )
    classifier = load_classifier(args.folder)
    keys = ("count", "steps", "cfg", "sampler", "scheduler", "seed")
    result = {
        "settings": {k: getattr(args, k) for k in keys},
        "obedience": obedience(scenes, pictures, classifier),
        "chance": chance(scenes),
        "classifier_accuracy": accuracy(classifier),
    }
    text = json.dumps(result, indent=2)
    print(text)
    (args.out or args.folder / "results.json").write_text(text + "\n", encoding="utf-8")
    if args.pictures:
        save_sheet(pictures[:60], args.pictures)


def save_sheet(pictures: np.ndarray, path: Path, columns: int = 10) -> None:
    """Save pictures (n, h, w, 3) in 0..1 as one image."""
    from PIL import Image

    n, h, w, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (h + 4), columns * (w + 4), 3), np.float32)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (h + 4), i % columns * (w + 4)
        sheet[top : top + h, left : left + w] = picture
    Image.fromarray((sheet.clip(0, 1) * 255 + 0.5).astype(np.uint8)).save(path)


if __name__ == "__main__":
    main()
