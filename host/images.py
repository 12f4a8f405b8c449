"""Pictures for training from folders and graphs."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..quant import QuantTuneError
from ..training.data import TrainingImages

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_PICTURES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".psd", ".svg")
"""Kinds of pictures that are not read, which is said rather than passed over."""
SUBJECTS = Path(__file__).resolve().parent.parent / "starter" / "subjects"
STARTER = "starter: "
FITS = ("centre crop", "keep shape")
CAPTIONS = ("text files", "one phrase", "none")
SMALLEST, LARGEST = 8, 100_000_000
"""Least side, and most pixels, of a picture that is read."""
UNREADABLE = (OSError, UnidentifiedImageError, ValueError, SyntaxError,
              Image.DecompressionBombError)
"""What `open_picture` raises for a file that is no picture, or a damaged one."""


@dataclass(frozen=True)
class Reading:
    """What a folder gave.

    Attributes:
        images: pictures and captions.
        warnings: a sentence for each file that was left out.
    """

    images: TrainingImages
    warnings: tuple[str, ...]


def image_folders() -> list[str]:
    """The starter's subjects, and the folders of the host's input folder that hold pictures."""
    names = [STARTER + p.name for p in sorted(SUBJECTS.iterdir()) if p.is_dir()]
    root = Path(folder_paths.get_input_directory())
    if root.is_dir():
        names += [p.name for p in sorted(root.iterdir())
                  if p.is_dir() and any(f.suffix.lower() in SUFFIXES for f in p.iterdir())]
    return names


def folder_of(name: str) -> Path:
    """Folder of a name from `image_folders`, of one below the input folder, or a full path."""
    if name.startswith(STARTER):
        folder = SUBJECTS / name.removeprefix(STARTER)
    else:
        folder = Path(folder_paths.get_input_directory()) / name.strip()
    if not name.strip() or "\0" in name or not folder.is_dir():
        raise QuantTuneError(f"The image folder '{name}' is not there; give a folder of the input "
                             "folder or a full path.")
    return folder


def folder_state(name: str) -> str:
    """What changes when a picture or caption of a folder does."""
    files = sorted(folder_of(name).iterdir())
    return str([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()])


def read_folder(name: str, captions: str = "text files", phrase: str = "", resolution: int = 512,
                fit: str = "centre crop", prior: bool = False) -> Reading:
    """Read all pictures of a folder in the order of their names.

    Args:
        name: see `folder_of`.
        captions: of `CAPTIONS`: a text file beside each picture (``phrase`` where there is none),
            ``phrase`` for all, or none at all.
        phrase: words for a picture.
        resolution, fit: see `fitted`.
        prior: whether they are class images.

    Raises:
        QuantTuneError: no readable picture, or no caption where one is needed.
    """
    for what, value, known in (("captions", captions, CAPTIONS), ("fit", fit, FITS)):
        if value not in known:
            raise QuantTuneError(f"The setting {what} is {value!r}, but it has to be one of "
                                 f"{', '.join(repr(k) for k in known)}.")
    if not 64 <= resolution <= 4096 or resolution % 8:
        raise QuantTuneError(f"The resolution is {resolution}, but it has to be a multiple of 8 "
                             "from 64 to 4096.")
    folder = folder_of(name)
    pictures, texts, warnings = [], [], []
    for path in picture_files(folder, warnings):
        try:
            picture = fitted(open_picture(path), resolution, fit)
        except UNREADABLE as error:
            warnings.append(left_out(path, error))
            continue
        pictures.append(picture)
        texts.append(_caption(path, captions, phrase))
    if not pictures:
        cause = f" ({warnings[0]})" if warnings else ""
        raise QuantTuneError(
            f"The folder '{name}' has no picture that can be read{cause}; put {', '.join(SUFFIXES)}"
            " files into it.")
    return Reading(TrainingImages(tuple(pictures), tuple(texts), subject_of(phrase, texts),
                                  (prior,) * len(pictures)), tuple(warnings))


def subject_of(phrase: str, texts: Sequence[str]) -> str:
    """Words that name the subject: the phrase, or the words all captions begin with."""
    if phrase.strip():
        return phrase.strip()
    words = [t.split() for t in texts if t]
    common = os.path.commonprefix(words) if words else []
    return " ".join(common).strip(" ,")


def picture_files(folder: Path, warnings: list[str] | None = None) -> list[Path]:
    """Files of a folder that are read as pictures, in the order of their names.

    A sentence for each picture of a kind that is not read goes to ``warnings``.
    """
    paths = sorted(folder.iterdir())
    if warnings is not None:
        warnings += [f"{p.name} was left out: convert it to .png or .jpg" for p in paths
                     if p.suffix.lower() in OTHER_PICTURES]
    return [p for p in paths if p.suffix.lower() in SUFFIXES]


def left_out(path: Path, error: Exception) -> str:
    """The sentence for a file that could not be read."""
    reason = str(error).split("'")[0].strip() or type(error).__name__
    return f"{path.name} was left out: {reason}"


def open_picture(path: Path) -> Image.Image:
    """An RGB picture, turned upright, transparency over white; raises one of `UNREADABLE`."""
    with Image.open(path) as image:
        if image.width * image.height > LARGEST:
            raise ValueError("it has too many pixels")
        image = _eight_bits(ImageOps.exif_transpose(image))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if min(image.size) < SMALLEST:
        raise ValueError(f"it is only {image.width} x {image.height} pixels")
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits, which PIL would cut off at 255, in 8; others as they are."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))


def _caption(path: Path, captions: str, phrase: str) -> str:
    if captions == "none":
        return ""
    if captions == "text files":
        beside = path.with_suffix(".txt")
        if beside.is_file():
            return " ".join(_text(beside).split())
    if not phrase.strip():
        raise QuantTuneError(
            f"The picture {path.name} has no caption; write {path.stem}.txt beside it, give a "
            "phrase, or set captions to 'none'.")
    return phrase.strip()


def _text(path: Path) -> str:
    """A text file as editors write it: UTF-8, or UTF-16 with its mark."""
    raw = path.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def fitted(image: Image.Image, resolution: int, fit: str) -> torch.Tensor:
    """A picture of the training size: ``[H, W, 3]`` float32 in 0..1.

    fit: "centre crop" gives squares of ``resolution``; "keep shape" keeps the picture's own shape
    at about ``resolution ** 2`` pixels, sides being multiples of 64 (of 8 below 256).
    """
    if fit == "centre crop":
        size = (resolution, resolution)
    else:
        unit = 8 if resolution < 256 else 64
        shape = min(max(image.width / image.height, 1 / 3), 3)
        size = tuple(max(unit, round(resolution * f / unit) * unit)
                     for f in (math.sqrt(shape), 1 / math.sqrt(shape)))
    image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, np.float32) / 255)


def from_batch(batch: torch.Tensor, phrase: str, resolution: int, fit: str,
               prior: bool = False) -> TrainingImages:
    """An IMAGE batch ``[n, H, W, 3]`` with one phrase, or a line of it for each image."""
    lines = [line.strip() for line in phrase.splitlines() if line.strip()] or [""]
    if len(lines) == 1:
        lines = lines * len(batch)
    if len(lines) != len(batch):
        raise QuantTuneError(f"There are {len(batch)} images and {len(lines)} lines of captions; "
                             "write one line for each image, or a single one for all.")
    if not torch.isfinite(batch).all():
        raise QuantTuneError("The connected images hold NaN or infinite values; check what makes "
                             "them.")
    pictures = [Image.fromarray((p[..., :3].cpu().float().clamp(0, 1) * 255).round().byte()
                                .numpy()) for p in batch]
    return TrainingImages(tuple(fitted(p, resolution, fit) for p in pictures), tuple(lines),
                          subject_of("", lines), (prior,) * len(pictures))


def as_image(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as the host's IMAGE ``[1, H, W, 3]``."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def contact_sheet(images: TrainingImages, count: int = 24) -> Image.Image:
    """Small pictures of what will be trained on, with their captions."""
    from ..metrics.charts import picture_grid

    pictures = [(p * 255).round().byte().numpy() for p in images.images[:count]]
    columns = min(6, len(pictures))
    blank = np.full_like(pictures[0], 255)
    pictures += [blank] * (-len(pictures) % columns)
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    labels = [" · ".join(images.captions[i:i + columns]) for i in
              range(0, len(rows) * columns, columns)]
    return picture_grid(rows, labels, cell=160)
