"""An SD x4 upscaler, whatever it comes in, as the host's own MODEL, CLIP and VAE."""

from __future__ import annotations

import gc
from pathlib import Path

import comfy.clip_model
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import comfy.utils
import folder_paths
import torch

from ..quant import QuantTuneError
from .float_model import check_fits, check_numbers, float_model, unbuilt
from .precision import at_precision, check_precision
from .upscaler_diffusers import Part, check_pipeline, read_text, read_unet, read_vae
from .upscaler_files import CHANNELS, UNET, VAE, WHERE, check_file, find_upscaler
from .upscaler_weights import MODEL

FACTOR = 4
"""Pixels of the VAE's picture to a side of one of its latent."""


def load_upscaler(name: str, precision: str = "float"):
    """Load an SD x4 upscaler.

    Args:
        name: as `upscaler_files.upscaler_names` lists it.
        precision: a key of `precision.PRECISIONS`, of the UNet.

    Returns:
        ``(MODEL, CLIP, VAE)``; CLIP is None when a file comes without a text encoder.

    Raises:
        QuantTuneError: nothing of that name, a folder or file that is not whole, or another model.
    """
    check_precision(precision)
    place, keep = find_upscaler(name), "none"
    if place.kind in ("shipped", "described"):
        from ..starter.load_upscaler import load_starter_upscaler
        from ..starter.upscaler_config import DELICATE as keep

        model, clip, vae = load_starter_upscaler(place.path)
    else:
        load = load_folder if place.kind == "folder" else load_checkpoint
        model, clip, vae = load(place.path)
    check_upscaler(model, f"The upscaler '{name}'")
    if precision != "float":
        model = at_precision(model, precision, name, keep)
        gc.collect()  # the host's models refer to themselves; their floats are not to stay
    return model, clip, vae


def check_upscaler(model, what: str = "This MODEL") -> None:
    """Refuse a MODEL that is no SD x4 upscaler, whichever loader it comes from.

    Raises:
        QuantTuneError: it says what the MODEL is.
    """
    base = model.model
    unet = getattr(base, "diffusion_model", None)
    if (isinstance(base, comfy.model_base.SD_X4Upscaler)
            and getattr(unet, "in_channels", None) == CHANNELS
            and isinstance(getattr(unet, "num_classes", None), int)):
        return
    family = type(getattr(base, "model_config", base)).__name__
    raise QuantTuneError(f"{what} is a model of the family {family}, not the SD x4 upscaler; "
                         f"choose it in 'Load SD 4x Upscaler', or {WHERE}.")


def load_folder(folder: Path):
    """MODEL, CLIP and VAE of a diffusers folder; CLIP is None when its pipeline has none."""
    index = check_pipeline(folder)
    # All of it is looked at before anything is built: a folder is often half downloaded.
    unet, vae = read_unet(folder), read_vae(folder)
    wanted = index.get("text_encoder")
    text = read_text(folder) if isinstance(wanted, list) and any(wanted) else None
    if text is not None and text.config["hidden_size"] != unet.config["context_dim"]:
        raise QuantTuneError(
            f"{text.where} gives {text.config['hidden_size']} numbers a token and the UNet takes "
            f"{unet.config['context_dim']}; download {MODEL} into this folder again.")
    model, vae = upscaler_model(unet), upscaler_vae(vae)
    clip = None if text is None else upscaler_clip(text)
    model.cached_patcher_init = (load_folder_unet, (str(folder),))
    vae.patcher.cached_patcher_init = (load_folder_vae, (str(folder),))
    if clip is not None:
        clip.patcher.cached_patcher_init = (load_folder_clip, (str(folder),))
    return model, clip, vae


def load_folder_unet(folder: str, disable_dynamic: bool = False):
    """The MODEL of a diffusers folder; the factory the host reloads it with."""
    patcher = upscaler_model(read_unet(Path(folder)), disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_folder_unet, (folder,))
    return patcher


def load_folder_clip(folder: str, disable_dynamic: bool = False):
    """The patcher of a folder's text encoder; the factory the host reloads it with."""
    return upscaler_clip(read_text(Path(folder)), disable_dynamic).patcher


def load_folder_vae(folder: str, disable_dynamic: bool = False):
    """The patcher of a folder's VAE; the factory the host reloads it with."""
    return upscaler_vae(read_vae(Path(folder))).patcher


def load_checkpoint(path: Path):
    """MODEL, CLIP and VAE of a single file in the original names, by the host's own loader.

    The file is opened once: what was looked at is what the host is given.
    """
    check_file(path)
    tensors, strings = comfy.utils.load_torch_file(str(path), safe_load=True,
                                                   return_metadata=True)
    check_numbers({key: value for key, value in tensors.items() if key.startswith((UNET, VAE))},
                  f"The file {path}")
    model, clip, vae = comfy.sd.load_state_dict_guess_config(
        tensors, embedding_directory=_embeddings(), metadata=strings)[:3]
    if getattr(vae, "patcher", None) is None:  # the host only warns of it
        raise QuantTuneError(f"The file {path} holds the upscaler's UNet, and under its VAE's "
                             f"names nothing that ComfyUI knows as one; {WHERE}.")
    # The host's loader of files notes these, under names that change from release to release.
    again = str(path), _embeddings()
    model.cached_patcher_init = (comfy.sd.load_checkpoint_guess_config_model_only, again)
    if clip is not None:
        clip.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_guess_config_clip_only, again)
    vae.patcher.cached_patcher_init = (load_checkpoint_vae, again[:1])
    return model, clip, vae


def load_checkpoint_vae(path: str, disable_dynamic: bool = False):
    """The patcher of a single file's VAE; the factory the host reloads it with."""
    loaded = comfy.sd.load_checkpoint_guess_config(path, output_clip=False, output_model=False)
    patcher = loaded[2].patcher
    patcher.cached_patcher_init = (load_checkpoint_vae, (path,))
    return patcher


def upscaler_model(part: Part, disable_dynamic: bool = False):
    """The host's MODEL of an upscaler of any size.

    Args:
        part: of the UNet.
        disable_dynamic: keep the host from streaming its weights.

    Raises:
        QuantTuneError: tensors that do not fit the configuration.
    """
    family = comfy.model_base.SD_X4Upscaler
    check_numbers(part.state, part.where)
    try:
        config = comfy.supported_models.SD_X4Upscaler(part.config)
        config.unet_config.update(part.config)  # the family's own settings are those of one size
        config.sampling_settings.update(part.sampling)
        kind = comfy.model_base.ModelType[part.prediction or "V_PREDICTION"]
    except Exception as error:  # the host's classes meet what may be a hostile description
        raise unbuilt(part.where, error) from error
    return float_model(config, lambda device: family(config, model_type=kind, device=device),
                       part.state, part.where, disable_dynamic)


def upscaler_vae(part: Part):
    """The host's VAE of an upscaler of any size; its latents are a fourth of the picture.

    Raises:
        QuantTuneError: tensors that do not fit the configuration.
    """
    try:
        with torch.device("meta"):
            skeleton = comfy.ldm.models.autoencoder.AutoencoderKL(
                ddconfig=dict(part.config["ddconfig"]), embed_dim=part.config["embed_dim"])
    except Exception as error:  # as for the UNet
        raise unbuilt(part.where, error) from error
    check_fits(skeleton, {k: v.shape for k, v in part.state.items()}, part.where)
    check_numbers(part.state, part.where)
    vae = comfy.sd.VAE(sd=part.state, config={"params": dict(part.config)})
    # The host finds this out itself only where it makes the configuration.
    vae.downscale_ratio = vae.upscale_ratio = FACTOR
    return vae


def upscaler_clip(part: Part, disable_dynamic: bool = False):
    """The host's CLIP around the text encoder, with the ordinary tokenizer padded as SD2's is.

    Raises:
        QuantTuneError: tensors that do not fit the configuration.
    """
    sd2 = comfy.text_encoders.sd2_clip
    skeleton = comfy.clip_model.CLIPTextModel({"eos_token_id": 0, **part.config}, torch.float32,
                                              "meta", comfy.ops.manual_cast)
    check_fits(skeleton, {k: v.shape for k, v in part.state.items()}, part.where)
    check_numbers(part.state, part.where)
    target = comfy.supported_models_base.ClipTarget(sd2.SD2Tokenizer, sd2.SD2ClipModel)
    # diffusers keeps the layers up to the one whose output is taken, so that it is the last.
    target.params["layer"] = "last"
    return comfy.sd.CLIP(
        target, embedding_directory=_embeddings(), disable_dynamic=disable_dynamic,
        tokenizer_data={"clip_h_max_length": part.config["max_position_embeddings"]},
        parameters=comfy.utils.calculate_parameters(part.state), state_dict=[part.state],
        model_options={"clip_h_model_config": part.config})


def _embeddings():
    return folder_paths.get_folder_paths("embeddings")
