"""Pictures of a folder with their captions: text files beside them, or a list of them all."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..quant import QuantTuneError
from .arrow_rows import is_text, rows
from .picture_file import SUFFIXES, Found, inside, other_kind, picture_files

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Lists of pictures as Hugging Face's image folders have them; the first that is there is read."""
FILE_NAME = "file_name"
WAYS_OUT = "give a phrase, or leave caption_column empty"


def with_text_files(folder: Path, warnings: list[str]) -> Iterator[Found]:
    """Pictures by name, each with the text file of its name if there is one.

    A sentence for each text file without a picture goes to ``warnings``.
    """
    pictures = picture_files(folder, warnings)
    files = sorted(folder.iterdir())
    beside = {p.stem for p in files if p.suffix.lower() != ".txt"}
    # Of a.TXT and a.txt, which come in this order, the second counts.
    texts = {p.stem: p for p in files if p.suffix.lower() == ".txt" and p.is_file()}
    warnings += [f"{p.name} was left out: there is no picture of that name"
                 for p in texts.values() if p.stem not in beside]
    for path in pictures:
        words = texts.get(path.stem, path.with_suffix(".txt"))
        caption = " ".join(_text(words).split()) if path.stem in texts else None
        yield Found(path.name, path, caption, f"write {words.name} beside it, give a phrase, or "
                                              "set captions to 'none'")


def metadata_file(folder: Path) -> Path | None:
    """The list of a folder's pictures, if there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def metadata_state(folder: Path) -> list[Path]:
    """Files in a folder with a list, and in all folders below."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


def with_metadata(folder: Path, column: str, warnings: list[str]) -> Iterator[Found]:
    """Pictures in the order of the folder's list, then those that it does not name.

    Args:
        folder: holds one of `METADATA`, whose ``file_name`` may lead into folders below.
        column: of the captions; empty for none.
        warnings: gets a sentence for each line whose picture is not there.

    Raises:
        QuantTuneError: no list, a line that cannot be read or leads out of the folder, a missing
            column, or a caption that is no text.
    """
    path = metadata_file(folder)
    if path is None:
        raise QuantTuneError(f"The folder {folder.name} has no metadata.jsonl; write one with "
                             'lines such as {"file_name": "dog1.png", "text": "a dog"}, or choose '
                             "another kind of captions.")
    listed: set[Path] = set()
    for where, row in _rows(path):
        for wanted in (FILE_NAME, *([column] if column else ())):
            if wanted not in row:
                raise missing_column(where, wanted, row)
        name = row[FILE_NAME]
        if not isinstance(name, str):
            raise QuantTuneError(f"{where} has {name!r:.40} as {FILE_NAME}; it has to be the name "
                                 "of a picture.")
        picture = inside(folder, name, where)
        caption = words_of(row[column], where) if column else None
        listed.add(picture)
        if not os.path.isfile(picture):  # Path.is_file raises for a name that is too long
            warnings.append(f"{where} was left out: there is no picture {name}")
        elif picture.suffix.lower() not in SUFFIXES:
            warnings.append(other_kind(name))
        else:
            yield Found(name, picture, caption, f"fill '{column}' in {path.name}, {WAYS_OUT}")
    for place in sorted({folder, *(p.parent for p in listed)}):
        for picture in picture_files(place) if os.path.isdir(place) else ():
            if picture not in listed:
                yield Found(picture.relative_to(folder).as_posix(), picture, None,
                            f"add a line for it to {path.name}, {WAYS_OUT}")


def words_of(value: Any, where: str) -> str | None:
    """A caption of a column: a text, the first of several, or None for nothing.

    Raises QuantTuneError for a value of another kind; ``where`` names its row.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, str):
        return value if value is None else " ".join(value.split())
    raise QuantTuneError(f"{where} has a caption that is no text ({value!r:.40}); choose a column "
                         "of texts as caption_column.")


def missing_column(where: str, column: str, known) -> QuantTuneError:
    """The error for a column that is not there, with those that are."""
    names = ", ".join(repr(str(name)) for name in known if name is not None) or "none"
    advice = "add it" if column == FILE_NAME else "set caption_column to one of them"
    return QuantTuneError(f"{where} has no column '{column}', only {names}; {advice}.")


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a list, each with words that say where it is."""
    if path.suffix == ".parquet":
        for number, row in enumerate(rows(path, _texts), 1):
            yield f"{path.name}, row {number},", row
        return
    with io.StringIO(_text(path), newline=None) as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path.name}, line {number},"
                    yield where, _json_object(line, where)
            return
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path.name}, line {reader.line_num},", row
        except csv.Error as error:
            raise QuantTuneError(f"{path.name} is no CSV after line {reader.line_num} ({error}); "
                                 "mend or delete what follows.") from error


def _texts(schema) -> list[str]:
    return [field.name for field in schema if is_text(field.type)]


def _json_object(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QuantTuneError(f"{where} is no JSON ({error}); mend or delete the line."
                             ) from error
    if not isinstance(row, dict):
        raise QuantTuneError(f"{where} is no JSON object; write a line such as "
                             '{"file_name": "dog1.png", "text": "a dog"}.')
    return row


def _text(path: Path) -> str:
    """A text file as editors write it: UTF-8, or UTF-16 if it has that one's mark.

    Raises QuantTuneError for any other, whose words would be trained as garbage.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QuantTuneError(f"The file {path.name} cannot be read ({error.strerror or error}); "
                             "check its permissions, or delete it.") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16 without its mark
        raise QuantTuneError(f"The file {path.name} is no text in UTF-8, so its captions cannot "
                             "be read; save it as UTF-8.")
    return text
