"""The small upscaler's pictures: windows of scenes drawn four times as large, beside two small
versions of each and the words for it.

One small version is the mean of each 4 x 4 pixels. The other is the scene as drawn at 128 pixels
and passed through the starter's autoencoder, with the traces that generated pictures have.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .captions import describe
from .common import SEED
from .generator import SIZE, Scene, clutter, render, sample
from .upscaler_config import FACTOR

WINDOW = 64
"""Side of a window in pixels of the small picture."""
LARGE = SIZE * FACTOR
CAPTIONS = 2
"""Sentences a scene."""


@dataclass
class Pictures:
    """Windows and what belongs to them; arrays of equal length n.

    large: uint8 (n, 4 WINDOW, 4 WINDOW, 3); clean, made: the two small versions, uint8
    (n, WINDOW, WINDOW, 3); context: the sentences as the text encoder gives them, float16
    (n, CAPTIONS, tokens, 128), and in `empty` the empty prompt's (tokens, 128).
    """

    large: np.ndarray
    clean: np.ndarray
    made: np.ndarray
    context: np.ndarray
    empty: np.ndarray

    def detail(self) -> np.ndarray:
        """Sums of the small picture's differences over all rectangles from the upper left corner,
        float32 (n, WINDOW + 1, WINDOW + 1): what `places` chooses by."""
        grey = self.clean.astype(np.float32).mean(3)
        edges = np.zeros_like(grey)
        edges[:, 1:] += np.abs(np.diff(grey, axis=1))
        edges[:, :, 1:] += np.abs(np.diff(grey, axis=2))
        return np.pad(edges.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))


def scene_of(index: int) -> Scene:
    """Training scene number `index`; never a held-out triple."""
    return sample(SEED * 3_000_017 + index)


def shrink(picture: np.ndarray) -> np.ndarray:
    """The mean of each 4 x 4 pixels of a uint8 picture (h, w, 3), as uint8."""
    h, w, _ = picture.shape
    blocks = picture.reshape(h // FACTOR, FACTOR, w // FACTOR, FACTOR, 3).astype(np.float32)
    return (blocks.mean((1, 3)) + 0.5).astype(np.uint8)


@torch.inference_mode()
def through_starter(model: torch.nn.Module, pictures: np.ndarray) -> np.ndarray:
    """Pictures as the starter's autoencoder gives them back: uint8 (n, SIZE, SIZE, 3)."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    y = model.taesd_decoder(model.taesd_encoder(x)).clamp(0, 1)
    return (y * 255 + 0.5).byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def contexts(sentences: list[str]) -> np.ndarray:
    """What the starter's text encoder says of sentences: float16 (n, tokens, 128)."""
    from .common import ROOT
    from .load import load_clip

    clip = load_clip(str(ROOT / "clip.safetensors"))
    rows = [clip.encode_from_tokens(clip.tokenize(s))[0].half().cpu().numpy() for s in sentences]
    return np.stack(rows)


def draw(count: int, busy: int) -> Pictures:
    """Draw `count` scenes and `busy` pictures of many objects, which have no sentence."""
    from .shipped import restore_vae
    from .stage_vae import build

    starter = build()
    restore_vae(starter)
    rng = np.random.default_rng(SEED)
    sets, sentences = ([], [], []), []
    for i in range(count + busy):
        if i < count:
            scene = scene_of(i)
            large, small = render(scene, LARGE), render(scene)
            sentences += [describe(scene, int(rng.integers(2**31))) for _ in range(CAPTIONS)]
        else:
            seed = SEED * 17 + i
            large, small = clutter(seed, LARGE), clutter(seed)
            sentences += [""] * CAPTIONS
        y, x = rng.integers(0, SIZE - WINDOW + 1, 2)
        here = np.s_[y : y + WINDOW, x : x + WINDOW]
        sets[0].append(
            large[y * FACTOR : (y + WINDOW) * FACTOR, x * FACTOR : (x + WINDOW) * FACTOR].copy()
        )
        sets[1].append(shrink(large)[here])
        sets[2].append(through_starter(starter, small[None])[0][here])
    told = contexts([*sentences, ""])
    large, clean, made = (np.stack(part) for part in sets)
    return Pictures(
        large, clean, made, told[:-1].reshape(count + busy, CAPTIONS, *told.shape[1:]), told[-1]
    )


def pictures(work: Path, count: int, busy: int) -> Pictures:
    """The training pictures, drawn if the work folder does not hold them yet."""
    path = Path(work) / f"upscaler-pictures-{count}-{busy}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, **vars(draw(count, busy)))
        os.replace(part, path)
    with np.load(path) as file:
        return Pictures(**file)


def places(detail: np.ndarray, index: np.ndarray, side: int, rng: np.random.Generator):
    """Where to cut a square of `side` small pixels from each window of `index`: two int arrays
    (rows, columns). In two cases of three it is the most detailed of four random places, since
    most of a picture is flat."""
    y, x = rng.integers(0, detail.shape[1] - side, (2, 4, len(index)))
    rich = (
        detail[index, y + side, x + side] - detail[index, y, x + side]
        - detail[index, y + side, x] + detail[index, y, x]
    )  # fmt: skip
    best = np.where(rng.random(len(index)) < 2 / 3, rich.argmax(0), 0)
    each = np.arange(len(index))
    return y[best, each], x[best, each]


def cut(data: np.ndarray, index: np.ndarray, y, x, side: int, step: int = 1) -> torch.Tensor:
    """Squares of `side * step` pixels from uint8 windows (n, h, w, 3), as float (batch, 3, s, s)
    in -1..1; `y`, `x` and `side` in pixels of the small picture."""
    out = np.stack([
        data[i, a * step : (a + side) * step, b * step : (b + side) * step]
        for i, a, b in zip(index, y, x)
    ])  # fmt: skip
    return torch.from_numpy(out).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
