"""Variants of pictures: mirrored, cropped, in other light, each from the seed and its place alone.

Latents are encoded once and kept, so pictures are varied before that, as copies that stay the same
in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant import QuantTuneError
from .data import ROOM, TrainingImages, free_memory
from .sampling import generator_of

LIMITS = {"copies": (1, 1000), "flip": (0, 1), "crop": (0, 0.9), "colour": (0, 1)}
HUE = 0.1
"""Turn of the hue for a strength of 1; more would change what a thing is."""


@dataclass(frozen=True)
class Augmentation:
    """How pictures are varied.

    Attributes:
        copies: variants of each picture, the first one being itself.
        flip: share of the others that are mirrored left to right.
        crop: most of a side that is cut off; the rest is enlarged to the size before.
        colour: most that brightness, contrast and saturation change, as a share of them; the hue
            turns by up to a tenth of it.
        seed: of the draw.

    Raises QuantTuneError for a value out of its range.
    """

    copies: int = 4
    flip: float = 0.5
    crop: float = 0.1
    colour: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise QuantTuneError(f"The setting {name} of the augmentation is {value}, but it "
                                     f"has to be from {low} to {high}.")


def augmented(images: TrainingImages, how: Augmentation,
              watch: Callable[[int], None] = lambda done: None) -> TrainingImages:
    """Each picture followed by its variants; class images once and as they are.

    ``watch`` is told after each picture how many are done, and may end it by an exception. Raises
    QuantTuneError when the copies would not fit into memory.
    """
    needed = (how.copies - 1) * sum(p.nbytes for p, prior in zip(images.images, images.prior)
                                    if not prior)
    if needed > ROOM * free_memory():
        raise QuantTuneError(f"{how.copies} copies of {len(images.images):,} pictures would take "
                             f"{needed / 2**30:.1f} GiB more, which is not free; use fewer copies, "
                             "or fewer or smaller pictures.")
    pictures: list[Tensor] = []
    places: list[int] = []
    for place, (picture, prior) in enumerate(zip(images.images, images.prior)):
        for copy in range(1 if prior else how.copies):
            pictures.append(variant(picture, how, place, copy) if copy else picture)
            places.append(place)
        watch(place + 1)
    return TrainingImages(tuple(pictures), tuple(images.captions[i] for i in places),
                          images.subject, tuple(images.prior[i] for i in places))


def variant(picture: Tensor, how: Augmentation, place: int, copy: int) -> Tensor:
    """Variant ``copy`` of the picture ``[H, W, 3]`` at ``place`` in its set, of the same shape."""
    from torchvision.transforms.v2 import functional as tv

    draw = torch.rand(8, generator=generator_of(how.seed, "augment", place, copy),
                      dtype=torch.float64).tolist()
    found = picture.permute(2, 0, 1)
    height, width = found.shape[1:]
    if how.crop:
        kept = 1 - how.crop * draw[0]
        size = max(1, round(height * kept)), max(1, round(width * kept))
        top, left = (int(u * (full - part + 1)) for u, full, part
                     in zip(draw[1:3], (height, width), size))
        found = tv.resized_crop(found, top, left, *size, [height, width],
                                tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    if draw[3] < how.flip:
        found = tv.horizontal_flip(found)
    if how.colour:
        light, contrast, saturation, hue = (how.colour * (2 * u - 1) for u in draw[4:])
        found = tv.adjust_brightness(found, 1 + light)
        found = tv.adjust_contrast(found, 1 + contrast)
        found = tv.adjust_saturation(found, 1 + saturation)
        found = tv.adjust_hue(found, HUE * hue)
    return found.permute(1, 2, 0).contiguous()
