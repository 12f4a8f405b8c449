"""Every reader of files that the pack has."""

from __future__ import annotations

from collections.abc import Iterable

from . import (
    readers_host,
    readers_listed,
    readers_lora,
    readers_pickled,
    readers_pictures,
    readers_quant,
    readers_upscaler,
)
from .run import Reader

FILES = (
    readers_quant,
    readers_pickled,
    readers_host,
    readers_lora,
    readers_upscaler,
    readers_pictures,
    readers_listed,
)
"""In the order of the results' table."""
WITH_HOST = (readers_host, readers_lora, readers_upscaler, readers_listed)
"""Those whose readers import ComfyUI's models."""


def readers() -> dict[str, Reader]:
    """By name."""
    return {reader.name: reader for file in FILES for reader in file.readers()}


def preload(names: Iterable[str]) -> None:
    """Import what these readers need, once for all processes that are forked from this one."""
    if not {reader.name for file in WITH_HOST for reader in file.readers()} & set(names):
        return
    import bitsandbytes.functional  # noqa: F401
    import comfy.sd  # noqa: F401
    import diffusers  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torchmetrics.functional.image.lpips  # noqa: F401
    import torchvision.models  # noqa: F401
    import transformers  # noqa: F401

    import quanttune.host.build
    import quanttune.host.load_unet
    import quanttune.host.load_upscaler
    import quanttune.training.trainer  # noqa: F401
