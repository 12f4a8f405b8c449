"""One picture from a file or from bytes: found, opened, made upright and opaque; and written."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..quant import QuantTuneError
from ..quant.safe_file import refuse_pipe

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_PICTURES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".psd", ".svg")
"""Kinds of pictures that are not read, which is said rather than passed over."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
"""What Pillow may take a picture for; some of the others start programs."""
SMALLEST, LARGEST = 8, 100_000_000
"""Least side, and most pixels, of a picture that is read."""
UNREADABLE = (OSError, UnidentifiedImageError, ValueError, SyntaxError, EOFError, IndexError,
              OverflowError, struct.error, Image.DecompressionBombError)
"""What `open_picture` raises for a file that is no picture, or a damaged one."""


@dataclass(frozen=True)
class Found:
    """A picture that was found and not opened yet.

    Attributes:
        name: for messages.
        source: its file, or what such a file would hold.
        caption: None if there is none; "" is one that says nothing.
        advice: what to do about a missing caption.
    """

    name: str
    source: Path | bytes
    caption: str | None = None
    advice: str = ""


def picture_files(folder: Path, warnings: list[str] | None = None) -> list[Path]:
    """Files of a folder that are read as pictures, in the order of their names.

    A sentence for each picture of a kind that is not read goes to ``warnings``.
    """
    paths = sorted(folder.iterdir())
    if warnings is not None:
        warnings += [other_kind(p.name) for p in paths if p.suffix.lower() in OTHER_PICTURES]
    return [p for p in paths if p.suffix.lower() in SUFFIXES]


def inside(folder: Path, name: str, where: str) -> Path:
    """The file that a list in ``folder`` calls ``name``, in the folder or in one below it.

    Raises QuantTuneError for a name that leads out of the folder; ``where`` names the list.
    """
    kinds = PurePosixPath(name), PureWindowsPath(name)
    if not name.strip() or "\0" in name or any(p.anchor or ".." in p.parts for p in kinds):
        raise QuantTuneError(f"{where} names the file {name!r}, which may lie outside of the "
                             "folder; write a path that begins in the folder.")
    return folder / name


def other_kind(name: str) -> str:
    """The sentence for a picture of a kind that is not read."""
    return f"{name} was left out: convert it to .png or .jpg"


def left_out(name: str, error: Exception) -> str:
    """The sentence for a picture that could not be read."""
    reason = getattr(error, "strerror", None) or str(error).split("'")[0].strip()
    if isinstance(error, UnidentifiedImageError):
        reason = "it is no picture, or one of an unknown kind"
    return f"{name} was left out: {reason or type(error).__name__}"


def open_picture(source: Path | bytes) -> Image.Image:
    """An RGB picture, turned upright, transparency over white; raises one of `UNREADABLE`."""
    if not isinstance(source, bytes):
        refuse_pipe(source)
    opened = BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(opened, formats=FORMATS) as image:
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


def write_png(picture: Image.Image, path: Path, **options) -> None:
    """Write ``path``, never half; ``options`` are Pillow's. Raises OSError and leaves nothing."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part, format="PNG", **options)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits, which PIL would cut off at 255, in 8; others as they are."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
