"""Latents to pixels by overlapping tiles, straight into the picture that is handed on.

A decoder's group norms take their statistics over all they see, so tiles decoded by themselves come
out in tones of their own, which blending only hides. Here they all use one set of statistics,
measured beforehand on pieces from all over the latent, or on all of a small one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

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
SAMPLE = 16
"""Latents a side of the pieces of a picture that statistics are measured on."""
SAMPLES = 4
"""How many batches of pieces are looked at, each as large as the largest tile."""
MARGIN = 0.25
"""The share of a piece at either end that does not count, as the decoder sees a border there."""


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
    """Decode one latent; beside ``picture`` only the largest tile's worth of memory is used.

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
    # Statistics take the largest tile's worth, however small the tiles are.
    shape = (1, latent.shape[1], LARGEST_TILE, LARGEST_TILE)
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=vae.memory_used_decode(shape, vae.vae_dtype),
        force_full_load=vae.disable_offload)
    whole = picture.movedim(-1, 0)

    def decode(source: torch.Tensor) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return vae.first_stage_model.decode(source.to(vae.device, vae.vae_dtype))

    with device_context(vae.device):
        # A decoder's blocks grow in size from stage to stage: what the last one's leave is of no
        # use to the next one, and took 160 MiB of the full-size upscaler's.
        relief = give_back if vae.device.type == "cpu" else None
        norms = SharedNorms(vae.first_stage_model, relief)
        sources, margins = _samples(latent)
        with norms.measured(margins):
            for source in sources:
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


def _samples(latent: torch.Tensor) -> tuple[Iterable[torch.Tensor], tuple[float, float]]:
    """What of a latent its statistics are measured on, and the margins that do not count.

    Where the latent is no larger than the largest tile, that is all of it; else it is `SAMPLES`
    batches ``[pieces, channels, SAMPLE or less, SAMPLE or less]``, each with as many latents as the
    largest tile has: untouched, so that detail stays what it is; spread over the whole latent, one
    piece at random in each of its equal parts, the same ones every time. Pieces that reach over the
    latent's ends are mirrored there, so that all places count alike.

    Args:
        latent: ``[1, channels, rows, columns]``.
    """
    size = latent.shape[2:]
    if size.numel() <= LARGEST_TILE ** 2:
        return [latent], (0, 0)
    return _batches(latent), tuple(MARGIN * (side > SAMPLE) for side in size)


def _batches(latent: torch.Tensor) -> Iterator[torch.Tensor]:
    size = latent.shape[2:]
    generator = torch.Generator().manual_seed(0)
    most = LARGEST_TILE ** 2 // math.prod(min(SAMPLE, side) for side in size)
    short = min(range(2), key=lambda axis: size[axis])
    counts = [max(1, min(LARGEST_TILE, size[short]) // SAMPLE)] * 2
    counts[1 - short] = most // counts[short]
    for _ in range(SAMPLES):
        pieces = []
        for part in itertools.product(*map(range, counts)):
            piece = latent
            for dim, at, count, where in zip((2, 3), part, counts,
                                             torch.rand(2, generator=generator).tolist()):
                side = latent.shape[dim]
                index = _around(int((at + where) / count * side), side)
                piece = piece.index_select(dim, index.to(piece.device))
            pieces.append(piece)
        yield torch.cat(pieces)


def _around(centre: int, size: int) -> torch.Tensor:
    """The `SAMPLE` places around one of a side, mirrored at its ends, or all where it has fewer."""
    if size <= SAMPLE:
        return torch.arange(size)
    index = (torch.arange(SAMPLE) + centre - SAMPLE // 2).abs()
    return size - 1 - (size - 1 - index).abs()


def _shrunk(pixels: slice, scale: int) -> slice:
    return slice(pixels.start // scale, pixels.stop // scale)
