"""A folder as diffusers saves it, read whole: what is missing is told in one sentence."""

from __future__ import annotations

import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.safe_file import is_cut_short, read_header, read_with_strings, refuse_pipe
from ..quant.tensor_file import PICKLED, SAFETENSORS, load_pickled
from ..quant.torch_archive import TensorArchive, is_archive
from .lora_keys import brief

STEMS = {"unet": ("diffusion_pytorch_model",), "vae": ("diffusion_pytorch_model",),
         "text_encoder": ("model", "pytorch_model")}
"""Part of a pipeline to how its savers name the weights."""
VARIANTS = {"": 0, "fp16": 1, "bf16": 2}
"""Which of several precisions is taken first; training's other copies come last."""
UNFINISHED = (".incomplete", ".part", ".crdownload", ".download")
"""How programs name what they have not downloaded to its end."""
LFS = b"version https://git-lfs"
"""How the little file begins that Git leaves in place of a large one it did not fetch."""
MOST_SHARDS = 1000
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.(?P<kind>safetensors|bin)")
"""How the files are called that a large model was cut into."""
INDEX = re.compile(r".+\.index(\.\w+)?\.json")
"""How the list of them is called, the precision of a variant before or after ".index"."""


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a pipeline, or of one part of it.

    Attributes:
        path: of the folder.
        what: it is called in messages, "upscaler folder".
        again: what to do when it is not whole, the end of a sentence.
    """

    path: Path
    what: str = "folder"
    again: str = "download the model into this folder again"

    def json(self, name: str) -> dict:
        """One of the folder's JSON files.

        Raises:
            QuantTuneError: it is missing, or no JSON object.
        """
        path = self.path / name
        if what := fault(path):
            raise self.unfinished(f"{name} {what}")
        try:
            value = json.loads(path.read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.unfinished(f"{name} cannot be read ({brief(error)})") from error
        if not isinstance(value, dict):
            raise self.unfinished(f"{name} holds no settings")
        return value

    def weights(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part, by the names they have there.

        Those of safetensors files are views of the mapped files.

        Args:
            part: a key of `STEMS`, or "" for a folder that is a UNet itself.

        Raises:
            QuantTuneError: no weights, or a file of them that is missing, damaged or cut short.
        """
        state: dict[str, Tensor] = {}
        for path in self.weight_files(part):
            tensors = (read_with_strings(path)[1] if path.suffix.lower() in SAFETENSORS
                       else load_pickled(path))
            for name, value in tensors.items():
                if not is_finite(value):
                    raise self.unfinished(
                        f"{path.name} has NaN or infinite values in '{brief(name)}'")
                if name in state:
                    raise self.unfinished(f"{path.name} has '{brief(name)}', which another of its "
                                          "files has, too")
            state |= tensors
        return state

    def weight_files(self, part: str) -> list[Path]:
        """The files that hold a part's weights: one, or several shards.

        Of several forms the first that is whole is taken: safetensors before .bin, full precision
        before half.

        Raises:
            QuantTuneError: as `weights`, as far as sizes and first bytes tell.
        """
        troubles = []
        for choice in _choices(self.path, part):
            if choice.suffix == ".json":
                files, trouble = shards(choice)
                trouble = trouble or incomplete(choice, files)
            else:
                files, what = [choice], fault(choice)
                trouble = what and f"{choice.name} {what}"
            if trouble is None:
                return files
            troubles.append(trouble)
        missing = f"{STEMS[part or 'unet'][0]}.safetensors is missing"
        where = f"{part}/" if part else ""
        raise self.unfinished(where + (troubles[0] if troubles else missing))

    def unfinished(self, what: str) -> QuantTuneError:
        """The error for a folder that is not whole; ``what`` begins with the file's name."""
        left = _left_over(self.path)
        seen = f" (a download stopped at {left})" if left else ""
        return QuantTuneError(f"The {self.what} {self.path} is not whole: {what}{seen}; "
                              f"{self.again}.")


def fault(path: Path) -> str | None:
    """What is wrong with a file as far as its size and first bytes tell, or None."""
    try:
        refuse_pipe(path)
        with open(path, "rb") as file:
            start = file.read(len(LFS))
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not start:
        return "is empty"
    if start == LFS:
        return "is a Git LFS pointer in place of the file ('git lfs pull' fetches it)"
    if path.suffix.lower() in SAFETENSORS:
        try:
            read_header(path)
        except QuantTuneError:
            return "is damaged or cut short"
        return "is cut short" if is_cut_short(path) else None
    cut = path.suffix.lower() in PICKLED and start.startswith(b"PK") and not _is_archive(path)
    return "is cut short" if cut else None


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of a part of one that spans several disks
        return False


def shards(index: Path) -> tuple[list[Path], str | None]:
    """The files that an index of shards names, or what is wrong with it."""
    if what := fault(index):
        return [], f"{index.name} {what}"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8-sig"))["weight_map"].values()))
        plain = all(Path(name).name == name and Path(name).suffix in (".safetensors", ".bin")
                    for name in names)
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        names, plain = [], False
    if not names or not plain or len(names) > MOST_SHARDS:
        return [], f"{index.name} does not list the files of the weights"
    if lacking := _unlisted(names):
        return [], f"{index.name} does not list {lacking}"
    return [index.with_name(name) for name in names], None


def incomplete(index: Path, files: list[Path]) -> str | None:
    """What is wrong with the shards that an index names, or None.

    That includes a tensor that it lists and none of them has: a UNet whose last layers are missing
    could be taken for a smaller one. Of files from before torch 1.6 the names cannot be read
    without the numbers: they are not looked at.

    Args:
        index: that `shards` has found to be whole.
        files: its shards.
    """
    for path in files:
        if what := fault(path):
            return f"{path.name} {what}"
    found: set[str] = set()
    for path in files:
        if path.suffix.lower() in SAFETENSORS:
            found |= read_header(path)[1].keys()
        elif is_archive(path):
            try:
                found |= TensorArchive(path).tensors.keys()
            except QuantTuneError:  # whoever reads the file says it with its own words
                return None
        else:
            return None
    listed = json.loads(index.read_text("utf-8-sig"))["weight_map"]
    name = next((name for name in listed if name not in found), None)
    return name and f"{index.name} lists '{brief(name)}', which none of its files has"


def _unlisted(names: list[str]) -> str | None:
    """The first file that the others' names ("-00001-of-00003") promise and that is not there."""
    listed, series = set(names), {}
    for match in filter(None, map(SHARD.fullmatch, names)):
        series[match["stem"], match["count"], match["kind"]] = None
    for stem, count, kind in series:
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:05d}-of-{count}.{kind}"
            if name not in listed:
                return name
    return None


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file is by its name the index of a model's shards."""
    return INDEX.fullmatch(Path(path).name) is not None


def index_of(shard: Path) -> Path | None:
    """The index that names a shard, whether it is there or not; None for what is no shard.

    Of a variant ("model.fp16-00001-of-00002.safetensors") there are two ways to write it.
    """
    match = SHARD.fullmatch(shard.name)
    if match is None:
        return None
    stem, dot, variant = match["stem"].rpartition(".")
    first = shard.with_name(f"{match['stem']}.{match['kind']}.index.json")
    second = shard.with_name(f"{stem}.{match['kind']}.index.{variant}.json")
    return second if dot and not first.exists() and second.exists() else first


def _left_over(folder: Path) -> str:
    """The name of a file whose download was not finished, or nothing."""
    # A snapshot in Hugging Face's cache keeps its files two folders up.
    for root in (folder, folder.parent.parent / "blobs"):
        for path in root.rglob("*") if root.is_dir() else ():
            if path.name.endswith(UNFINISHED):
                return path.name
    return ""


def _choices(folder: Path, part: str) -> list[Path]:
    """Files and shard indices that may be a part's weights, the best first."""
    found = []
    for order, stem in enumerate(STEMS[part or "unet"]):
        one = re.compile(rf"{stem}(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
        index = re.compile(rf"{stem}(?:\.(?P<v>\w+))?\.(?P<kind>safetensors|bin)\.index"
                           r"(?:\.(?P<variant>\w+))?\.json")
        try:
            names = sorted(path.name for path in (folder / part).iterdir())
        except OSError:
            names = []
        for name in names:
            match = one.fullmatch(name) or index.fullmatch(name)
            if match:
                facts = match.groupdict()
                variant = facts["variant"] or facts.get("v") or ""
                found.append((facts["kind"] == "bin", VARIANTS.get(variant, len(VARIANTS)),
                              name.endswith(".json"), order, name))
    return [folder / part / entry[-1] for entry in sorted(found)]
