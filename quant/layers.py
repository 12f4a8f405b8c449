"""Which layers are quantized, which stay float, and which shortcuts are split in two parts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from .errors import QuantTuneError

FIRST_LAST = (
    # Names in ComfyUI's UNet, in diffusers' and DDPM's UNets, and in DiTs.
    "input_blocks.0.0",
    "out.2",
    "conv_in",
    "conv_out",
    "img_in",
    "x_embedder*",
    "patch_embed*",
    "patch_embedding*",
    "final_layer.linear",
    "proj_out",
    "head.head",
)
TIME_EMBEDDING = (
    "time_embed*",
    "label_emb*",
    "*.emb_layers.*",
    "temb.*",
    "*.temb_proj",
    "*.time_emb_proj",
    "time_embedding*",
    "add_embedding*",
    "time_in.*",
    "vector_in.*",
    "guidance_in.*",
    "t_embedder*",
    "y_embedder*",
    "time_text_embed*",
    "time_projection*",
)
QUANTIZE_PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "first_last": FIRST_LAST,
    "time_embedding": TIME_EMBEDDING,
    "first_last_time": FIRST_LAST + TIME_EMBEDDING,
}
"""Named choices of layers that stay float, as patterns of layer names."""


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a Linear or Conv2d, the layers whose weights are quantized."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name to module of every Linear and Conv2d, in the model's order."""
    return {name: m for name, m in model.named_modules() if name and is_quantizable(m)}


def keep_float(names: Iterable[str], preset_or_pattern: str) -> set[str]:
    """The layers that stay float.

    Args:
        names: all quantizable layers.
        preset_or_pattern: a key of `QUANTIZE_PRESETS`, or comma-separated shell patterns of layer
            names such as ``"input_blocks.1.*, *.proj_in"``. Empty keeps nothing.

    Raises:
        QuantTuneError: a pattern (or a preset other than "none") that matches no layer.
    """
    names = list(names)
    choice = preset_or_pattern.strip()
    if choice in QUANTIZE_PRESETS:
        patterns = QUANTIZE_PRESETS[choice]
        kept = {n for n in names if any(fnmatchcase(n, p) for p in patterns)}
        if patterns and not kept:
            raise QuantTuneError(
                f"The preset '{choice}' matches no layer of this model; use 'none' or a pattern "
                f"of its layer names, such as '{names[0] if names else '*'}'."
            )
        return kept
    kept = set()
    for pattern in filter(None, (p.strip() for p in choice.split(","))):
        matched = {n for n in names if fnmatchcase(n, pattern)}
        if not matched:
            raise QuantTuneError(
                f"The pattern '{pattern}' matches no layer of this model; "
                f"{_close_names(pattern, names)}."
            )
        kept |= matched
    return kept


def _close_names(pattern: str, names: list[str]) -> str:
    """A hint that ends a sentence: layer names like the pattern, or the presets."""
    bare = pattern.replace("*", "").strip(".")
    close = [n for n in names if bare and bare in n][:3]
    close = close or difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    if close:
        return f"similar names are {', '.join(close)}"
    return f"use one of the presets {', '.join(QUANTIZE_PRESETS)}"


def scale_shape(
    shape: tuple[int, ...], split: int | None = None, groups: int = 1
) -> tuple[int, int]:
    """``(P * out, in)`` of a weight ``[out, in / groups, ...]``: how many scales it takes."""
    return shape[0] * (1 if split is None else 2), shape[1] * groups


def scale_shapes(
    model: nn.Module, splits: Mapping[str, int] | None = None
) -> dict[str, tuple[int, int]]:
    """``(P * out, in)`` of every quantizable layer of a model.

    Args:
        model: any module, meta device included.
        splits: layer name to number of input channels of its first part.
    """
    splits = splits or {}
    return {
        name: scale_shape(tuple(m.weight.shape), splits.get(name), getattr(m, "groups", 1))
        for name, m in quantizable_layers(model).items()
    }


_LDM_SHORTCUT = re.compile(r"output_blocks\.(\d+)\.0\.skip_connection")
_DDPM_SHORTCUT = re.compile(r"up\.(\d+)\.block\.(\d+)\.nin_shortcut")


def shortcut_splits(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Shortcut convolutions that read two joined feature maps, and where the first one ends.

    The decoder of a UNet joins its own feature map with one of the encoder, whose ranges differ
    widely; Q-Diffusion quantizes the two groups of input channels of the shortcut separately.

    Args:
        shapes: layer name to weight shape, in the naming of ComfyUI's UNet (``output_blocks.3.0.
            skip_connection``) or of DDPM's (``up.1.block.0.nin_shortcut``).

    Returns:
        Layer name to number of input channels that come from the decoder's previous block.
        Empty for models without such layers.
    """
    order: list[tuple[str, str]] = []
    ldm = sorted((int(m[1]), n) for n in shapes if (m := _LDM_SHORTCUT.fullmatch(n)))
    for index, name in ldm:
        before = f"output_blocks.{index - 1}.0.out_layers.3"
        order.append((name, before if index else _middle_output(shapes)))
    ddpm = sorted((-int(m[1]), int(m[2]), n) for n in shapes if (m := _DDPM_SHORTCUT.fullmatch(n)))
    before = "mid.block_2.conv2"
    for level, block, name in ddpm:
        order.append((name, before))
        before = f"up.{-level}.block.{block}.conv2"
    splits = {}
    for name, before in order:
        if before in shapes and 0 < shapes[before][0] < shapes[name][1]:
            splits[name] = shapes[before][0]
    return splits


def _middle_output(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The last residual block of the middle: its name depends on whether there is attention."""
    found = [n for n in shapes if re.fullmatch(r"middle_block\.\d+\.out_layers\.3", n)]
    return max(found, default="")
