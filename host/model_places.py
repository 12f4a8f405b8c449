"""Folders of diffusers and single files among ComfyUI's model folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import folder_paths

INDEX = "model_index.json"
DEPTH = 3
"""How many folders deep a pipeline may lie: Hugging Face's cache takes three."""


def single_files(kinds: tuple[str, ...], suffixes: tuple[str, ...]) -> dict[str, str]:
    """Every file of these kinds of model folders: listed name to path.

    Args:
        kinds: of ComfyUI's model folders to look in.
        suffixes: how their names end, in small letters; capitals are alike.
    """
    found: dict[str, str] = {}
    for kind in kinds:
        for name in folder_paths.get_filename_list(kind):
            path = folder_paths.get_full_path(kind, name)
            if path and name.lower().endswith(suffixes):
                found.setdefault(name, path)
    return found


def model_folders(kinds: tuple[str, ...],
                  is_one: Callable[[str, list[str]], bool]) -> dict[str, str]:
    """Every folder that holds a model: listed name, which ends in "/", to path.

    Args:
        kinds: of ComfyUI's model folders to look in.
        is_one: says it of a path and the names of what is in it.
    """
    found: dict[str, str] = {}
    for kind in kinds:
        for root in folder_paths.get_folder_paths(kind):
            for path in _walk(root, DEPTH, is_one):
                name = os.path.relpath(path, root).replace(os.sep, "/")
                found.setdefault(f"{name}/", path)
    return found


def is_pipeline(path: str, inside: list[str]) -> bool:
    """Whether a folder holds the parts of a diffusers pipeline."""
    return INDEX in inside or os.path.isfile(os.path.join(path, "unet", "config.json"))


def _walk(folder: str, depth: int, is_one: Callable[[str, list[str]], bool]) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            inside = {entry.name: _is_folder(entry) for entry in entries}
    except OSError:
        return
    if is_one(folder, sorted(inside)):
        yield folder
    elif depth:
        for name in sorted(name for name, is_folder in inside.items() if is_folder):
            if not name.startswith("."):
                yield from _walk(os.path.join(folder, name), depth - 1, is_one)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where this user may not look
        return False
