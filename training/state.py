"""The resumable state of a training, in one file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..quant import QuantTuneError
from ..quant.torch_checks import check_records, tensors_in
from ..quant.torch_structure import check_structure
from ..quant.whole_file import room

FILE = "checkpoint.pt"
VERSION = 1
NO_SPACE = "no space left on the disk"
FULL = 8 * 2**20
"""Bytes below which a disk counts as full, since what did not fit has been taken back."""


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, mappings) over the last one.

    Raises QuantTuneError when the disk does not take it; the last state is still there then.
    """
    path = Path(folder) / FILE
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save({**state, "version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = _reason(error, path.parent)
        kept = " The state before it is kept." if _exists(path) else ""
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if reason == NO_SPACE:
            reason += ": " + room(path.parent, sum(t.nbytes for t in tensors_in(state)))
        raise QuantTuneError(
            f"The training state {path} could not be written ({reason}); free some space or "
            f"choose another folder.{kept}") from error


def remove_parts(folder: Path) -> None:
    """Delete what a killed process had begun to write."""
    for part in Path(folder).glob(f".{FILE}.*.tmp"):
        with contextlib.suppress(OSError):
            part.unlink()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _reason(error: Exception, folder: Path) -> str:
    """Why a file was not written; torch does not say when the disk is full."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1))
        return NO_SPACE if full else error.strerror or str(error)
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < FULL:
            return NO_SPACE
    return str(error).splitlines()[0]


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state of a run, or None when the folder has none.

    Raises QuantTuneError when the file is damaged or of another version.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        check_structure(path)  # refuses what is packed: it could be a thousand times the file
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        check_records(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise QuantTuneError(
            f"The training state {path} is damaged ({type(error).__name__}); delete it to start "
            "the training anew.") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise QuantTuneError(f"The training state {path} is of another version of QuantTune; "
                             "delete it to start the training anew.")
    return state


def check_same(path: Path, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse to resume a state that another base, set of images or settings made.

    ``expected`` maps what is compared (as a user would call it) to its present value.
    """
    for name, value in expected.items():
        if state.get("origin", {}).get(name) != value:
            raise QuantTuneError(
                f"The run in {path} was made with {_differs(name, state, value)}; give this "
                "training another run name, or restore what it was started with.")


def _differs(name: str, state: dict[str, Any], value: Any) -> str:
    before = state.get("origin", {}).get(name)
    if isinstance(before, dict) and isinstance(value, dict):
        key = next(k for k in {**before, **value} if before.get(k) != value.get(k))
        return f"{key} = {before.get(key)!r}, and now it is {value.get(key)!r}"
    return f"another {name}"
