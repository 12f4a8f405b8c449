"""Q-Diffusion's checkpoints as quantized models of the host."""

from __future__ import annotations

import logging
import os

import comfy.model_management
import torch
from comfy.utils import ProgressBar

from ..quant import QDiffusionCheckpoint, QuantizedCheckpoint, QuantTuneError, UNetMetadata
from ..quant import load_qdiffusion as open_checkpoint
from ..quant.qdiffusion import DOUBTFUL_CUT
from .describe import describe_config, model_config
from .float_model import check_fits, unbuilt
from .lora_keys import brief
from .unet_names import detect

LDM, DDPM = "LDM", "DDPM"
"""Families of the authors' files that no ComfyUI has a model for: unconditional ones."""
FIRST_OF_DDPM = "conv_in.weight"
WHAT = {LDM: "a latent diffusion model without a text encoder", DDPM: "a DDPM of pixels"}


def read_qdiffusion(path: str, bits: int | None = None) -> QuantizedCheckpoint:
    """The UNet of a Q-Diffusion checkpoint, its integers in memory.

    Args:
        path: a .pth, .pt or .ckpt file.
        bits: in place of those that the file's weights tell.

    Raises:
        QuantTuneError: not such a file, a damaged one, or a model that ComfyUI does not have.
    """
    state = open_checkpoint(path, bits)
    metadata = describe_qdiffusion(state, path)
    if metadata.family in WHAT:
        raise QuantTuneError(
            f"The file {os.path.basename(path)} holds {WHAT[metadata.family]}, which ComfyUI has "
            "no model for; choose one of Stable Diffusion 1.x, or convert it with 'python -m "
            "quanttune convert' for use in Python.")
    for line in doubts(state, path):
        logging.warning(line)
    progress = ProgressBar(len(state.layers))
    layers = {}
    for name, layer in state.layers.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        layers[name] = layer.weight()
        progress.update(1)
    return QuantizedCheckpoint(metadata, layers, state.floats)


def describe_qdiffusion(state: QDiffusionCheckpoint, path: str) -> UNetMetadata:
    """What our own file of such a checkpoint says of it: the family and sizes, from the shapes."""
    provenance = {"source": os.path.basename(path), "format": "q-diffusion", "bits": state.bits,
                  "symmetric": False}
    tensors = {**state.floats, **{f"{name}.weight": torch.empty(layer.shape, device="meta")
                                  for name, layer in state.layers.items()}}
    if FIRST_OF_DDPM in tensors:
        return UNetMetadata(DDPM, provenance=provenance)
    if "input_blocks.0.0.weight" not in tensors:
        raise QuantTuneError(
            f"The file {os.path.basename(path)} has names of no UNet that is known, such as "
            f"'{brief(next(iter(state.layers)))}'; choose a checkpoint with the names of LDM or "
            "DDPM.")
    config = _config(tensors)
    if config is None:
        return UNetMetadata(LDM, provenance=provenance)
    return describe_config(config, tensors, os.path.basename(path), provenance)


def check_complete(state: QDiffusionCheckpoint, metadata: UNetMetadata, name: str) -> None:
    """Raise QuantTuneError when a checkpoint does not hold exactly the UNet that it describes."""
    shapes = {key: tuple(value.shape) for key, value in state.floats.items()}
    shapes |= {f"{layer}.weight": tuple(found.shape) for layer, found in state.layers.items()}
    where = f"The UNet in {name}"
    config = model_config(QuantizedCheckpoint(metadata, {}, dict.fromkeys(shapes)), name)
    config.set_inference_dtype(torch.float32, None)
    try:
        skeleton = config.get_model({}, "", device="meta")
    except Exception as error:  # the host's classes meet what may be a hostile description
        raise unbuilt(where, error) from error
    check_fits(skeleton.diffusion_model, shapes, where)


def doubts(state: QDiffusionCheckpoint, path: str) -> list[str]:
    """Sentences about bits that may not be the file's: in some layers, or as they were declared."""
    name, lines = os.path.basename(path), []
    if state.cut > DOUBTFUL_CUT:
        lines.append(f"With {state.bits} bits {state.cut:.0%} of the weights of {name} are cut off "
                     "at an end of their range: it looks like a file of more bits; set bits to "
                     "those that it was made with.")
    if state.doubtful:
        lines.append(f"{len(state.doubtful)} layers of {name} look as if they had another bit "
                     f"width than the others' {state.bits}: {', '.join(state.doubtful[:3])}"
                     f"{' ...' if len(state.doubtful) > 3 else ''}.")
    return lines


def _config(tensors: dict):
    """The host's configuration of an LDM UNet, or None where it cannot have one."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    # The host logs what it does not know; what that means is told where the file is used.
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.CRITICAL)
    try:
        family, sizes = detect(shapes, "")
    except Exception:  # shapes that the host did not expect
        return None
    finally:
        logger.setLevel(level)
    return family(sizes) if sizes.get("context_dim") else None
