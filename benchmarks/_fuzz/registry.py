"""Every reader of files that the pack has."""

from __future__ import annotations

from collections.abc import Iterable

from . import readers_host, readers_listed, readers_pictures, readers_quant
from .run import Reader


def readers() -> dict[str, Reader]:
    """By name, in the order of the results' table."""
    found = [
        *readers_quant.readers(),
        *readers_host.readers(),
        *readers_pictures.readers(),
        *readers_listed.readers(),
    ]
    return {reader.name: reader for reader in found}


def preload(names: Iterable[str]) -> None:
    """Import what these readers need, once for all processes that are forked from this one."""
    if not {r.name for r in (*readers_host.readers(), *readers_listed.readers())} & set(names):
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
