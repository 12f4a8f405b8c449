"""SD x4 upscalers among ComfyUI's model folders: which are there, and what they are."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import comfy.supported_models
import folder_paths
import torch

from ..quant import QuantTuneError
from ..quant.safe_file import is_cut_short, read_header
from .diffusers_files import STEMS
from .folders import file_state
from .lora_keys import brief
from .model_places import INDEX, is_pipeline, model_folders, single_files
from .upscaler_weights import MODEL, upscaler_folder

SHIPPED = "starter-x4 (shipped)"
"""The name of the small upscaler that comes with the pack."""
FILE = "x4-upscaler-ema.safetensors"
WHERE = (f"put the folder of {MODEL} into models/diffusers, or its file {FILE} into "
         "models/checkpoints")
FOLDER_KINDS = ("diffusers", "upscale_models", "checkpoints")
FILE_KINDS = ("checkpoints", "diffusion_models")
PIPELINE = "StableDiffusionUpscalePipeline"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CHANNELS = 7
"""Of the UNet's input: four of the latent, three of the small picture."""
_KINDS: dict[str, tuple[str, str]] = {}
"""What single files are, by path: their state when they were looked at, and the kind."""


@dataclass(frozen=True)
class Place:
    """Where an upscaler lies.

    Attributes:
        kind: "shipped", "folder" (of diffusers), "checkpoint" (the original names), or "described"
            (a file that names its own sizes, as the shipped one does).
        path: of the folder or file; None for the shipped one.
    """

    kind: str
    path: Path | None = None


def upscaler_names() -> list[str]:
    """The upscalers to choose from: the shipped one, diffusers folders (they end in "/"), files."""
    folders = [name for name, path in _folders().items() if _is_upscaler(path)]
    return [SHIPPED, *folders, *(name for name, path in _files().items() if file_kind(path))]


def find_upscaler(name: str) -> Place:
    """Where an upscaler lies, by its listed name.

    Folders and files that are no upscaler are found too, so that their loading says what they are.

    Raises:
        QuantTuneError: it is not there.
    """
    if name == SHIPPED:
        return Place("shipped")
    name = str(name)
    if name.endswith("/") and (folder := _folders().get(name)):
        return Place("folder", Path(folder))
    for kind in FILE_KINDS:
        if path := folder_paths.get_full_path(kind, name):
            return Place(file_kind(path) or "checkpoint", Path(path))
    raise QuantTuneError(f"The upscaler '{brief(name)}' is not there; {WHERE}, and press R to "
                         "refresh the list.")


def upscaler_state(name: str) -> str:
    """What changes when an upscaler's files are replaced.

    Raises:
        QuantTuneError: it is not there, or not whole.
    """
    place = find_upscaler(name)
    if place.kind == "shipped":
        return SHIPPED
    files = [place.path]
    if place.kind == "folder":
        files = [*sorted(place.path.glob("*.json")), *sorted(place.path.glob("*/*.json"))]
        files += [p for part in STEMS if (place.path / part).is_dir()
                  for p in upscaler_folder(place.path).weight_files(part)]
    return "\n".join(f"{path} {file_state(str(path))}" for path in files)


def file_kind(path: str) -> str:
    """What a single file is: a `Place.kind`, or nothing when it is no upscaler.

    Only the header is read, once for each state of the file.
    """
    try:
        state = file_state(path)
        if path not in _KINDS or _KINDS[path][0] != state:
            _KINDS[path] = state, _kind(*read_header(path))
    except (OSError, QuantTuneError):  # damaged, or no safetensors file: none of ours
        return ""
    return _KINDS[path][1]


def check_file(path: Path) -> None:
    """Refuse a single file in the original names that is not whole, or another model.

    Raises:
        QuantTuneError: says which, and what it looks like.
    """
    _, shapes = read_header(path)
    if is_cut_short(path):
        raise QuantTuneError(f"The file {path} is cut short; download {FILE} of {MODEL} again.")
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = _detected(meta)
    if not isinstance(config, comfy.supported_models.SD_X4Upscaler) or (
            f"{UNET}label_emb.weight" not in shapes):
        what = "no diffusion model that ComfyUI knows" if config is None else (
            f"a model of the family {type(config).__name__}")
        raise QuantTuneError(f"The file {path} is not the SD x4 upscaler but looks like {what}; "
                             f"{WHERE}.")
    if not any(name.startswith(VAE) for name in shapes):
        raise QuantTuneError(f"The file {path} holds the upscaler's UNet without its VAE; {WHERE}.")


def _detected(state: dict):
    """The host's configuration for tensors without data, or None."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.CRITICAL)  # the host logs what it does not know, which is told here
    try:
        return comfy.model_detection.model_config_from_unet(state, prefix)
    except Exception:  # some families are told apart by values, which are not read here
        return None
    finally:
        logger.setLevel(level)


def _kind(strings: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> str:
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    labels = shapes.get(f"{UNET}label_emb.weight", ())
    if len(first) != 4 or first[1] != CHANNELS or len(labels) != 2:
        return ""
    return "described" if {"unet_config", "vae_config"} <= strings.keys() else "checkpoint"


def _files() -> dict[str, str]:
    """Every single file that may be an upscaler: listed name to path."""
    return single_files(FILE_KINDS, (".safetensors",))


def _folders() -> dict[str, str]:
    """Every folder that holds the parts of a pipeline: listed name to path."""
    return model_folders(FOLDER_KINDS, is_pipeline)


def _is_upscaler(folder: str) -> bool:
    """Whether a pipeline's folder is an upscaler's, as far as that is told by what is there."""
    for name, key, wanted in ((INDEX, "_class_name", PIPELINE),
                              ("unet/config.json", "in_channels", CHANNELS)):
        try:
            return json.loads(Path(folder, name).read_text("utf-8-sig")).get(key) == wanted
        except (OSError, ValueError, RecursionError, AttributeError):
            continue
    return False
