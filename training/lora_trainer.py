"""The loop that fits LoRA adapters to pictures, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..quant import QuantTuneError
from .adapters import Adapters
from .data import EmptyCaptions, TrainingSet
from .denoising import Denoiser, DenoisingTrainer
from .history import StepRecord
from .loop import Progress
from .lora_config import LoraTraining
from .lora_layer import LoraLayer
from .optimizers import build_optimizer, set_learning_rate
from .restore import restore_optimizer, restore_values
from .sampling import generator_of

KEPT = "lora-before-the-error.safetensors"
"""In the run's folder: what was learnt before a loss that was not finite."""


class Reader(Protocol):
    """A text encoder that learns."""

    def conditions(self, captions: Sequence[str], clean: Tensor) -> dict[str, Tensor]:
        """What the diffusion model is given for captions and latents ``[B, ...]``: of each kind
        ``[B, ...]``, differentiable in the encoder's adapters."""


@dataclass(frozen=True)
class LoraResult:
    """What a training leaves.

    Attributes:
        layers: adapters by the name of their module (``"diffusion_model"``, ``"text_encoder"``),
            then by layer.
        history: every step, those before a resume included.
        finished: False if it was stopped early.
        message: what the user should know, or "".
    """

    layers: Mapping[str, Mapping[str, LoraLayer]]
    history: tuple[StepRecord, ...]
    finished: bool
    message: str = ""

    @property
    def num_parameters(self) -> int:
        """Of all adapters."""
        return sum(t.numel() for own in self.layers.values() for layer in own.values()
                   for t in (layer.down, layer.up, layer.dora_scale) if t is not None)


class LoraTrainer(DenoisingTrainer):
    """One training run in one folder."""

    def __init__(self, denoiser: Denoiser, learns: Mapping[str, Adapters], data: TrainingSet,
                 config: LoraTraining, folder: Path | str,
                 empty: EmptyCaptions | None = None, reader: Reader | None = None,
                 start: str = "", keep: Callable[[Path, Mapping], object] | None = None,
                 trackers: Sequence[str] = (), accelerator=None):
        """Prepare, and go on from the folder's state if it has one.

        Args:
            denoiser: the model, its adapters in place.
            learns: ``"diffusion_model"`` and, with a ``reader``, ``"text_encoder"`` to adapters.
            data: encoded examples.
            config: settings.
            folder: where the state, the losses and the trackers' files go.
            empty: conditions of an empty caption by shape, for ``caption_dropout``.
            reader: the text encoder, if it learns.
            start: a key of what the adapters began from, "" for none.
            keep: writes `export`'s adapters to a file, for a run that cannot go on.
            trackers: of `history.TRACKERS`.
            accelerator: an `accelerate.Accelerator`, or None to make one for this process.

        Raises:
            QuantTuneError: no examples, or a state that does not belong to these settings.
        """
        if reader is not None and not any(data.captions):
            raise QuantTuneError("train_text_encoder needs captions; train on images that have "
                                 "some, or set it to false.")
        super().__init__(denoiser, data, config, folder, 1, empty, trackers, accelerator)
        self.learns, self.reader, self.start = dict(learns), reader, start
        self.keep = keep
        text_rate = config.text_encoder_learning_rate or config.learning_rate / 2
        self.optimizer = build_optimizer(config, [
            (own.parameters, config.learning_rate if name == "diffusion_model" else text_rate)
            for name, own in self.learns.items()])
        self.restore()

    @property
    def parameters(self) -> list[Tensor]:
        """All matrices of all adapters."""
        return [p for own in self.learns.values() for p in own.parameters]

    def run(self, callback: Callable[[Progress], bool | None] | None = None) -> LoraResult:
        """Train to the last step, or until ``callback`` returns True.

        Raises QuantTuneError when the loss is not finite; the run keeps its last good state then.
        """
        message = self.loop(callback)
        return LoraResult(self.export(), tuple(self.history), self.finished, message)

    def export(self) -> dict[str, dict[str, LoraLayer]]:
        """The present adapters; see `LoraResult`."""
        return {name: own.export() for name, own in self.learns.items()}

    def one_step(self) -> StepRecord:
        """All examples of a step, one update."""
        set_learning_rate(self.optimizer, self.rate(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        with _seeded(self.config, self.step, self.accelerator.process_index,
                     self.denoiser.device):
            total = self.accumulate(self.draw())
        parameters = self.parameters
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        loss = self.mean(total, parameters, self.denoiser.device)
        norm = self.clip(loss, parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        return StepRecord(self.step, loss, self.optimizer.param_groups[0]["lr"], -1, norm)

    def conditions(self, indices, drop, clean, encoded) -> dict[str, Tensor]:
        """See `DenoisingTrainer.conditions`."""
        if self.reader is None:
            return encoded
        captions = ["" if gone else self.data.captions[i]
                    for i, gone in zip(indices, drop.tolist())]
        return self.reader.conditions(captions, clean)

    def leave(self) -> Path | None:
        """See `TrainingLoop.leave`."""
        if not self.step or self.keep is None:
            return None
        path = self.folder / KEPT
        self.keep(path, self.export())
        return path

    def origin(self) -> dict:
        """See `TrainingLoop.origin`."""
        return {**super().origin(), "LoRA to begin with": self.start,
                "targets": [len(own.layers) for own in self.learns.values()]}

    def state(self) -> dict:
        """See `TrainingLoop.state`."""
        return {"parameters": [p.detach().cpu().clone() for p in self.parameters],
                "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        """See `TrainingLoop.load`."""
        restore_values(self.parameters, state["parameters"])
        restore_optimizer(self.optimizer, state["optimizer"])
        for parameter in self.parameters if self.step else ():
            moments = self.optimizer.state[parameter]
            if not any(name in moments for name in ("exp_avg", "state1")):
                raise ValueError("moments")


class _seeded:
    """Dropout from the seed and the step while inside; the generators as they were afterwards."""

    def __init__(self, config: LoraTraining, step: int, process: int, device: torch.device):
        devices = [device] if device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices, enabled=config.dropout > 0)
        self.seed = generator_of(config.seed, "dropout", step, process).initial_seed()
        self.drops = config.dropout > 0

    def __enter__(self):
        self.fork.__enter__()
        if self.drops:
            torch.manual_seed(self.seed)

    def __exit__(self, *error):
        return self.fork.__exit__(*error)
