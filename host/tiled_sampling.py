"""The x4 upscaler's prediction made tile by tile, inside the host's ordinary sampling."""

from __future__ import annotations

from collections.abc import Callable

import comfy.conds
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ..quant.paging import give_back
from .tiles import Tile, Tiling

KEY = "quanttune_tiles"


class TiledSampling:
    """Lets a MODEL see one tile at a time, while samplers see the whole latent.

    Only the predictions for each conditioning are made by tiles and blended (`tiles`). Guidance,
    its patches and the sampler work on the whole latent, so every sampler does what it does
    untiled: ancestral and SDE ones, and CFG++, which keeps the unconditional prediction for itself.

    The low-resolution image comes with its noise already in it: it is drawn once for the whole
    picture, so that tiles agree where they overlap.

    Args:
        tiles: of the latent.
        low_res: ``[1, 3, height, width]``, the noised image in about -1..1, the latent's size.
        level: of the noise in it, which the model is told as its class.
        tile_done: called after each tile that the model has predicted.
    """

    def __init__(self, tiles: Tiling, low_res: torch.Tensor, level: int,
                 tile_done: Callable[[], None]):
        self.tiles, self.low_res, self.level = tiles, low_res, level
        self.tile_done = tile_done
        self._caches: list = []

    def attach(self, model):
        """A clone of ``model`` that samples by tiles; the MODEL given is left as it is."""
        model = model.clone()
        for kind, wrapper in ((WrappersMP.PREPARE_SAMPLING, self._prepare),
                              (WrappersMP.SAMPLER_SAMPLE, self._condition),
                              (WrappersMP.CALC_COND_BATCH, self._predict)):
            model.add_wrapper_with_key(kind, KEY, wrapper)
        if model.load_device.type == "cpu":
            model.set_model_input_block_patch(_relieved)
            model.set_model_output_block_patch(_relieved)
        return model

    def _prepare(self, executor, model, noise_shape, *args, **kwargs):
        """Ask the host's memory management for a tile's worth of activations."""
        return executor(model, [*noise_shape[:2], *self.tiles.shape], *args, **kwargs)

    def _condition(self, executor, guider, *args, **kwargs):
        """Give every conditioning the one low-resolution image and its level."""
        device = guider.model_patcher.load_device
        image = comfy.conds.CONDNoiseShape(self.low_res.to(device))
        level = comfy.conds.CONDRegular(torch.tensor([self.level], device=device))
        for conds in guider.conds.values():
            for cond in conds:
                cond["model_conds"] = {**cond["model_conds"], "c_concat": image, "y": level}
        return executor(guider, *args, **kwargs)

    def _predict(self, executor, model, conds, x, timestep, model_options):
        """Predictions of the clean latent for each of ``conds``, blended from tiles."""
        if len(self.tiles) == 1:
            comfy.model_management.throw_exception_if_processing_interrupted()
            whole = executor(model, conds, x, timestep, model_options)
            self.tile_done()
            return whole
        whole = [torch.zeros_like(x) for _ in conds]
        give_back()  # of what the host prepared for the whole latent
        for tile, options in zip(self.tiles, self._options(model, model_options)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            parts = executor(model, [_cropped(c, tile) for c in conds],
                             tile.crop(x).contiguous(), timestep, options)
            for total, part in zip(whole, parts):
                tile.add(total, part)
            del parts
            give_back()
            self.tile_done()
        return whole

    def _options(self, model, options: dict) -> list[dict]:
        """The options for each tile: *EasyCache* gets a cache of its own for each.

        It adds what the model changed at its last call to what it gets at the next one, and would
        take that from one tile to another.
        """
        given = options.get("transformer_options", {}).get("easycache")
        if given is None:
            return [options] * len(self.tiles)
        if not self._caches:
            self._caches = [given.clone().prepare_timesteps(model.model_sampling)
                            for _ in range(len(self.tiles))]
        # The host tells the user how many steps the one that it knows of has left out.
        given.total_steps_skipped = sum(c.total_steps_skipped for c in self._caches) // len(
            self._caches)
        for cache in self._caches:
            cache.skip_current_step = False  # as the host does with that one
        return [{**options, "transformer_options": {**options["transformer_options"],
                                                    "easycache": cache}}
                for cache in self._caches]


def _relieved(*parts):
    """Give back what the blocks before left, which later ones of another size have no use for."""
    give_back()
    return parts[0] if len(parts) == 2 else parts[:2]


def _cropped(conds: list[dict] | None, tile: Tile) -> list[dict] | None:
    """Conditionings with what has the latent's shape cut to the tile."""
    if conds is None:
        return None
    return [{**cond, "model_conds": {name: _part(value, tile)
                                     for name, value in cond["model_conds"].items()}}
            for cond in conds]


def _part(value, tile: Tile):
    if isinstance(value, comfy.conds.CONDNoiseShape):
        return comfy.conds.CONDNoiseShape(tile.crop(value.cond))
    return value
