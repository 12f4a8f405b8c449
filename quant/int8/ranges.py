"""Static activation ranges, a set for each of N equal intervals of the denoising timesteps.

Ranges of a diffusion model drift with the noise level, so they are routed as TuneQDM routes its
experts: ``bucket = floor(t * N / T)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import QuantTuneError
from .activation import tensor_qparams

Qparams = list[tuple[Tensor, Tensor]]
"""``(scale, zero_point)`` of each part of a layer's input."""


@dataclass(frozen=True)
class ActivationRanges:
    """Calibrated ranges of a model's activations.

    Attributes:
        layers: layer name to float32 ``[N, P, 2]``: for each bucket and each part of the layer's
            input channels (two with a split, else one) the lowest and the highest value, 0
            included. Layers that are not there quantize at run time.

    Raises:
        QuantTuneError: shapes that do not agree, or a range that is not one.
    """

    layers: Mapping[str, Tensor]
    _known: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise QuantTuneError("There are no activation ranges; calibrate at least one layer.")
        for name, ranges in self.layers.items():
            if (
                ranges.dim() != 3
                or ranges.dtype != torch.float32
                or not 0 < ranges.shape[0] == self.num_buckets
                or ranges.shape[1] not in (1, 2)
                or ranges.shape[2] != 2
            ):
                raise QuantTuneError(
                    f"The activation ranges of layer {name} are {list(ranges.shape)} "
                    f"{ranges.dtype}, not [{self.num_buckets}, 1 or 2, 2] float32."
                )
            low, high = ranges.unbind(-1)
            # NaN fails both comparisons.
            if not bool((high - low).isfinite().all() & (low <= 0).all() & (high >= 0).all()):
                raise QuantTuneError(
                    f"An activation range of layer {name} is not finite or does not contain 0."
                )

    @property
    def num_buckets(self) -> int:
        """N."""
        return next(iter(self.layers.values())).shape[0]

    def select(
        self, buckets: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> dict[str, Qparams]:
        """Layer name to scale and zero point of each part, on ``device``.

        The same call returns the same objects, and equal ranges of several layers are one object.

        Args:
            buckets: those of the samples in a batch. Samples of several buckets share the range
                that holds all of theirs.
            device: where the activations are.
        """
        key = tuple(sorted(set(buckets))), torch.device(device)
        known = self._known.get(key)
        if known is None:
            pairs: dict = {}
            known = self._known[key] = {
                name: _qparams(ranges[list(key[0])], key[1], pairs)
                for name, ranges in self.layers.items()
            }
        return known


def bucket_of(timesteps: Tensor, num_timesteps: float, num_buckets: int) -> tuple[int, ...]:
    """The bucket of each of ``timesteps`` ``[B]``, which count 0..T."""
    share = timesteps.double() * num_buckets / num_timesteps
    return tuple(share.floor().clamp(0, num_buckets - 1).long().tolist())


def _qparams(ranges: Tensor, device: torch.device, pairs: dict) -> Qparams:
    found = []
    for low, high in zip(ranges[..., 0].amin(0), ranges[..., 1].amax(0)):
        ends = float(low), float(high)
        if ends not in pairs:
            pairs[ends] = tuple(q.to(device) for q in tensor_qparams(low, high))
        found.append(pairs[ends])
    return found
