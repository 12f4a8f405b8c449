"""Class images for prior preservation, made once by the base model and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from PIL import Image

from ..quant import QuantTuneError
from ..training.data import TrainingImages
from .encode import identity_of, reader_of
from .identity import identity_of as model_identity
from .images import fitted
from .picture_file import UNREADABLE, open_picture, write_png
from .pictures import SamplingSettings, sample_pictures

FOLDER = "quanttune_class_images"
"""Folder of the host's output folder."""


def class_images(patcher, clip, vae, prompt: str, count: int,
                 settings: SamplingSettings) -> TrainingImages:
    """``count`` pictures of ``prompt`` by the base model, those already on disk read from there.

    An interrupt keeps what is done. Raises QuantTuneError for an empty prompt.
    """
    if not prompt.strip():
        raise QuantTuneError("The class prompt is empty; name the kind of thing that the subject "
                             "is, such as 'a photo of a dog'.")
    folder = _folder(patcher, clip, vae, prompt, settings)
    bar = comfy.utils.ProgressBar(count)
    pictures = []
    for index in range(count):
        path = folder / f"{index:05}.png"
        picture = _read(path)
        if picture is None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            one = SamplingSettings(**{**settings.__dict__, "seed": settings.seed + index})
            pixels = sample_pictures(patcher, clip, vae, [prompt], one)[0].numpy()
            picture = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
            _write(picture, path)
        pictures.append(fitted(picture, settings.width, "centre crop"))
        bar.update_absolute(index + 1, count, ("JPEG", picture, 512))
    return TrainingImages(tuple(pictures), (prompt.strip(),) * count, "", (True,) * count)


def _folder(patcher, clip, vae, prompt: str, settings: SamplingSettings) -> Path:
    """A folder of its own for each model, text encoder, VAE, prompt and way of sampling."""
    model = model_identity(patcher), reader_of(patcher, clip), identity_of(patcher, vae)
    shape = {k: v for k, v in settings.__dict__.items() if k != "seed"}
    key = hashlib.sha256(repr((model, prompt, shape, settings.seed)).encode()).hexdigest()[:16]
    words = "".join(c if c.isalnum() else "-" for c in prompt.strip())[:40].strip("-") or "class"
    return Path(folder_paths.get_output_directory()) / FOLDER / f"{words}-{key}"


def _read(path: Path) -> Image.Image | None:
    try:
        return open_picture(path)
    except UNREADABLE:
        return None


def _write(picture: Image.Image, path: Path) -> None:
    try:
        write_png(picture, path)
    except OSError as error:
        raise QuantTuneError(f"The class image {path} could not be written "
                             f"({error.strerror or error}); free some space.") from error
