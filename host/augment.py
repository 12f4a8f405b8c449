"""Augmentation with the host's progress bar and Stop."""

from __future__ import annotations

import comfy.model_management
import comfy.utils

from ..training.augment import Augmentation, augmented
from ..training.data import TrainingImages


def augment(images: TrainingImages, how: Augmentation) -> TrainingImages:
    """`training.augment.augmented`; the host's interrupt comes through as its own exception."""
    bar = comfy.utils.ProgressBar(len(images.images))

    def watch(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    return augmented(images, how, watch)
