"""UNets of other programs among ComfyUI's model folders: which are there, and where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import folder_paths

from ..quant import QuantTuneError
from ..quant.safe_file import own_format, read_header
from ..quant.tensor_file import PICKLED, SAFETENSORS
from .diffusers_files import index_of, is_index, shards
from .folders import STATES, file_state
from .lora_keys import brief
from .model_places import INDEX, model_folders, single_files
from .unet_names import find_unet
from .unet_source import SCHEDULER, UNET_CLASS
from .upscaler_files import CHANNELS

NONE = "(none found)"
"""What the list says when there is no UNet."""
WHERE = ("put a diffusers folder into models/diffusers, or a file into models/diffusion_models or "
         "models/checkpoints")
FOLDER_KINDS = ("diffusers", "diffusion_models", "checkpoints")
FILE_KINDS = ("diffusion_models", "checkpoints")
CONFIG = "config.json"
_KINDS: dict[str, tuple[str, bool]] = {}
"""Whether single files hold a UNet, by path: their state when they were looked at, and that."""


def unet_names() -> list[str]:
    """The UNets to choose from: diffusers folders (they end in "/"), then files."""
    files = single_files(FILE_KINDS, (*SAFETENSORS, *PICKLED))
    names = [*_folders(), *(name for name, path in files.items() if _holds_unet(path))]
    return names or [NONE]


def find_unet_source(name: str) -> Path:
    """Where a UNet lies, by its listed name.

    Raises:
        QuantTuneError: it is not there.
    """
    name = str(name)
    if name == NONE:
        raise QuantTuneError(f"There is no UNet of SD1.x, SD2.x or SDXL here; {WHERE}, and press R "
                             "to refresh the list.")
    if name.endswith("/") and (folder := _folders().get(name)):
        return Path(folder)
    for kind in FILE_KINDS:
        if path := folder_paths.get_full_path(kind, name):
            return Path(path)
    raise QuantTuneError(f"The UNet '{brief(name)}' is not there; {WHERE}, and press R to refresh "
                         "the list.")


def unet_state(name: str) -> str:
    """What changes when a UNet's files are replaced.

    Raises:
        QuantTuneError: it is not there.
    """
    path = find_unet_source(name)
    if not path.is_dir():
        return f"{path} {file_state(str(path))}"
    files = [p for part in (".", "unet", "scheduler") if (path / part).is_dir()
             for p in sorted((path / part).iterdir()) if p.is_file()]
    return _states(files)


def quantized_unet_state(path: str | os.PathLike[str]) -> str:
    """What changes when a quantized UNet's file is replaced, or one that is read with it.

    Those are the other shards of a model, the settings beside it, and the ``unet`` folder beside a
    state of TuneQDM.
    """
    path = Path(path)
    folder = path.parent
    files = {path, *folder.glob("*.json"), folder / SCHEDULER, folder.parent / SCHEDULER}
    index = index_of(path) or path
    if is_index(index):
        files |= set(shards(index)[0])
    if path.suffix.lower() in STATES:
        files |= set((folder / "unet").glob("*"))
    return _states(sorted(file for file in files if file == path or file.is_file()))


def _states(files: Iterable[Path]) -> str:
    return "\n".join(f"{file} {file_state(str(file))}" for file in files)


def _folders() -> dict[str, str]:
    return model_folders(FOLDER_KINDS, _holds_diffusers_unet)


def _holds_diffusers_unet(path: str, inside: list[str]) -> bool:
    """Whether a folder is a pipeline with a UNet, or a UNet, as far as its JSON files tell."""
    for name in ("unet/" + CONFIG, CONFIG):
        config = _json(os.path.join(path, name))
        if config.get("_class_name") == UNET_CLASS:
            return config.get("in_channels") != CHANNELS  # an upscaler has a loader of its own
    # Half downloaded: it is offered, and its loading says what is missing.
    parts = _json(os.path.join(path, INDEX)).get("unet") if INDEX in inside else None
    return parts == ["diffusers", UNET_CLASS]


def _json(path: str) -> dict:
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_unet(path: str) -> bool:
    """Whether a file may hold a UNet; its header is read once for each state of the file."""
    if path.lower().endswith(PICKLED):
        return True  # it does not say before it is read
    try:
        state = file_state(path)
        if path not in _KINDS or _KINDS[path][0] != state:
            strings, shapes = read_header(path)
            _KINDS[path] = state, own_format(strings) is None and find_unet(shapes) is not None
    except (OSError, QuantTuneError):  # damaged, or no safetensors file: none of ours
        return False
    return _KINDS[path][1]
