"""Latents to pixels by overlapping tiles, straight into the picture that is handed on.

A decoder's group norms take their statistics over all they see, so tiles decoded by themselves come
out in tones of their own, which blending only hides. Here they all use one set of statistics,
measured beforehand on the whole latent, thinned out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import comfy.model_management
import torch

from ..quant.paging import give_back
from .compat import device_context
from .shared_norms import SharedNorms
from .tiles import Tiling, tiling

LARGEST_TILE = 64
"""Latents a side: the attention in the middle of the decoder grows with the fourth power of it."""
OVERLAP = 8
"""Latents that neighbours share."""
THINNED = 4
"""Every so many latents one is looked at to measure statistics; of smaller pictures, more."""


def decode_tiling(height: int, width: int, tile: int | None, scale: int) -> Tiling:
    """Tiles for `decode_into`, in pixels of the decoded picture.

    Args:
        height, width: of the latent.
        tile: latents a side, or None for the whole latent at once.
        scale: pixels a latent becomes on each side.
    """
    overlap = 0
    if tile is None:
        tile = max(height, width)
    else:
        tile = min(tile, LARGEST_TILE)
        overlap = min(OVERLAP, tile // 4)
    return tiling(height * scale, width * scale, tile * scale, overlap * scale, scale)


def decode_into(picture: torch.Tensor, vae, latent: torch.Tensor, tiles: Tiling,
                tile_done: Callable[[], None] = lambda: None) -> None:
    """Decode one latent; beside ``picture`` only a tile's worth of memory is used.

    Args:
        picture: ``[height, width, 3]`` float32, zeros; receives values in 0..1.
        vae: the host's VAE.
        latent: ``[1, channels, rows, columns]``; what it has beyond the picture is cut off.
        tiles: from `decode_tiling`; a single one is decoded as the host decodes.
        tile_done: called after each tile.
    """
    if len(tiles) == 1:
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture.copy_(vae.decode(latent)[0, :picture.shape[0], :picture.shape[1], :3])
        tile_done()
        return
    scale = vae.spacial_compression_decode()
    shape = (1, latent.shape[1], *(side // scale for side in tiles.shape))
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=vae.memory_used_decode(shape, vae.vae_dtype),
        force_full_load=vae.disable_offload)
    whole = picture.movedim(-1, 0)

    def decode(source: torch.Tensor) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return vae.first_stage_model.decode(source.to(vae.device, vae.vae_dtype))

    with device_context(vae.device):
        norms = SharedNorms(vae.first_stage_model)
        with norms.measured():
            for source in _thinned(latent, shape[2:]):
                decode(source)
                give_back()
        with norms.applied():
            for tile in tiles:
                part = decode(latent[..., _shrunk(tile.rows, scale), _shrunk(tile.columns, scale)])
                tile.add(whole, vae.process_output(part.to(whole.device, torch.float32))[0, :3])
                del part
                give_back()
                tile_done()
    picture.clamp_(0, 1)  # weights sum to one but for their last bit


def _thinned(latent: torch.Tensor, most: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Equal parts of a latent, each with so few of its rows and columns that it is no larger than
    ``most``, the size of a tile."""
    rows, columns = ([part[((torch.arange(min(side, len(part))) + 0.5) * len(part)
                            / min(side, len(part))).long()]
                      for part in torch.arange(length).chunk(-(-length // (THINNED * side)))]
                     for length, side in zip(latent.shape[2:], most))
    for row in rows:
        for column in columns:
            yield latent[:, :, row][..., column]


def _shrunk(pixels: slice, scale: int) -> slice:
    return slice(pixels.start // scale, pixels.stop // scale)
