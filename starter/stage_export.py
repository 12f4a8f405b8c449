"""Stage 6: the shipped files, fp16 safetensors, from the stages' averaged weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .common import ROOT, SEED
from .config import UNET
from .generator import render, sample
from .parallel import bind_average
from .stage_classifier import build as build_classifier
from .stage_classifier import calibrate
from .stage_unet import build_unet
from .stage_vae import finished
from .text import TextEncoder, Vocabulary

LICENCE = "Apache-2.0"


def averaged(work: Path, stage: str, modules: list[torch.nn.Module]) -> bool:
    """Put a stage's averaged weights in its modules; False when the stage has not run."""
    path = Path(work) / f"{stage}.ckpt"
    if path.exists():
        bind_average(modules, torch.load(path, weights_only=True, map_location="cpu"))
    return path.exists()


def write(state: dict, path: Path, **metadata: str) -> None:
    """Save fp16 (integers as they are) with metadata."""
    half = {
        k: (v.detach().half() if v.is_floating_point() else v).cpu().contiguous()
        for k, v in state.items()
    }
    save_file(half, path, {"format": "pt", "licence": LICENCE, **metadata})
    path.chmod(0o644)
    print(path.name, round(path.stat().st_size / 1e6, 2), "MB")


def export(work: Path, folder: Path = ROOT) -> None:
    """Write the files of the stages that have run in `work` into `folder`; others stay."""
    unet, vocabulary = build_unet(), Vocabulary()
    text = TextEncoder(len(vocabulary.ids))
    if averaged(work, "unet", [unet, text]):
        write(unet.state_dict(), folder / "unet.safetensors", unet_config=json.dumps(UNET))
        state = text.model.state_dict()
        state["token_rows"] = state.pop("text_model.embeddings.token_embedding.weight")
        state["token_ids"] = torch.tensor(vocabulary.ids[1:], dtype=torch.int32)
        write(state, folder / "clip.safetensors")
    vae = finished(work)
    vae.taesd_encoder.requires_grad_(False)
    refined = averaged(work, "decoder", [vae])
    if refined or (Path(work) / "vae.ckpt").exists():
        write(vae.state_dict(), folder / "vae.safetensors")
    classifier = build_classifier()
    if averaged(work, "classifier", [classifier]):
        calibrate(classifier, np.stack([render(sample(SEED + i, held=None)) for i in range(1024)]))
        write(classifier.state_dict(), folder / "classifier.safetensors")
