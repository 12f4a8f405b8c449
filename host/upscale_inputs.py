"""What *SD 4x Upscale* can work with, and one sentence for whatever it cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import comfy.model_base
import comfy.samplers
import torch

from ..quant import QuantTuneError
from ..quant.limits import is_finite

SCALE = 4
SMALLEST_TILE = 64
"""Pixels of the input image."""
NOT_CROPPED = {
    "control": "a ControlNet",
    "area": "an area",
    "mask": "a mask",
    "gligen": "GLIGEN boxes",
    "concat_image": "an image from 'SD_4XUpscale_Conditioning', which this node replaces",
}
"""Keys of a conditioning that belong to places of the whole picture, and what they are."""


def check_models(model, vae) -> None:
    """Raise QuantTuneError unless the two are an x4 upscaler and its VAE."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, comfy.model_base.SD_X4Upscaler):
        raise QuantTuneError(
            f"The model is {_kind(inner)}, not Stable Diffusion's x4 upscaler; connect the MODEL "
            "of 'Load SD 4x Upscaler', or of 'Load Checkpoint' with x4-upscaler-ema.safetensors.")
    channels = inner.model_config.unet_config.get("in_channels")
    if channels != 7:
        raise QuantTuneError(f"The model takes {channels} channels, but an x4 upscaler takes 7; "
                             "connect the MODEL of 'Load SD 4x Upscaler'.")
    advice = "connect the VAE of the loader that gave the model"
    if getattr(vae, "first_stage_model", None) is None:
        raise QuantTuneError(f"There is no VAE in what is connected to vae; {advice}.")
    scale, latents = vae.spacial_compression_decode(), getattr(vae, "latent_channels", None)
    if scale != SCALE or latents != 4 or vae.latent_dim != 2:
        raise QuantTuneError(f"The VAE enlarges {scale} times from {latents} channels, but the x4 "
                             f"upscaler's enlarges 4 times from 4; {advice}.")


def _kind(inner) -> str:
    if isinstance(inner, comfy.model_base.BaseModel):
        return f"a {type(inner).__name__}"
    return "something else"


def check_image(image) -> torch.Tensor:
    """An IMAGE batch ``[pictures, height, width, 1, 3 or 4]``, or QuantTuneError."""
    if not isinstance(image, torch.Tensor) or image.dim() != 4 or image.shape[-1] not in (1, 3, 4):
        found = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise QuantTuneError(f"The image is {found}; connect an IMAGE of shape [pictures, height, "
                             "width, channels] with 1, 3 or 4 channels.")
    count, height, width, _ = image.shape
    if not count:
        raise QuantTuneError("The image batch holds no picture; connect one with at least one.")
    if not height or not width:
        raise QuantTuneError(f"The picture is empty ({width} x {height} pixels); connect one with "
                             "at least one pixel.")
    if not image.is_floating_point():
        kind, do = ("complex", "check") if image.is_complex() else ("whole", "divide by 255")
        raise QuantTuneError(f"The image holds {kind} numbers ({image.dtype}), but ComfyUI's "
                             f"images are fractions of 0 to 1; {do} what makes it.")
    if not is_finite(image):
        raise QuantTuneError("The image holds NaN or infinite values; check what makes it.")
    return image


def check_settings(model, *, noise_level: int, steps: int, sampler: str, scheduler: str,
                   tile_size: int, overlap: int, cfg: float) -> None:
    """Raise QuantTuneError for what the node's own ranges do not already keep away."""
    most = model.model.noise_augmentor.max_noise_level
    if not 0 <= noise_level <= most:
        raise QuantTuneError(f"The noise_level is {noise_level}, but it has to be from 0 to "
                             f"{most}.")
    levels = getattr(model.model.diffusion_model, "num_classes", None)
    if isinstance(levels, int) and noise_level >= levels:
        raise QuantTuneError(f"The noise_level is {noise_level}, but this upscaler was trained for "
                             f"levels below {levels}; set noise_level to at most {levels - 1}.")
    if not math.isfinite(cfg):
        raise QuantTuneError(f"The cfg is {cfg}; set a number, 9 suits most images.")
    if steps < 1:
        raise QuantTuneError(f"The steps are {steps}; at least one is needed.")
    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        raise QuantTuneError(f"There is no sampler '{sampler}'; choose one of the KSampler's.")
    if scheduler not in comfy.samplers.KSampler.SCHEDULERS:
        raise QuantTuneError(f"There is no scheduler '{scheduler}'; choose one of the KSampler's.")
    if tile_size < SMALLEST_TILE:
        raise QuantTuneError(f"The tile_size is {tile_size}, but tiles have at least "
                             f"{SMALLEST_TILE} pixels a side.")
    if overlap < 0:
        raise QuantTuneError(f"The overlap is {overlap}, but tiles share 0 pixels at least; 16 "
                             "suits most images.")
    if overlap >= tile_size:
        raise QuantTuneError(f"The overlap of {overlap} pixels has to be smaller than the tile_size"
                             f" of {tile_size}; make the tiles larger or the overlap smaller.")


def conditioning(clip, prompt: str, negative_prompt: str, positive, negative,
                 cfg: float) -> tuple[list, list]:
    """Positive and negative CONDITIONING: what is connected, or else what CLIP makes of the words.

    Raises QuantTuneError when there is neither, or what is connected is empty. Without guidance
    (``cfg`` 1) the negative one may be missing; the positive one stands for it, for samplers that
    ask for it all the same.
    """
    found = []
    for name, text, given in (("positive", prompt, positive),
                              ("negative", negative_prompt, negative)):
        if given is not None:
            _check_form(name, given)
            found.append(list(given))
        elif clip is not None:
            found.append(list(clip.encode_from_tokens_scheduled(clip.tokenize(text))))
        elif name == "negative" and cfg == 1.0:
            found.append(found[0])
        else:
            raise QuantTuneError(f"There is nothing to read the {name} prompt; connect the "
                                 f"upscaler's CLIP, or a conditioning to '{name}'.")
    return found[0], found[1]


def check_conditioning(model, positive: Sequence, negative: Sequence) -> tuple[list, list]:
    """The two, or QuantTuneError for one of another model, or one that tiles cannot follow.

    What belongs to places of the picture and is None is left out, as the host would stumble on it.
    """
    needed = model.model.model_config.unet_config.get("context_dim")
    for name, conds in (("positive", positive), ("negative", negative)):
        _check_form(name, conds)
        for embedding, extra in conds:
            if embedding.layout is not torch.strided:
                raise QuantTuneError(f"The {name} conditioning is sparse; make it dense where it "
                                     "comes from, or connect 'CLIP Text Encode'.")
            if not embedding.numel():
                raise QuantTuneError(f"The {name} conditioning is empty ({list(embedding.shape)}); "
                                     "connect 'CLIP Text Encode', or nothing.")
            if not is_finite(embedding):
                raise QuantTuneError(f"The {name} conditioning holds NaN or infinite values; check "
                                     "what makes it, or get its text encoder again.")
            strength = extra.get("strength")
            if isinstance(strength, (int, float)) and not math.isfinite(strength):
                raise QuantTuneError(f"The {name} conditioning has a strength of {strength}; set a "
                                     "number, 1 for its full strength.")
            for key, told in NOT_CROPPED.items():
                if extra.get(key) is not None:
                    raise QuantTuneError(f"The {name} conditioning has {told}, which cannot be "
                                         "applied tile by tile; connect the prompt's own.")
            if needed and embedding.shape[-1] != needed:
                raise QuantTuneError(
                    f"The {name} prompt was read by a text encoder of width {embedding.shape[-1]}, "
                    f"but this upscaler needs {needed}; connect the CLIP that belongs to it.")
    return tuple([[embedding, {key: value for key, value in extra.items()
                               if value is not None or key not in NOT_CROPPED}]
                  for embedding, extra in conds] for conds in (positive, negative))


def check_patches(model, tiles: int) -> None:
    """Raise QuantTuneError for a patch of the model that is wrong where there are several tiles."""
    if tiles > 1 and model.model_options.get("context_handler") is not None:
        raise QuantTuneError("The model is patched by 'Context Windows', which cuts the image into "
                             "pieces of its own; take that node out.")
    patches = model.model_options.get("sampler_post_cfg_function", ())
    if tiles > 1 and any(getattr(patch, "__qualname__", "").startswith("SelfAttentionGuidance.")
                         for patch in patches):
        raise QuantTuneError(
            "The model is patched by 'Self-Attention Guidance', which would apply the attention of "
            "the last tile to the whole image; take that node out, or set tile_size to the image's "
            "longer side.")


def _check_form(name: str, conds) -> None:
    """Raise QuantTuneError for what has not a CONDITIONING's form."""
    advice = "connect 'CLIP Text Encode', or nothing"
    if not isinstance(conds, (list, tuple)):
        raise QuantTuneError(f"What is connected to '{name}' is no CONDITIONING but "
                             f"{type(conds).__name__}; {advice}.")
    if not len(conds):
        raise _empty(name)
    for cond in conds:
        if not isinstance(cond, (list, tuple)) or len(cond) != 2 or not isinstance(cond[1], dict):
            raise QuantTuneError(f"An entry of the {name} conditioning is not a prompt with its "
                                 f"settings; {advice}.")
        embedding = cond[0]
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 3:
            raise QuantTuneError(f"The {name} conditioning holds no prompt that a text encoder "
                                 f"has read; {advice}.")


def _empty(name: str) -> QuantTuneError:
    return QuantTuneError(f"The {name} conditioning is empty; connect a prompt's, or nothing so "
                          "that the words of this node are read.")
