"""A UNet of the host in diffusers' terms: what its tensors are called, and its ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.supported_models
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


def host_config(path: Path):
    """The host's model config for a ``config.json`` of diffusers' `UNet2DConditionModel`.

    Raises:
        QuantTuneError: no such file, or a UNet that is not of SD1.x, SD2.x or SDXL's kind.
    """
    def wrong(what: str) -> QuantTuneError:
        return QuantTuneError(f"The file {path} {what}, so that its UNet cannot be built; download "
                              "it again, or take a model of SD1.x, SD2.x or SDXL.")

    try:
        told = json.loads(path.read_text("utf-8"))
        widths, blocks = list(told["block_out_channels"]), told.get("layers_per_block", 2)
        blocks = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
        deep = told.get("transformer_layers_per_block", 1)
        deep = [deep] * len(widths) if isinstance(deep, int) else list(deep)
        attends = ["CrossAttn" in kind for kind in told["down_block_types"]]
        levels = [d * a for d, a in zip(deep, attends, strict=True)]
        heads = told["attention_head_dim"]
        per_level = heads if isinstance(heads, list) else [heads] * len(widths)
        sizes = {w // h for w, h in zip(widths, per_level, strict=True)}
        embedded = told.get("projection_class_embeddings_input_dim")
        config = {
            "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True,
            "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False,
            "in_channels": int(told["in_channels"]), "out_channels": int(told["out_channels"]),
            "model_channels": widths[0], "channel_mult": [w // widths[0] for w in widths],
            "num_res_blocks": blocks, "context_dim": int(told["cross_attention_dim"]),
            "transformer_depth": [d for d, n in zip(levels, blocks) for _ in range(n)],
            "transformer_depth_output": [d for d, n in zip(levels, blocks) for _ in range(n + 1)],
            "transformer_depth_middle": deep[-1], "adm_in_channels": embedded,
            "use_linear_in_transformer": told.get("use_linear_projection") is True,
            **({"num_classes": "sequential"} if embedded is not None else {}),
        }
        numbers = [*widths, *blocks, *deep, *per_level]
        if len(blocks) != len(widths) or not all(
                type(n) is int and 0 < n < 2**16 for n in numbers):
            raise ValueError("sizes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError,
            RecursionError):
        raise wrong("cannot be read as the settings of a UNet") from None
    families = comfy.supported_models
    if told.get("addition_embed_type") == "text_time":
        family = families.SDXLRefiner if config["context_dim"] == 1280 else families.SDXL
    else:
        family = families.SD20 if config["use_linear_in_transformer"] else families.SD15
    result = family(dict(config))
    result.unet_config.update(config)
    result.unet_config |= ({"num_heads": heads, "num_head_channels": -1}
                           if not isinstance(heads, list) else
                           {"num_heads": -1, "num_head_channels": max(sizes)})
    if isinstance(heads, list) and len(sizes) > 1:
        raise wrong("gives its levels heads of different sizes")
    return result


def _told_sizes(model) -> bool:
    """Whether the UNet is told sizes beside the text (SDXL)."""
    return isinstance(model, (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner))


def _one(values: list):
    return values[0] if len(set(values)) == 1 else values


def _cannot(model, what: str) -> QuantTuneError:
    return QuantTuneError(f"This {type(model).__name__} UNet has {what}, which diffusers' class "
                          "cannot be told; choose the ComfyUI format.")
