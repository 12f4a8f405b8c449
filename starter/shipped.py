"""Start a stage from the shipped files, to go on training without the first run's checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from .common import ROOT


def restore_unet(unet: torch.nn.Module, text: torch.nn.Module, folder: Path = ROOT) -> None:
    """Put the shipped diffusion model and text encoder into modules built for training.

    Raises RuntimeError when the architecture or the vocabulary has changed since.
    """
    unet.load_state_dict(load_file(folder / "unet.safetensors"))
    state = load_file(folder / "clip.safetensors")
    state.pop("token_ids")
    state["text_model.embeddings.token_embedding.weight"] = state.pop("token_rows")
    text.model.load_state_dict(state)


def restore_vae(vae: torch.nn.Module, folder: Path = ROOT) -> None:
    """Put the shipped autoencoder into a module built for training."""
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
