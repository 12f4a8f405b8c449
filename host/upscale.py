"""Pictures four times as large by Stable Diffusion's x4 upscaler, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.paging import give_back
from .explain import explained
from .tiled_decode import decode_into, decode_tiling
from .tiled_sampling import TiledSampling
from .tiles import Tiling, mirrored, padded, tiling
from .upscale_inputs import (
    SCALE,
    check_conditioning,
    check_image,
    check_models,
    check_patches,
    check_settings,
)

GRID = 8
"""The UNet halves its input three times, so latents and tiles have multiples of this as sides."""
PREVIEW = 512
"""Longest side of a preview, in latents."""
SEEDS = 2**63
"""Seeds count from 0 again here: torch takes twice as many, and samplers add to theirs."""
Report = Callable[[int, int, object], None]
"""What is done, of how much, and a picture in the host's form or None."""


def upscale(model, vae, image: torch.Tensor, positive: Sequence, negative: Sequence, *,
            noise_level: int = 20, steps: int = 25, cfg: float = 9.0, seed: int = 0,
            sampler: str = "ddim", scheduler: str = "ddim_uniform", tile_size: int = 144,
            overlap: int = 16, tile_vae: bool = True,
            progress: Report | None = None) -> torch.Tensor:
    """Enlarge each picture of a batch four times.

    What it computes is what diffusers' ``StableDiffusionUpscalePipeline`` does: the image in -1..1
    gets noise of ``noise_level`` (of level 0, too), goes beside the latent into the UNet, which is
    told the level as a class, and the VAE decodes. Noise is drawn as the host does: of the latent
    from the seed, of the image from the seed minus 10.

    Picture i of a batch takes ``seed + i`` (modulo `SEEDS`): it is what the picture alone gives
    with that seed.

    Args:
        model: the host's MODEL of an x4 upscaler.
        vae: its VAE.
        image: IMAGE ``[pictures, height, width, channels]``. Grey ones become RGB; a fourth channel
            (alpha) is enlarged by bicubic interpolation and put back.
        positive, negative: CONDITIONING, without places: see `upscale_inputs.NOT_CROPPED`.
        noise_level: 0 to 350.
        steps, cfg, seed, sampler, scheduler: as in the host's KSampler.
        tile_size, overlap: in pixels of ``image``, rounded to multiples of 8.
        tile_vae: decode by tiles as well, of at most `tiled_decode.LARGEST_TILE` latents a side.
        progress: told after each tile.

    Returns ``[pictures, 4 height, 4 width, 3 or 4]`` float32 in 0..1 on the host's intermediate
    device. Raises QuantTuneError for inputs that do not fit each other.
    """
    check_models(model, vae)
    image = check_image(image)
    check_settings(model, noise_level=noise_level, steps=steps, sampler=sampler,
                   scheduler=scheduler, tile_size=tile_size, overlap=overlap, cfg=cfg)
    positive, negative = check_conditioning(model, positive, negative)
    count, height, width, channels = image.shape
    tiles = tiling(padded(height, GRID), padded(width, GRID), tile_size, overlap, GRID)
    check_patches(model, len(tiles))
    decoding = decode_tiling(padded(height, GRID), padded(width, GRID),
                             tile_size if tile_vae else None, SCALE)
    host = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, 1.0,
                                   model.model_options)
    bar = Bar(progress, count, len(host.sigmas) - 1, len(tiles), len(decoding))
    latents = []
    for index, picture in enumerate(image):
        own_seed = (seed + index) % SEEDS  # a seed that comes by a link may be any
        low_res = noised(model, picture, noise_level, own_seed)
        give_back()
        attached = TiledSampling(tiles, low_res, noise_level, bar.tile).attach(model)
        latents.append(_sampled(attached, host, tiles, positive, negative, cfg,
                                own_seed, bar, (height, width)))
        del low_res, attached
        give_back()
    device = comfy.model_management.intermediate_device()
    result = torch.zeros(count, SCALE * height, SCALE * width, 4 if channels == 4 else 3,
                         device=device)
    for index in range(count):
        decode_into(result[index, ..., :3], vae, latents[index], decoding, bar.decoded)
        latents[index] = None
        if not is_finite(result[index]):
            raise QuantTuneError("The VAE drew NaN in place of a picture; get the upscaler's file "
                                 "again, or where ComfyUI runs with --fp16-vae, start it without.")
        if channels == 4:
            result[index, ..., 3] = _enlarged(image[index, ..., 3]).to(device)
    return result


def noised(model, picture: torch.Tensor, level: int, seed: int) -> torch.Tensor:
    """A picture as the UNet is given it: ``[1, 3, height, width]`` float32, about -1..1.

    It is mirrored at its right and lower end up to multiples of 8, and gets noise of ``level`` by
    the model's low-resolution schedule.
    """
    rgb = picture[..., :3].float().cpu()
    if rgb.shape[-1] == 1:
        rgb = rgb.expand(-1, -1, 3)
    height, width = rgb.shape[:2]
    rgb = rgb[mirrored(height, padded(height, GRID))][:, mirrored(width, padded(width, GRID))]
    low_res = rgb.movedim(-1, 0)[None].contiguous() * 2 - 1
    return model.model.noise_augmentor.q_sample(low_res, torch.tensor([level]), seed=seed - 10)


def _sampled(model, host, tiles: Tiling, positive, negative, cfg: float, seed: int, bar: Bar,
             size: tuple[int, int]) -> torch.Tensor:
    """The latent ``[1, 4, height, width]`` of one picture, as the VAE takes it."""
    # Zeros that take no memory: the host adds them to its noise, and never writes into them.
    empty = torch.zeros(1).expand(1, 4, tiles.vertical.size, tiles.horizontal.size)
    with explained("The upscaler cannot run with these inputs ({reason}); connect model, VAE and "
                   "conditioning that belong together."):
        latent = comfy.samplers.sample(
            model, comfy.sample.prepare_noise(empty, seed), positive, negative, cfg,
            model.load_device, comfy.samplers.sampler_object(host.sampler), host.sigmas,
            model.model_options, latent_image=empty, callback=bar.step(model, size),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    if not is_finite(latent):
        raise QuantTuneError("The upscaler's result is NaN or infinite; take another scheduler, "
                             "more steps or a lower cfg, or get its file again.")
    return latent.to(comfy.model_management.intermediate_device())


def _enlarged(alpha: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(alpha[None, None].float(), scale_factor=SCALE,
                                           mode="bicubic")[0, 0].clamp_(0, 1)


class Bar:
    """Counts tiles over pictures, steps and decoding, and shows the latent after each step.

    A sampler may ask for more than one prediction a step; what is told never runs ahead of the
    step or goes back.

    Args:
        report: see `Report`, or None to tell nobody.
        pictures, steps: how many there are.
        tiles: of each step.
        decoding: tiles of each decoding.
    """

    def __init__(self, report: Report | None, pictures: int, steps: int, tiles: int,
                 decoding: int):
        self.report, self.steps, self.tiles = report, steps, tiles
        self.sampling = pictures * steps * tiles
        self.total = self.sampling + pictures * decoding
        self.start, self.at, self.pictures_done, self.decodings = 0, 0, 0, 0

    def tile(self) -> None:
        """A tile was predicted."""
        self.at += 1
        self._tell(min(self.start + min(self.at, self.tiles - 1),
                       self.pictures_done * self.steps * self.tiles))

    def step(self, model, size: tuple[int, int]) -> Callable:
        """The host's callback for the next picture, whose latent is shown up to ``size``."""
        first = self.start = self.pictures_done * self.steps * self.tiles
        self.at = 0
        self.pictures_done += 1
        previewer = self.report and latent_preview.get_previewer(
            model.load_device, model.get_model_object("latent_format"))
        thin = -(-max(size) // PREVIEW)

        def done(step: int, clean: torch.Tensor, noisy: torch.Tensor, steps: int) -> None:
            picture = None
            if previewer:
                shown = clean[:1, :, :size[0]:thin, :size[1]:thin]
                picture = previewer.decode_latent_to_preview_image("JPEG", shown)
            self.at, self.start = 0, first + min(step + 1, self.steps) * self.tiles
            self._tell(self.start, picture)

        return done

    def decoded(self) -> None:
        """A tile was decoded."""
        self.decodings += 1
        self._tell(self.sampling + self.decodings)

    def _tell(self, value: int, picture=None) -> None:
        if self.report is not None:
            self.report(min(value, self.total), self.total, picture)
