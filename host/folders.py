"""Where the pack's files live among ComfyUI's folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ..metrics.similarity import SUFFIXES as NETWORK_SUFFIXES
from ..quant import QuantTuneError
from ..quant.tensor_file import SAFETENSORS
from ..quant.torch_archive import SUFFIXES as CHECKPOINTS
from ..starter.qdiffusion_file import NAME as MADE
from ..starter.qdiffusion_file import write_qdiffusion_starter
from .lora_keys import brief

UNET_FOLDERS = ("quanttune", "diffusion_models")
SCALES_FOLDER = "quanttune_scales"
METRICS_FOLDER = "quanttune_metrics"
LORA_FOLDER = "loras"
STATES = (".pt",)
"""Of the states of TuneQDM's authors, which are quantized UNets and scales in one."""
LONGEST = 200
"""Bytes of a name: most systems have 255, and a number and endings come after it."""
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
"""What Windows keeps for devices."""
_UNWRITTEN = re.compile('[\0-\x1f\x7f<>:"|?*\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
"""Characters that some system has in no name, or that show a name as another one."""
STARTER = Path(__file__).resolve().parent.parent / "starter"


def register_folders() -> None:
    """Make the pack's model folders known to ComfyUI; safe to call more than once.

    ``models/quanttune`` holds quantized UNets (so do ``models/diffusion_models`` and
    ``models/unet``), ``models/quanttune_scales`` scale sets. Files that the save nodes write to
    the output folder, and those that ship with the pack, are found too.
    ``models/quanttune_metrics`` holds networks that measure.
    """
    for folder in ("quanttune", SCALES_FOLDER):
        for path in (os.path.join(folder_paths.models_dir, folder),
                     os.path.join(folder_paths.get_output_directory(), folder),
                     str(STARTER / folder)):
            folder_paths.add_model_folder_path(folder, path)
        folder_paths.folder_names_and_paths[folder][1].update((*SAFETENSORS, *STATES))
    folder_paths.folder_names_and_paths["quanttune"][1].update(CHECKPOINTS)
    folder_paths.add_model_folder_path(METRICS_FOLDER,
                                       os.path.join(folder_paths.models_dir, METRICS_FOLDER))
    folder_paths.folder_names_and_paths[METRICS_FOLDER][1].update(NETWORK_SUFFIXES)


def unet_files() -> list[str]:
    """Names of the files that may be quantized UNets, those in our own folder first.

    The last is the starter's Q-Diffusion checkpoint, which `unet_path` makes.
    """
    names = _files(UNET_FOLDERS, (*SAFETENSORS, *CHECKPOINTS))
    return [name for name in names if name != MADE] + [MADE]


def scale_files() -> list[str]:
    """Names of the scale-set files, and of the states among the quantized UNets: they hold both."""
    names = _files((SCALES_FOLDER,), (*SAFETENSORS, *STATES))
    return names + [n for n in _files(UNET_FOLDERS[:1], STATES) if n not in names]


def metric_files() -> list[str]:
    """Names of the files that may be a backbone of LPIPS."""
    return _files((METRICS_FOLDER,), NETWORK_SUFFIXES)


def lora_files() -> list[str]:
    """Names of the files that may be LoRAs, of ComfyUI's own folder."""
    return _files((LORA_FOLDER,))


def _files(folders, suffixes=SAFETENSORS) -> list[str]:
    """Listed names with these endings, in capitals or small letters, as the host lists them."""
    names = []
    for folder in folders:
        names += [n for n in folder_paths.get_filename_list(folder)
                  if n.lower().endswith(tuple(suffixes)) and n not in names]
    return names


def unet_path(name: str) -> str:
    """Full path of a quantized UNet by its listed name."""
    if name == MADE and not any(folder_paths.get_full_path(f, name) for f in UNET_FOLDERS):
        path = os.path.join(folder_paths.get_temp_directory(), MADE)
        if not os.path.isfile(path):
            write_qdiffusion_starter(path)
        return path
    return _find(UNET_FOLDERS, name, "models/quanttune or models/diffusion_models")


def scales_path(name: str) -> str:
    """Full path of a scale set by its listed name."""
    folders = (SCALES_FOLDER, *UNET_FOLDERS[:1]) if name.lower().endswith(STATES) else (
        SCALES_FOLDER,)
    return _find(folders, name, "models/quanttune_scales")


def metric_path(name: str) -> str:
    """Full path of a backbone of LPIPS by its listed name."""
    return _find((METRICS_FOLDER,), name, "models/quanttune_metrics")


def lora_path(name: str) -> str:
    """Full path of a LoRA by its listed name."""
    return _find((LORA_FOLDER,), name, "models/loras")


def _find(folders, name, where) -> str:
    for folder in folders:
        try:
            path = folder_paths.get_full_path(folder, name)
        except (OSError, ValueError):  # of a name that is none: on another drive, or too long
            path = None
        if path is not None:
            return path
    raise QuantTuneError(f"The file '{brief(name)}' is not there; put it into {where} and press R "
                         "to refresh the list.")


def output_path(prefix: str, suffix: str = ".safetensors",
                example: str = "quanttune/my_model") -> str:
    """A new numbered path in the output folder, as ComfyUI's own savers name them.

    ``example`` of a good prefix is told when this one is none.
    """
    if wrong := name_fault(prefix):
        raise QuantTuneError(f"The name '{brief(prefix)}' {wrong}; use a plain name such as "
                             f"'{example}'.")
    directory = folder_paths.get_output_directory()
    try:
        folder, filename, counter, _, _ = folder_paths.get_save_image_path(
            prefix.replace("\\", "/"), directory)
    except OSError as error:
        raise QuantTuneError(
            f"The output folder for '{prefix}' cannot be written ({error.strerror or error}); free "
            "space or choose another name.") from error
    except Exception as error:  # the host raises a bare Exception for a path outside its folder
        raise QuantTuneError(
            f"The name '{prefix}' points outside the output folder; use a plain name such as "
            f"'{example}'.") from error
    if not is_inside(folder, directory):  # ComfyUI's older releases follow links out of it
        raise QuantTuneError(f"The name '{brief(prefix)}' leads out of the output folder by a "
                             f"link; use a plain name such as '{example}'.")
    return os.path.join(folder, f"{filename}_{counter:05}_{suffix}")


def name_fault(name: str) -> str:
    """What is wrong with a name for a file to write, the end of a sentence, or "".

    A name goes from one system to another with its workflow, so that the rules of all of them
    count: folders are parted by "/" or "\\" and none of them is a way up.
    """
    if name.startswith(("/", "\\", "~")) or name[1:3] in (":\\", ":/"):
        return "points outside the output folder"
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        return "points outside the output folder"
    if not name.strip("/\\. ") or _UNWRITTEN.search(name):
        return ("is empty, or holds a NUL, half a character or another that file names cannot have "
                "on every system")
    for part in parts:
        if part not in ("", ".") and (part.endswith((".", " ")) or RESERVED.fullmatch(part)):
            return "is one that Windows does not write"
        if len(part.encode()) > LONGEST:
            return f"is too long: a folder or file has at most {LONGEST} bytes"
    return ""


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a folder once all links are followed."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    try:
        return os.path.commonpath((path, folder)) == folder
    except ValueError:  # another drive
        return False


def file_state(path: str) -> str:
    """What changes when a file is replaced: its size and time of change."""
    stat = os.stat(path)
    return f"{stat.st_size}-{stat.st_mtime_ns}"
