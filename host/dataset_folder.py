"""Pictures and captions of a Hugging Face `datasets` folder, read row by row through Arrow.

No code of a dataset is run, and no more than a few rows are in memory at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..quant import QuantTuneError
from .arrow_rows import arrow, damaged, is_text, rows
from .captions import WAYS_OUT, missing_column, words_of
from .picture_file import Found, inside

DICT, STATE = "dataset_dict.json", "state.json"
"""What `save_to_disk` writes beside a set of splits, and beside the rows of one."""
KINDS = (".arrow", ".parquet")
PLACES = ("", "data", "train")
"""Where shards lie: in the folder, or as on the Hub in one of these below it."""


def is_dataset(folder: Path) -> bool:
    """Whether a folder looks like a dataset; metadata.parquet alone makes none."""
    return any((folder / name).is_file() for name in (DICT, STATE)) or bool(_shards(folder))


def dataset_files(folder: Path) -> list[Path]:
    """The shards of a dataset folder, in order; its 'train' split if it has several.

    Raises QuantTuneError for a folder that is no dataset, or not a whole one.
    """
    if (folder / DICT).is_file():
        names = _json(folder / DICT).get("splits")
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise damaged(folder / DICT, "it lists no splits")
        if len(names) > 1 and "train" not in names:
            raise QuantTuneError(f"The dataset {folder.name} has the splits {', '.join(names)} and "
                                 "none called train; give the folder of one of them.")
        split = inside(folder, "train" if "train" in names else names[0], f"{DICT}")
        if not os.path.isdir(split):  # Path.is_dir raises for a name that is too long
            raise QuantTuneError(f"The dataset {folder.name} lacks the folder of its split "
                                 f"{split.name[:100]}; copy or download it again.")
        folder = split
    if not (folder / STATE).is_file():
        found = _shards(folder)
    else:
        state = _json(folder / STATE)
        if state.get("_indices_data_files"):
            raise QuantTuneError(f"The dataset {folder.name} was saved by an old version of "
                                 "datasets, with its rows in another order; save it again with a "
                                 "new one.")
        files = state.get("_data_files")
        if not isinstance(files, list):
            raise damaged(folder / STATE, "it lists no files")
        names = [f.get("filename") if isinstance(f, dict) else None for f in files]
        found = [inside(folder, str(name), f"{STATE} of {folder.name}") for name in names]
        for path in found:
            if not os.path.isfile(path):
                raise QuantTuneError(f"The dataset {folder.name} lacks its file "
                                     f"{path.name[:100]}; copy "
                                     "or download it again.")
    if not found:
        raise QuantTuneError(f"The folder {folder.name} is no dataset: it has neither {STATE} nor "
                             ".arrow or .parquet files, nor a folder data with some; choose "
                             "another kind of captions.")
    return found


def dataset_pictures(folder: Path, column: str, warnings: list[str]) -> Iterator[Found]:
    """Pictures in the order of the rows.

    Args:
        folder: written by ``save_to_disk``, or with .parquet files as on the Hub.
        column: of the captions; empty for none.
        warnings: gets a sentence for each row without a picture.

    Raises:
        QuantTuneError: no dataset, a damaged file, no column of pictures or no such column of
            texts.
    """
    number = 0
    for path in dataset_files(folder):
        for row in rows(path, lambda schema, path=path: _columns(schema, column, path)):
            number += 1
            image, *captions = row.values()
            where = f"Row {number} of the dataset {folder.name}"
            found = _bytes(image, path.parent, where)
            if found is None:
                warnings.append(f"{where} was left out: it holds no picture")
                continue
            caption = words_of(captions[0], where) if captions else None
            yield Found(where, found, caption, f"fill its '{column}', {WAYS_OUT}")


def _shards(folder: Path) -> list[Path]:
    """Files of rows in the first place that has some: those of 'train' if they say so."""
    for place in PLACES:
        for kind in KINDS:
            found = sorted(p for p in (folder / place).glob(f"*{kind}") if p.is_file()
                           and not p.name.startswith(("cache-", "metadata.")))
            train = [p for p in found if "train" in re.split(r"[-_.]", p.name)]
            if found:
                return train or found
    return []


def _columns(schema, column: str, path: Path) -> list[str]:
    """Names of the column of pictures and of that of captions."""
    pictures = [f.name for f in schema if _is_picture(f.type)]
    if not pictures:
        raise QuantTuneError(f"The dataset file {path.name} has no column of pictures, only "
                             f"{', '.join(repr(n) for n in schema.names) or 'none'}; its pictures "
                             "have to be in the file, as the feature Image of datasets saves them.")
    chosen = ["image" if "image" in pictures else pictures[0]]
    if not column:
        return chosen
    if column not in schema.names:
        raise missing_column(f"The dataset file {path.name}", column, schema.names)
    if not is_text(schema.field(column).type):
        texts = ", ".join(repr(f.name) for f in schema if is_text(f.type)) or "none"
        raise QuantTuneError(f"The column '{column}' of {path.name} holds "
                             f"{_type(schema.field(column).type)} and no text; set caption_column "
                             f"to a column of texts (there: {texts}).")
    return [*chosen, column]


def _type(kind) -> str:
    return "pictures" if _is_picture(kind) else str(kind)[:40]


def _is_picture(kind) -> bool:
    types = arrow().types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _bytes(image: Any, folder: Path, where: str) -> bytes | Path | None:
    """What a cell of the column of pictures holds, or the file beside the dataset it names."""
    if isinstance(image, dict):
        if not image.get("bytes") and isinstance(image.get("path"), str) and image["path"]:
            return inside(folder, image["path"], where)
        image = image.get("bytes")
    return image if isinstance(image, bytes) and image else None


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise damaged(path, "it is no JSON object")
    return found

