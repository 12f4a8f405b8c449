"""A diffusers folder of the SD x4 upscaler in the host's own terms: configurations and names.

diffusers' ``StableDiffusionUpscalePipeline`` and its ``UNet2DConditionModel``, ``AutoencoderKL``
and transformers' ``CLIPTextModel`` say in JSON what the host's classes take as arguments. What the
host's classes cannot be told is refused, so that nothing computes quietly with something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.diffusers_convert
import comfy.utils
import torch
from torch import Tensor

from ..quant import QuantTuneError
from .diffusers_config import UNET_FIXED, Settings
from .lora_keys import brief
from .model_places import INDEX
from .upscaler_files import CHANNELS, PIPELINE
from .upscaler_weights import MODEL, upscaler_folder

LOW_RES = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02,
           "num_train_timesteps": 1000, "trained_betas": None}
"""The noise on the small picture, which the host's upscaler computes so and not otherwise."""
MAX_NOISE_LEVEL = 350
VOCABULARY, TOKENS = 49408, 77
"""Of the host's CLIP tokenizer."""
LATENT = 4
UPSCALER_FIXED = {
    **UNET_FIXED, "in_channels": CHANNELS, "out_channels": LATENT,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "class_embed_type": None,
    "addition_embed_type": None, "reverse_transformer_layers_per_block": None,
}
VAE_FIXED = {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "act_fn": "silu",
             "norm_num_groups": 32, "shift_factor": None, "latents_mean": None,
             "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True,
             "mid_block_add_attention": True}
VAE_LEVELS = 3
"""Of an autoencoder that shrinks by four."""


@dataclass
class Part:
    """One network of the pipeline in the host's terms.

    Attributes:
        state: its tensors under the host's names.
        config: arguments of the host's class (`UNetModel`; ``ddconfig`` and ``embed_dim`` of
            `AutoencoderKL`; the text encoder's configuration).
        where: what to call it in messages.
        prediction: of a UNet, the host's name of what it predicts.
        sampling: of a UNet, the host's settings of the noise schedule.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    where: str
    prediction: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)


def check_pipeline(folder: Path) -> dict:
    """What ``model_index.json`` says of a folder that holds an SD x4 upscaler.

    Raises:
        QuantTuneError: another pipeline, or one whose picture noise the host computes otherwise.
    """
    index = upscaler_folder(folder).json(INDEX)
    if index.get("_class_name") != PIPELINE:
        raise QuantTuneError(
            f"The folder {folder} holds a pipeline of the class "
            f"'{brief(index.get('_class_name'), 60)}', not the {PIPELINE} of an SD x4 upscaler; "
            f"choose the folder of {MODEL}.")
    _settings(index, f"The file {folder / INDEX}").expect({"max_noise_level": MAX_NOISE_LEVEL})
    name = "low_res_scheduler/scheduler_config.json"
    # What the file leaves out is the default of diffusers' DDPMScheduler, which is linear.
    low_res = {"beta_schedule": "linear", **upscaler_folder(folder).json(name)}
    _settings(low_res, f"The file {folder / name}").expect(LOW_RES)
    return index


def read_unet(folder: Path) -> Part:
    """The UNet.

    Raises:
        QuantTuneError: files missing or damaged, or a UNet that the host's class cannot be.
    """
    config = unet_config(upscaler_folder(folder).json("unet/config.json"),
                         f"The file {folder / 'unet' / 'config.json'}")
    where = f"The UNet in {folder / 'unet'}"
    state = unet_state(upscaler_folder(folder).weights("unet"), config, where)
    name = "scheduler/scheduler_config.json"
    settings = _settings(upscaler_folder(folder).json(name), f"The file {folder / name}")
    prediction, sampling = settings.schedule()
    return Part(state, config, where, prediction, sampling)


def read_vae(folder: Path) -> Part:
    """The autoencoder; as `read_unet`."""
    config = vae_config(upscaler_folder(folder).json("vae/config.json"),
                        f"The file {folder / 'vae' / 'config.json'}")
    state = vae_state(upscaler_folder(folder).weights("vae"))
    return Part(state, config, f"The VAE in {folder / 'vae'}")


def read_text(folder: Path) -> Part:
    """The text encoder; as `read_unet`."""
    config = text_config(upscaler_folder(folder).json("text_encoder/config.json"),
                         f"The file {folder / 'text_encoder' / 'config.json'}")
    state = text_state(upscaler_folder(folder).weights("text_encoder"), config["hidden_size"])
    return Part(state, config, f"The text encoder in {folder / 'text_encoder'}")


def unet_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of the host's `UNetModel` for the ``config.json`` of diffusers' UNet."""
    settings = _settings(config, where)
    settings.expect(UPSCALER_FIXED)
    widths = settings.numbers("block_out_channels", None)
    levels = len(widths)
    mult = [width // widths[0] for width in widths]
    if levels > 8 or any(width % widths[0] or width % 32 for width in widths):
        raise settings.wrong("block_out_channels", config["block_out_channels"])
    attends = {"DownBlock2D": 0, "CrossAttnDownBlock2D": 1}
    down, up = config.get("down_block_types"), config.get("up_block_types")
    if not isinstance(down, (list, tuple)) or len(down) != levels or not all(
            isinstance(kind, str) and kind in attends for kind in down):
        raise settings.wrong("down_block_types", down)
    if up != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise settings.wrong("up_block_types", up)
    blocks = settings.numbers("layers_per_block", levels, default=2, most=8)
    depths = settings.numbers("transformer_layers_per_block", levels, default=1, most=16)
    context = set(settings.numbers("cross_attention_dim", levels, default=1280))
    if len(context) > 1:
        raise settings.wrong("cross_attention_dim", config["cross_attention_dim"])
    heads = settings.heads(widths)
    cross = config.get("only_cross_attention") or False
    cross = [cross] * levels if isinstance(cross, bool) else cross
    if not isinstance(cross, list) or len(cross) != levels or not all(
            isinstance(only, bool) for only in cross):
        raise settings.wrong("only_cross_attention", config["only_cross_attention"])
    classes = settings.numbers("num_class_embeds", 1)[0]
    depth = [d * attends[kind] for d, kind in zip(depths, down)]
    return {
        "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True,
        "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
        "use_temporal_resblock": False, "in_channels": CHANNELS, "out_channels": LATENT,
        "model_channels": widths[0], "channel_mult": mult, "num_res_blocks": blocks,
        "transformer_depth": [d for d, n in zip(depth, blocks) for _ in range(n)],
        "transformer_depth_output": [d for d, n in zip(depth, blocks) for _ in range(n + 1)],
        "transformer_depth_middle": depths[-1], "context_dim": context.pop(),
        "use_linear_in_transformer": config.get("use_linear_projection") is True,
        "num_classes": classes, "disable_self_attentions": cross, **heads,
    }


def unet_state(state: Mapping[str, Tensor], config: dict, where: str) -> dict[str, Tensor]:
    """Tensors of diffusers' UNet under the host's names.

    Raises:
        QuantTuneError: one that the host's UNet of this configuration has not.
    """
    names = comfy.utils.unet_to_diffusers(config)
    # An embedding of noise levels, which the host's own table does not name.
    names["class_embedding.weight"] = "label_emb.weight"
    if unknown := sorted(state.keys() - names.keys()):
        raise QuantTuneError(
            f"{where} holds a tensor '{brief(unknown[0])}' ({len(unknown)} such) that an SD x4 "
            f"upscaler has not; download {MODEL} again.")
    return {names[key]: value for key, value in state.items()}


def vae_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``ddconfig`` and ``embed_dim`` of the host's `AutoencoderKL` for diffusers' config."""
    settings = _settings(config, where)
    settings.expect(VAE_FIXED)
    widths = settings.numbers("block_out_channels", None)
    blocks = settings.numbers("layers_per_block", 1, default=1, most=2)[0]
    if len(widths) != VAE_LEVELS or any(w % widths[0] or w % 32 for w in widths):
        raise settings.wrong("block_out_channels", config["block_out_channels"])
    return {"embed_dim": LATENT, "ddconfig": {
        "double_z": True, "z_channels": LATENT, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": widths[0], "ch_mult": [w // widths[0] for w in widths], "num_res_blocks": blocks,
        "attn_resolutions": [], "dropout": 0.0}}


def vae_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of diffusers' autoencoder with three levels under the host's names."""
    # The host's conversion counts the decoder's levels from the end of four.
    shift = 4 - VAE_LEVELS
    moved = {}
    for key, value in state.items():
        head, found, tail = key.partition("decoder.up_blocks.")
        level, dot, rest = tail.partition(".")
        if found and not head and level.isdigit():
            key = f"{found}{int(level) + shift}{dot}{rest}"
        if "attentions." in key and value.shape[2:] == (1, 1):
            # Convolutions of one pixel, as some converters write them; the host adds this itself.
            value = value[:, :, 0, 0]
        moved[key] = value
    return comfy.diffusers_convert.convert_vae_state_dict(moved)


def text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The host's configuration of a CLIP text model for that of transformers."""
    settings = _settings({"vocab_size": VOCABULARY, **config}, where)
    settings.expect({"vocab_size": VOCABULARY, "layer_norm_eps": 1e-5})
    activation = config.get("hidden_act", "quick_gelu")
    if str(activation) not in comfy.clip_model.ACTIVATIONS:
        raise settings.wrong("hidden_act", activation)
    found = {key: settings.numbers(key, 1, default, most)[0] for key, default, most in (
        ("hidden_size", 512, None), ("intermediate_size", 2048, None),
        ("num_attention_heads", 8, 256), ("num_hidden_layers", 12, 256),
        ("max_position_embeddings", TOKENS, TOKENS))}
    if found["hidden_size"] % found["num_attention_heads"]:
        raise settings.wrong("num_attention_heads", found["num_attention_heads"])
    return {**found, "hidden_act": activation}


def text_state(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Tensors of transformers' text model under the host's names."""
    named = {}
    for key, value in state.items():
        # Which of the two it is depends on the version that saved the file.
        key = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
        if not key.endswith("position_ids"):
            named[key] = value
    projection = named.get("text_projection.weight")
    if projection is None or tuple(projection.shape) != (width, width):
        named["text_projection.weight"] = torch.eye(width)  # what the upscaler does not use
    return named


def _settings(config: Mapping[str, Any], where: str) -> Settings:
    return Settings(config, where, "which ComfyUI's x4 upscaler cannot be; choose the folder of "
                                   f"{MODEL} or a fine-tune of it")
