"""Where the SD x4 upscaler's folder comes from, and its files."""

from __future__ import annotations

from pathlib import Path

from .diffusers_files import ModelFolder

MODEL = "stabilityai/stable-diffusion-x4-upscaler"
"""Where a folder of the upscaler comes from; it is named in messages, never fetched."""


def upscaler_folder(path: Path) -> ModelFolder:
    """The folder of an upscaler, with what to say when it is not whole."""
    return ModelFolder(path, "upscaler folder", f"download {MODEL} into this folder again")
