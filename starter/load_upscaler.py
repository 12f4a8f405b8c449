"""The small upscaler as the host's own MODEL, CLIP and VAE."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.sd
import comfy.supported_models
import comfy.utils
import torch

from ..host.float_model import check_numbers
from ..quant.errors import QuantTuneError
from ..quant.safe_file import read_with_strings
from .load import FOLDER, load_clip, patcher_of
from .upscaler_config import FACTOR, FILE, LATENT_RGB, LATENT_RGB_BIAS

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
REPAIR = "install the pack again, or restore the file from its repository."


def load_starter_upscaler(path: Path | str | None = None, model_options: dict | None = None):
    """Load the three parts of the small upscaler.

    path: another file of the same form; model_options: as for the host's loaders; `dtype` and
    `custom_operations` act on the UNet.

    Returns (ModelPatcher of an `SD_X4Upscaler`, the starter's `comfy.sd.CLIP`, `comfy.sd.VAE` whose
    latents have a quarter of the picture's side). Call it inside `torch.inference_mode()` as the
    host's executor does. Raises QuantTuneError when the file is missing, damaged or another one.
    """
    path = str(path or FILE)
    try:
        model = load_unet(path, model_options or {})
        vae = load_vae(path)
    except (QuantTuneError, MemoryError):
        raise
    except Exception as error:  # the host's classes meet what may be a hostile description
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise QuantTuneError(
            f"The upscaler's file {Path(path).name} describes another network than it holds "
            f"({reason}); {REPAIR}") from error
    return model, load_clip(str(FOLDER / "clip.safetensors")), vae


def read(path: str, part: str, prefix: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors under a prefix, without it, and the configuration of that part."""
    name = Path(path).name
    try:
        metadata, state = read_with_strings(path)
    except QuantTuneError as error:
        raise QuantTuneError(
            f"The upscaler's file {name} is missing or damaged; {REPAIR}"
        ) from error
    if not metadata or part not in metadata:
        raise QuantTuneError(
            f"{name} carries no `{part}`, so it is not the small upscaler; {REPAIR}"
        )
    inside = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    check_numbers(inside, f"The upscaler's file {name}", REPAIR)
    try:
        return inside, json.loads(metadata[part])
    except (ValueError, RecursionError) as error:
        raise QuantTuneError(f"The `{part}` of {name} is no JSON; {REPAIR}") from error


def check(path: str, state: dict, module: torch.nn.Module) -> None:
    """Raise QuantTuneError when the file lacks tensors of a module that was made for it."""
    missing = set(module.state_dict()) - set(state)
    if missing:
        raise QuantTuneError(
            f"The upscaler's file {Path(path).name} lacks {len(missing)} tensors, {min(missing)} "
            f"for one; {REPAIR}"
        )


def load_unet(path: str, model_options: dict, disable_dynamic: bool = False):
    """The diffusion model as a ModelPatcher; also the factory the host reloads it with."""
    state, config = read(path, "unet_config", UNET_PREFIX)
    names = dict.fromkeys(state)
    patcher = patcher_of(
        comfy.supported_models.SD_X4Upscaler(config), state, model_options, disable_dynamic
    )
    check(path, names, patcher.model.diffusion_model)
    # Of this model's own instance; the class's are the full-size autoencoder's.
    shown = patcher.model.latent_format
    shown.latent_rgb_factors, shown.latent_rgb_factors_bias = LATENT_RGB, LATENT_RGB_BIAS
    patcher.cached_patcher_init = (load_unet, (path, model_options))
    return patcher


def load_vae(path: str):
    """The autoencoder as the host's VAE."""
    state, config = read(path, "vae_config", VAE_PREFIX)
    vae = comfy.sd.VAE(sd=state, config={"params": config})
    check(path, state, vae.first_stage_model)
    vae.downscale_ratio = vae.upscale_ratio = FACTOR
    for half in (vae.first_stage_model.encoder, vae.first_stage_model.decoder):
        # Trained without attention; the host's class has one, and over a whole picture it would
        # cost more than the rest.
        if not half.mid.attn_1.proj_out.weight.any():
            half.mid.attn_1 = torch.nn.Identity()
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path,))
    return vae


def load_vae_patcher(path: str, disable_dynamic: bool = False):
    """The autoencoder's patcher alone; the factory the host reloads it with."""
    return load_vae(path).patcher
