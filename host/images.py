"""Pictures for training from folders and graphs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from PIL import Image, ImageOps

from ..quant import QuantTuneError
from ..quant.errors import in_one_line
from ..quant.limits import is_finite
from ..training.buckets import bucket_of, told
from ..training.data import ROOM, TrainingImages, free_memory
from .captions import metadata_file, metadata_state, with_metadata, with_text_files
from .dataset_folder import dataset_files, dataset_pictures, is_dataset
from .lora_keys import brief
from .picture_file import SUFFIXES, UNREADABLE, Found, left_out, open_picture, picture_files

SUBJECTS = Path(__file__).resolve().parent.parent / "starter" / "subjects"
STARTER = "starter: "
FITS = ("centre crop", "keep shape")
CAPTIONS = ("text files", "one phrase", "none", "metadata.jsonl", "dataset column")
TEXT_FILES, ONE_PHRASE, NO_CAPTIONS, METADATA, DATASET = CAPTIONS
MOST_TOLD = 20
"""Sentences about what was left out that a report has."""


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
        names += [p.name for p in sorted(root.iterdir()) if p.is_dir() and _holds_pictures(p)]
    return names


def _holds_pictures(folder: Path) -> bool:
    try:
        return (any(f.suffix.lower() in SUFFIXES for f in folder.iterdir())
                or metadata_file(folder) is not None or is_dataset(folder))
    except OSError:
        return False  # one that may not be read


def folder_of(name: str) -> Path:
    """Folder of a name from `image_folders`, of one below the input folder, or a full path."""
    root = Path(folder_paths.get_input_directory())
    if name.startswith(STARTER):
        subject = name.removeprefix(STARTER)
        folder = SUBJECTS / subject if subject in os.listdir(SUBJECTS) else Path()
    else:
        folder = root / name.strip()
    if folder == Path() or not name.strip() or "\0" in name or not os.path.isdir(folder):
        raise QuantTuneError(f"The image folder '{brief(name)}' is not there; give a folder of the "
                             "input folder or a full path.")
    if not name.startswith(STARTER) and not is_local() and not _below(folder, root):
        raise QuantTuneError(f"The image folder '{brief(name)}' is not in the input folder, and "
                             "this ComfyUI can be reached from other computers (--listen); put the "
                             "pictures, or a link to their folder, into ComfyUI's input folder.")
    return folder


def _below(folder: Path, root: Path) -> bool:
    """Whether a folder is one of ``root``; a link in there belongs to who runs the computer."""
    folder, root = os.path.normpath(folder), os.path.normpath(root)
    return folder == root or folder.startswith(root + os.sep)


def is_local() -> bool:
    """Whether only this computer reaches ComfyUI, so that its user may read what it may read."""
    addresses = [a.strip() for a in str(args.listen or "").split(",")]
    return all(a in ("localhost", "::1") or a.startswith("127.") for a in addresses)


def folder_state(name: str, captions: str = TEXT_FILES) -> str:
    """What changes when a picture or caption of a folder does.

    With a list of metadata, folders below it count; of a dataset, the files with its rows.
    """
    folder = folder_of(name)
    if captions == DATASET:
        files: Iterable[Path] = dataset_files(folder)
    elif captions == METADATA and metadata_file(folder):
        files = metadata_state(folder)
    else:
        files = folder.iterdir()
    return str([(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns)
                for f in sorted(files) if f.is_file()])


def read_folder(name: str, captions: str = TEXT_FILES, phrase: str = "", resolution: int = 512,
                fit: str = "centre crop", prior: bool = False, caption_column: str = "text",
                limit: int = 0) -> Reading:
    """Read the pictures of a folder in the order of their names, of its list, or of its rows.

    Args:
        name: see `folder_of`.
        captions: of `CAPTIONS`: a text file beside each picture, ``phrase`` for all, none at all,
            the folder's metadata.jsonl (or .csv, .parquet), or a Hugging Face dataset. The phrase
            serves where a picture has no caption of its own, or an empty text file.
        phrase: words for a picture.
        resolution, fit: see `fitted`.
        prior: whether they are class images.
        caption_column: of metadata.jsonl or of the dataset; empty for pictures without captions.
        limit: the first so many that can be read, 0 for all.

    Raises:
        QuantTuneError: no readable picture, no caption where one is needed, more pictures than
            memory holds, or whatever `captions` and `dataset_folder` find wrong.
    """
    _check_settings(captions, fit, resolution, limit)
    folder, column = folder_of(name), caption_column.strip()
    pictures: list[torch.Tensor] = []
    texts: list[str] = []
    warnings: list[str] = []
    room, used = ROOM * free_memory(), 0
    for found in _found(folder, captions, column, warnings):
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            picture = fitted(open_picture(found.source), resolution, fit)
        except UNREADABLE as error:
            warnings.append(left_out(found.name, error))
            continue
        pictures.append(picture)
        texts.append(_caption(found, captions, phrase, column))
        used += picture.nbytes
        if used > room:
            raise QuantTuneError(
                f"The pictures of '{name}' do not fit into memory: the first {len(pictures):,} take"
                f" {used / 2**30:.1f} GiB; set a limit, or a smaller resolution.")
        if len(pictures) == limit:
            break
    if not pictures:
        raise _nothing(name, folder, captions, warnings)
    return Reading(TrainingImages(tuple(pictures), tuple(texts), subject_of(phrase, texts),
                                  (prior,) * len(pictures)), tuple(map(in_one_line, warnings)))


def _check_settings(captions: str, fit: str, resolution: int, limit: int) -> None:
    for what, value, known in (("captions", captions, CAPTIONS), ("fit", fit, FITS)):
        if value not in known:
            raise QuantTuneError(f"The setting {what} is {value!r}, but it has to be one of "
                                 f"{', '.join(repr(k) for k in known)}.")
    if not 64 <= resolution <= 4096 or resolution % 8:
        raise QuantTuneError(f"The resolution is {resolution}, but it has to be a multiple of 8 "
                             "from 64 to 4096.")
    if limit < 0:
        raise QuantTuneError(f"The limit is {limit}, but it has to be a number of pictures, or 0 "
                             "for all.")


def _found(folder: Path, captions: str, column: str, warnings: list[str]) -> Iterable[Found]:
    if captions == METADATA:
        return with_metadata(folder, column, warnings)
    if captions == DATASET:
        return dataset_pictures(folder, column, warnings)
    if captions == TEXT_FILES:
        return with_text_files(folder, warnings)
    return (Found(path.name, path, None, f"give a phrase, or set captions to '{NO_CAPTIONS}'")
            for path in picture_files(folder, warnings))


def _caption(found: Found, captions: str, phrase: str, column: str) -> str:
    if captions == NO_CAPTIONS:
        return ""
    if captions == TEXT_FILES and found.caption == "":
        return phrase.strip()
    if found.caption is not None:
        return found.caption
    if phrase.strip() or (captions in (METADATA, DATASET) and not column):
        return phrase.strip()
    raise QuantTuneError(f"{found.name} has no caption; {found.advice}.")


def _nothing(name: str, folder: Path, captions: str, warnings: Sequence[str]) -> QuantTuneError:
    """The error for a folder without a picture, with the kind of captions it seems to be for."""
    cause = f" ({warnings[0]})" if warnings else ""
    advice = f"put {', '.join(SUFFIXES)} files into it"
    if captions != DATASET and is_dataset(folder):
        advice = f"it is a dataset, so set captions to '{DATASET}'"
    elif captions != METADATA and metadata_file(folder):
        advice = f"it has a list of pictures, so set captions to '{METADATA}'"
    elif captions == DATASET:
        advice = "choose another dataset"
    return QuantTuneError(f"The folder '{name}' has no picture that can be read{cause}; {advice}.")


def subject_of(phrase: str, texts: Sequence[str]) -> str:
    """Words that name the subject: the phrase, or the words all captions begin with."""
    if phrase.strip():
        return phrase.strip()
    words = [t.split() for t in texts if t]
    common = os.path.commonprefix(words) if words else []
    return " ".join(common).strip(" ,")


def fitted(image: Image.Image, resolution: int, fit: str) -> torch.Tensor:
    """A picture of the training size: ``[H, W, 3]`` float32 in 0..1.

    fit: "centre crop" gives squares of ``resolution``; "keep shape" the bucket whose shape is
    nearest to the picture's (`training.buckets`). What sticks out is cut off at both ends alike.
    """
    size = (resolution, resolution)
    if fit != "centre crop":
        size = bucket_of(image.width, image.height, resolution)
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
    if not is_finite(batch):
        raise QuantTuneError("The connected images hold NaN or infinite values; check what makes "
                             "them.")
    pictures = [Image.fromarray((p[..., :3].cpu().float().clamp(0, 1) * 255).round().byte()
                                .numpy()) for p in batch]
    return TrainingImages(tuple(fitted(p, resolution, fit) for p in pictures), tuple(lines),
                          subject_of("", lines), (prior,) * len(pictures))


def as_image(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as the host's IMAGE ``[1, H, W, 3]``."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def report(images: TrainingImages, warnings: Sequence[str] = ()) -> str:
    """How many pictures there are, of which shapes, and what was left out."""
    lines = [f"{len(images.images)} images"]
    shapes = told(images.images)
    if shapes:
        lines += [shapes, "A batch holds pictures of one bucket; where a bucket has fewer, they "
                          "repeat in it."]
    lines += warnings[:MOST_TOLD]
    if len(warnings) > MOST_TOLD:
        lines.append(f"and {len(warnings) - MOST_TOLD} more were left out")
    return "\n".join(lines)


def contact_sheet(images: TrainingImages, count: int = 24, columns: int = 6) -> Image.Image:
    """Small pictures of what will be trained on, with their captions."""
    from ..metrics.charts import picture_grid

    pictures = [Image.fromarray((p * 255).round().byte().numpy()) for p in images.images[:count]]
    if len({p.size for p in pictures}) > 1:
        side = max(max(p.size) for p in pictures)
        pictures = [ImageOps.pad(p, (side, side), color="white") for p in pictures]
    columns = min(columns, len(pictures))
    pictures += [Image.new("RGB", pictures[0].size, "white")] * (-len(pictures) % columns)
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    captions = [images.captions[i:i + columns] for i in range(0, len(rows) * columns, columns)]
    labels = [c[0] if len(set(c)) == 1 else " · ".join(c) for c in captions]
    return picture_grid(rows, labels, cell=160)
