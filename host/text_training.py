"""The host's text encoder as something that learns."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..training.data import joined_conditions
from .encode import model_arguments

LAYERS = re.compile(r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")
"""Layers of CLIP text encoders that take adapters: those that stock files know."""


class HostReader:
    """`training.lora_trainer.Reader` over a copy of a CLIP. Made by `text_copy`.

    Attributes:
        clip: the copy, the host's own class.
    """

    def __init__(self, clip, patcher):
        self.clip, self.patcher = clip, patcher

    @property
    def module(self) -> torch.nn.Module:
        """What holds the layers."""
        return self.clip.cond_stage_model

    def layers(self) -> list[str]:
        """Names of the layers that take adapters.

        Raises QuantTuneError for a text encoder without any.
        """
        names = [n for n, m in self.module.named_modules()
                 if isinstance(m, torch.nn.Linear) and LAYERS.search(n)]
        if not names:
            raise QuantTuneError(
                f"The text encoder {type(self.module).__name__} cannot be trained; set "
                "train_text_encoder to false, or use a model with a CLIP text encoder.")
        return names

    def conditions(self, captions: Sequence[str], clean: Tensor) -> dict[str, Tensor]:
        """See `training.lora_trainer.Reader`."""
        rows = []
        for caption, latent in zip(captions, clean):
            [embedding, extra], *_ = self.clip.encode_from_tokens_scheduled(
                self.clip.tokenize(caption))
            found = model_arguments(self.patcher, embedding, extra, latent)
            rows.append({k: v.float().to(clean.device) for k, v in found.items()})
        return joined_conditions(rows)


@contextmanager
def text_copy(clip, patcher) -> Iterator[HostReader]:
    """A `HostReader` over a copy of a CLIP with floats of its own, loaded.

    Args:
        clip: the host's; it is left alone.
        patcher: the MODEL that reads its conditions.
    """
    own = clip.clone(disable_dynamic=True)
    comfy.model_management.load_models_gpu([own.patcher])
    with torch.inference_mode(False):
        own.cond_stage_model = copy.deepcopy(own.patcher.model)
        own.cond_stage_model.requires_grad_(False)
        for module in own.cond_stage_model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(_cloned)
        own.patcher = comfy.model_patcher.ModelPatcher(
            own.cond_stage_model, load_device=clip.patcher.load_device,
            offload_device=clip.patcher.offload_device)
        own.patcher.set_model_compute_dtype(torch.float32)
        try:
            comfy.model_management.load_models_gpu([own.patcher], force_full_load=True)
            yield HostReader(own, patcher)
        finally:
            own.patcher.detach()


def _cloned(module: torch.nn.Module, args: tuple) -> tuple:
    """The host adds to activations in place, which norms have kept for their gradient."""
    return (args[0].clone(), *args[1:]) if torch.is_grad_enabled() else args
