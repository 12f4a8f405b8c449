"""A UNet of the host in diffusers' terms: what its tensors are called, and its ``config.json``."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.utils

from ..quant import QuantTuneError

ALSO = ("class_embedding.linear", "add_embedding.linear")
"""Two names that diffusers has for one tensor of the host: of SD2.x unCLIP, and of SDXL."""
SAMPLE_SIZES = {"SD20": 96, "SDXL": 128, "SDXLRefiner": 128, "SD_X4Upscaler": 128}
"""Height and width of the latents a family was trained on; 64 for others."""


def diffusers_names(model) -> dict[str, str]:
    """The host's name of each tensor of a UNet to diffusers' name.

    Args:
        model: the host's model (``patcher.model``).

    Raises:
        QuantTuneError: no UNet that diffusers has names for.
    """
    config = model.model_config.unet_config
    own = comfy.utils.unet_to_diffusers(config)
    if not own:
        raise QuantTuneError(
            f"diffusers' names are known for UNets (SD1.x, SD2.x, SDXL), and this is a "
            f"{type(model).__name__} model; choose the ComfyUI format.")
    wrong = ALSO[0] if _told_sizes(model) else ALSO[1]
    names = {host: theirs for theirs, host in own.items() if not theirs.startswith(wrong)}
    names["label_emb.weight"] = "class_embedding.weight"
    return names


def diffusers_config(model) -> dict[str, Any]:
    """The ``config.json`` with which diffusers' `UNet2DConditionModel` is the host's UNet.

    Raises:
        QuantTuneError: a UNet that diffusers' class cannot be told.
    """
    config = model.model_config.unet_config
    blocks, mult = list(config["num_res_blocks"]), list(config["channel_mult"])
    widths = [config["model_channels"] * m for m in mult]
    depth, middle = list(config["transformer_depth"]), config["transformer_depth_middle"]
    levels = []
    for count in blocks:
        own, depth = set(depth[:count]), depth[count:]
        if len(own) != 1:
            raise _cannot(model, "blocks of one level with different depths")
        levels.append(own.pop())
    output = [d for d, count in zip(levels, blocks) for _ in range(count + 1)]
    if output != list(config["transformer_depth_output"]) or levels[-1] not in (0, middle) or (
            middle < 1):
        raise _cannot(model, "a decoder or middle of other depths than its encoder")
    heads = config.get("num_heads", -1)
    if heads == -1:
        heads = [width // config["num_head_channels"] for width in widths]
    result = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "center_input_sample": False,
        "sample_size": SAMPLE_SIZES.get(type(model.model_config).__name__, 64),
        "in_channels": config["in_channels"], "out_channels": config["out_channels"],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in levels],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(levels)],
        "block_out_channels": widths, "layers_per_block": _one(blocks),
        "transformer_layers_per_block": _one([d or middle for d in levels]),
        "cross_attention_dim": config["context_dim"], "attention_head_dim": heads,
        "use_linear_projection": bool(config.get("use_linear_in_transformer")),
        "norm_num_groups": 32, "norm_eps": 1e-05, "flip_sin_to_cos": True, "freq_shift": 0,
    }
    if model.model_type.name == "V_PREDICTION" and "SD20" == type(model.model_config).__name__:
        result["upcast_attention"] = True
    classes, embedded = config.get("num_classes"), config.get("adm_in_channels")
    only_cross = config.get("disable_self_attentions")
    if isinstance(only_cross, (list, tuple)):
        result["only_cross_attention"] = list(only_cross)
    if isinstance(classes, int):
        result["num_class_embeds"] = classes
    elif embedded is not None:
        result["projection_class_embeddings_input_dim"] = embedded
        result |= ({"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
                   if _told_sizes(model) else {"class_embed_type": "projection"})
    return result


def _told_sizes(model) -> bool:
    """Whether the UNet is told sizes beside the text (SDXL)."""
    return isinstance(model, (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner))


def _one(values: list):
    return values[0] if len(set(values)) == 1 else values


def _cannot(model, what: str) -> QuantTuneError:
    return QuantTuneError(f"This {type(model).__name__} UNet has {what}, which diffusers' class "
                          "cannot be told; choose the ComfyUI format.")
