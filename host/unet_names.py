"""A Stable Diffusion UNet by the names and shapes of its tensors, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import comfy.model_detection
import comfy.supported_models
import comfy.utils
import torch

from ..quant import QuantTuneError
from .lora_keys import brief

LDM, DIFFUSERS = "ldm", "diffusers"
"""Whose names a UNet's tensors have: those of its first checkpoints, which are the host's, or
diffusers'."""
SIGNS = {LDM: ("input_blocks.0.0.weight", "out.2.weight"),
         DIFFUSERS: ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight")}
"""Tensors that every UNet has, and no text encoder, VAE or ControlNet."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
"""Before the names of a UNet, where several models of one file would fit; the first is taken."""
CLASS_LABELS = "class_embedding.weight"
"""An embedding of noise levels, which the host's own table does not name."""
_DOWN = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\..+")
_MIDDLE = re.compile(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\..+")


def find_unet(names: Iterable[str]) -> tuple[str, str] | None:
    """The UNet among the tensors of a file.

    Returns:
        What stands before the names of its tensors, and `LDM` or `DIFFUSERS`; None without a UNet.
    """
    names = set(names)
    found = []
    for kind, signs in SIGNS.items():
        for name in names:
            if name.endswith(signs[0]):
                prefix = name.removesuffix(signs[0])
                if all(prefix + sign in names for sign in signs):
                    order = PREFIXES.index(prefix) if prefix in PREFIXES else len(PREFIXES)
                    found.append((order, len(prefix), prefix, kind))
    return min(found)[2:] if found else None


def host_names(names: Iterable[str]) -> dict[str, str]:
    """The host's name of every tensor that diffusers' UNet of this build may have.

    What is where is read from the names themselves, so that pruned UNets come out right as well.

    Args:
        names: of the tensors in diffusers' `UNet2DConditionModel`.
    """
    resnets: dict[tuple[str, int], set[int]] = {}
    depths: dict[tuple[str, int, int], int] = {}
    middle = -2
    for name in names:
        if name.startswith("mid_block.resnets.0."):
            middle = max(middle, -1)
        elif match := _MIDDLE.fullmatch(name):
            middle = max(middle, int(match[1]) + 1)
        elif match := _DOWN.fullmatch(name):
            side, level, what, index, rest = match.groups()
            if what == "resnets":
                resnets.setdefault((side, int(level)), set()).add(int(index))
            elif block := _BLOCK.fullmatch(rest):
                key = side, int(level), int(index)
                depths[key] = max(depths.get(key, 0), int(block[1]) + 1)
    levels = sum(side == "down" for side, _ in resnets)
    counts = [len(resnets.get(("down", level), ())) for level in range(levels)]
    config = {
        "num_res_blocks": counts, "channel_mult": [1] * levels,
        "transformer_depth": [depths.get(("down", level, i), 0)
                              for level, count in enumerate(counts) for i in range(count)],
        # The host's list runs from the last block of the decoder to its first.
        "transformer_depth_output": [depths.get(("up", level, i), 0)
                                     for level, count in enumerate(reversed(counts))
                                     for i in range(count + 1)][::-1],
        "transformer_depth_middle": middle,
    }
    most = max([middle, *depths.values()], default=0)
    if levels > 16 or most > 256 or sum(counts) > 256:  # a hostile file; no UNet is like that
        return {}
    return {**comfy.utils.unet_to_diffusers(config), CLASS_LABELS: "label_emb.weight"}


def detect(shapes: Mapping[str, tuple[int, ...]], where: str, config: Mapping | None = None
           ) -> tuple[type, dict]:
    """The host's family of a UNet, and the arguments of its UNet as far as shapes tell.

    Families are known by their full sizes to the host; one of another size is taken for the
    family that is built the same way.

    Args:
        shapes: tensor's name in the host, without prefix, to shape.
        where: what to call the UNet in messages.
        config: of diffusers, if there is one: it tells models on images from those on sizes.

    Raises:
        QuantTuneError: no UNet of the Stable Diffusion families.
    """
    if empty := next((name for name, shape in shapes.items() if 0 in shape), None):
        raise QuantTuneError(f"{where} has no numbers in '{brief(empty)}'; download it again or "
                             "choose another file.")
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        found = comfy.model_detection.detect_unet_config(meta, "")
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise QuantTuneError(
            f"{where} is not whole or no Stable Diffusion UNet ({brief(error)} is missing or odd); "
            "download it again or choose another file.") from error
    if found is None or "model_channels" not in found:
        raise QuantTuneError(f"{where} is no Stable Diffusion UNet; load other models with "
                             "ComfyUI's own loader.")
    if "label_emb.weight" in shapes:
        raise QuantTuneError(f"{where} is an SD x4 upscaler's; load it with 'Load SD 4x "
                             "Upscaler'.")
    if found.get("use_temporal_attention") or found.get("use_temporal_resblock"):
        raise QuantTuneError(f"{where} is a video model's; load it with ComfyUI's own loader and "
                             "put 'Quantize UNet' behind it.")
    known = (f for f in comfy.supported_models.models if f.matches(found, meta))
    return next(known, None) or _like(found, config or {}), found


def _like(found: Mapping, config: Mapping) -> type:
    """The family that a UNet of unknown size is built like."""
    models = comfy.supported_models
    if not found.get("adm_in_channels"):
        return models.SD20 if found["use_linear_in_transformer"] else models.SD15
    depths = found["transformer_depth"]
    told = config.get("class_embed_type"), config.get("addition_embed_type")
    # SD2.x on images has attention at the top and none at the bottom; SDXL has none at the top, the
    # refiner at neither end.
    if told == ("projection", None) or (told == (None, None) and depths[0] and not depths[-1]):
        return models.SD21UnclipL
    return models.SDXLRefiner if depths[0] == depths[-1] == 0 else models.SDXL
