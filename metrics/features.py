"""What sets of pictures are compared by: a network that turns pictures into feature vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite


class FeatureNetwork(Protocol):
    """A network that looks at pictures.

    Attributes:
        name: of the network, for reports.
        similarity: what the mean pairwise cosine of its features is called ("CLIP-I", "DINO-I").
    """

    name: str
    similarity: str

    def features(self, pictures: Tensor) -> Tensor:
        """Feature vectors ``[n, d]`` float32 on the CPU of pictures ``[n, 3, h, w]`` in 0..1.

        Pictures come in any size; the network scales them to its own.
        """
        ...

    def logits(self, features: Tensor) -> Tensor | None:
        """Class logits ``[n, classes]`` of ``features``; None when the network names no classes."""
        ...


def fitted_square(pictures: Tensor, size: int) -> Tensor:
    """Pictures ``[n, 3, h, w]`` scaled to ``[n, 3, size, size]``, the middle square kept.

    Bicubic with antialiasing, so that FID sees no artefacts of the scaling (Parmar et al. 2022);
    the same that the host does for CLIP.
    """
    height, width = pictures.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = [max(size, round(side * scale)) for side in (height, width)]
        pictures = torch.nn.functional.interpolate(pictures, size=shape, mode="bicubic",
                                                   antialias=True).clamp(0, 1)
        top, left = ((side - size) // 2 for side in shape)
        pictures = pictures[..., top:top + size, left:left + size]
    return pictures


def collect_features(network: FeatureNetwork, batches: Iterable[Tensor],
                     each: Callable[[int], None] | None = None) -> Tensor:
    """Features ``[n, d]`` of a stream of batches ``[any, 3, h, w]``.

    Only the features stay in memory (4 KB a picture for 1024 of them). each: called with the
    number of pictures done after each batch; what it raises ends the stream.

    Raises QuantTuneError when a batch or its features are not finite. ``[0, 0]`` when there is no
    picture.
    """
    found, done = [], 0
    for batch in batches:
        if not is_finite(batch):
            raise QuantTuneError("The images hold NaN or infinite values; check what makes them.")
        features = network.features(batch.float().clamp(0, 1))
        if not is_finite(features):
            raise QuantTuneError(f"The features of the {network.name} hold NaN or infinite values; "
                                 "its weights are damaged or do not fit its precision.")
        found.append(features)
        done += len(batch)
        if each is not None:
            each(done)
    return torch.cat(found) if found else torch.zeros(0, 0)
