"""What a training learns from: pictures with captions, and the same encoded for the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant import QuantTuneError

EmptyCaptions = Mapping[tuple[int, ...], Mapping[str, Tensor]]
"""Conditions of an empty caption, each ``[1, ...]``, by the shape ``[C, H, W]`` of the latents."""
ROOM = 0.8
"""Share of the free memory that pictures may take."""


def free_memory() -> int:
    """Bytes of main memory that are free."""
    import psutil  # a requirement of the host

    return psutil.virtual_memory().available


@dataclass(frozen=True)
class TrainingImages:
    """Pictures and captions.

    Attributes:
        images: each ``[H, W, 3]`` float32 in 0..1 on the CPU; sizes may differ.
        captions: one each; "" trains without a caption.
        subject: words that name the subject, several joined by ", ".
        prior: True for class images (prior preservation); all False by default.
    """

    images: tuple[Tensor, ...]
    captions: tuple[str, ...]
    subject: str = ""
    prior: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.images):
            raise QuantTuneError(f"There are {len(self.images)} images and {len(self.captions)} "
                                 "captions; give one caption each.")
        if not self.prior:
            object.__setattr__(self, "prior", (False,) * len(self.images))

    def joined(self, other: TrainingImages) -> TrainingImages:
        """Both sets in one, this one first."""
        subjects = dict.fromkeys(s for s in (self.subject, other.subject) if s)
        return TrainingImages(self.images + other.images, self.captions + other.captions,
                              ", ".join(subjects), self.prior + other.prior)


@dataclass(frozen=True)
class TrainingSet:
    """Examples in the diffusion model's own space.

    Attributes:
        latents: each ``[C, H, W]`` float32 on the CPU; sizes may differ.
        conditions: of each example, what the model takes beside latents and timestep, by argument
            name, each ``[1, ...]`` float32: ``c_crossattn`` ``[1, L, D]``, and more for some
            families (``y`` of SDXL).
        prior: True for class images.
        captions: for reports.
        fingerprint: SHA-256 over all of it; a run is resumed with the same one only.
    """

    latents: tuple[Tensor, ...]
    conditions: tuple[Mapping[str, Tensor], ...]
    prior: tuple[bool, ...]
    captions: tuple[str, ...]
    fingerprint: str

    def buckets(self) -> list[list[int]]:
        """Indices of the examples of each latent shape, in order of appearance."""
        found: dict[tuple, list[int]] = {}
        for index, latent in enumerate(self.latents):
            found.setdefault(tuple(latent.shape), []).append(index)
        return list(found.values())

    def steps(self, epochs: int, batch_size: int, accumulation: int = 1) -> int:
        """The fewest steps in which every example is seen ``epochs`` times.

        Class images do not count. As `sampling.ExampleOrder` has it, an epoch is a batch for each
        begun batch of each shape, and a step may take the last batches of one epoch and the first
        of the next.

        Args:
            epochs: how often.
            batch_size: examples a batch, those of all processes together.
            accumulation: batches a step.
        """
        own = [sum(not self.prior[i] for i in bucket) for bucket in self.buckets()]
        batches = epochs * sum(math.ceil(count / batch_size) for count in own)
        return math.ceil(batches / accumulation)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents ``[B, ...]`` and conditions (`joined_conditions`) of examples of one shape."""
        indices = list(indices)
        latents = torch.stack([self.latents[i] for i in indices])
        return latents, joined_conditions([self.conditions[i] for i in indices])


def joined_conditions(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of a batch ``[B, ...]`` from those of its examples, each ``[1, ...]``.

    Token sequences of different lengths are repeated to their least common multiple, which leaves
    attention as it is; the host does the same.
    """
    joined = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].dim() == 3:
            length = math.lcm(*(v.shape[1] for v in values))
            values = [v.repeat(1, length // v.shape[1], 1) for v in values]
        joined[name] = torch.cat(values)
    return joined
