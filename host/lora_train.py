"""LoRA training inside the host: on float, packed or NF4 weights, with previews and Stop."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..metrics.charts import loss_chart
from ..quant import QuantTuneError
from ..training.adapters import Adapters, adapters
from ..training.data import EmptyCaptions, TrainingSet
from ..training.lora_config import LoraTraining
from ..training.lora_layer import LoraLayer
from ..training.lora_trainer import LoraResult, LoraTrainer
from ..training.nf4 import nf4_layers
from ..training.run_lock import alone
from .bnb import LABELS
from .bnb_quantize import bnb_kind
from .build import quantized_model
from .identity import identity_of
from .lora import hold_patches
from .lora_file import LoraWeights, export_lora, save_lora
from .lora_start import Start, read_start
from .loss_feed import LossFeed
from .ops import scaled_layers
from .quantize import PREFIX
from .run import PictureWatcher, Validation, replaced, run_folder, stopped
from .text_training import HostReader, text_copy
from .training import (
    HostDenoiser,
    float_training_copy,
    packed_training_copy,
    training_copy,
)

MODEL, TEXT = "diffusion_model", "text_encoder"
"""Names of the two modules that may learn."""
AS_IT_IS, NF4 = "as it is", "NF4"
BASES = (AS_IT_IS, NF4)
"""What adapters are trained on: the MODEL's own weights, or its Linear layers in NF4."""


@dataclass(frozen=True)
class LoraOutcome:
    """What a training gives to the graph.

    Attributes:
        lora: the adapters as stock files name them.
        result: the trainer's.
        loss_picture: chart of the loss.
        grid: validation pictures so far, a row a prompt, or None.
        report: in words.
        losses: what the node's chart shows, see `LossFeed`.
    """

    lora: LoraWeights
    result: LoraResult
    loss_picture: Image.Image
    grid: Image.Image | None
    report: str
    losses: dict


@dataclass
class Pupil:
    """A copy of a MODEL, and of a CLIP, with adapters in place.

    Attributes:
        denoiser: the diffusion model.
        learns: `MODEL` and maybe `TEXT` to their adapters.
        reader: the text encoder, if it learns.
        bits: of the base, for the report and the file.
        start: what the adapters began from, if not from nothing.
    """

    denoiser: HostDenoiser
    learns: Mapping[str, Adapters]
    reader: HostReader | None
    bits: str
    start: Start | None = None

    def notes(self, config: LoraTraining) -> list[str]:
        """What the user should know of ranks and of the LoRA to begin with, a sentence each."""
        notes = [] if self.start is None else self.start.note(config.rank)
        # What began from a LoRA has that one's ranks.
        if self.start is None and (
                smaller := [n for own in self.learns.values() for n in own.smaller]):
            notes.append(f"{len(smaller)} of them have fewer channels than the rank and take that "
                         f"many (first: '{smaller[0]}').")
        return notes

    def watch(self, learning: bool) -> None:
        """Adapters without dropout to look at what was learnt, and with it to go on."""
        for own in self.learns.values():
            own.train(learning)


@contextmanager
def pupil(patcher, config: LoraTraining, base: str = AS_IT_IS, clip=None,
          start: Mapping[str, torch.Tensor] | None = None) -> Iterator[Pupil]:
    """A `Pupil` of a MODEL, loaded, with autograd on; the graph's MODEL and CLIP are left alone.

    Args:
        patcher: float or quantized MODEL.
        config: settings.
        base: of `BASES`.
        clip: the host's, if the text encoder learns.
        start: LORA_MODEL to begin from, or None.

    Raises:
        QuantTuneError: whatever a user can mend about these.
    """
    if base not in BASES:
        raise QuantTuneError(f"The base is {base!r}, but it has to be one of {', '.join(BASES)}.")
    own, with_nf4, kind = quantized_model(patcher), base == NF4, bnb_kind(patcher)
    if (own is not None or kind) and with_nf4:
        raise QuantTuneError("This MODEL is quantized already, which NF4 cannot be made from; "
                             f"connect the float model, or set the base to '{AS_IT_IS}'.")
    if config.train_text_encoder and clip is None:
        raise QuantTuneError("train_text_encoder needs a CLIP; connect it, or set it to false.")
    given = None if start is None else read_start(start, patcher, clip,
                                                  config.train_text_encoder)
    with ExitStack() as stack:
        if own is not None:
            denoiser = stack.enter_context(training_copy(patcher, config.precision))
            widths = [w.bits for w in own.checkpoint.layers.values()]
            bits = f"{max(set(widths), key=widths.count)}-bit weights"
        elif kind:
            denoiser = stack.enter_context(packed_training_copy(
                patcher, identity_of(patcher), config.precision))
            bits = f"{LABELS[kind]} weights of bitsandbytes"
        else:
            denoiser = stack.enter_context(float_training_copy(
                patcher, identity_of(patcher) + ("nf4" if with_nf4 else ""), config.precision))
            bits = "NF4 weights" if with_nf4 else "float weights"
        hold_patches(denoiser.patcher, config.dora)
        unet = denoiser.base.diffusion_model
        names = config.chosen(scaled_layers(unet))
        if given is not None:
            given.check(config, scaled_layers(unet))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if with_nf4:
            stack.enter_context(nf4_layers(unet, denoiser.base.get_dtype_inference(),
                                           denoiser.device))
        learns = {MODEL: stack.enter_context(adapters(
            unet, names, config, denoiser.device, _ranks(given and given.unet)))}
        reader = None
        if config.train_text_encoder:
            reader = stack.enter_context(text_copy(clip, denoiser.patcher))
            learns[TEXT] = stack.enter_context(adapters(
                reader.module, reader.layers(), config,
                reader.clip.patcher.load_device, _ranks(given and given.text)))
        if given is not None:
            learns[MODEL].load(given.unet, given.name)
            # Without any of its own, the text encoder begins anew.
            if given.text:
                learns[TEXT].load(given.text, given.name)
        denoiser.learns = [p for a in learns.values() for p in a.parameters]
        denoiser.random = config.dropout > 0
        yield Pupil(denoiser, learns, reader, bits, given)


def _ranks(layers: Mapping[str, LoraLayer] | None) -> dict[str, int]:
    return {name: layer.rank for name, layer in (layers or {}).items()}


def train_lora(
    patcher,
    data: TrainingSet,
    config: LoraTraining,
    name: str,
    base: str = AS_IT_IS,
    subject: str = "",
    clip=None,
    start: LoraWeights | None = None,
    empty: EmptyCaptions | None = None,
    validation: Validation | None = None,
    trackers: Sequence[str] = (),
    node_id: str | None = None,
    anew: bool = False,
) -> LoraOutcome:
    """Train adapters for a MODEL, or go on with the run ``name``.

    ``anew`` deletes that run first, once it is certain that the training can begin. The host's
    Stop ends the training after the step under way; the state is saved and the adapters so far
    are returned. Other arguments are those of `pupil` and `train.train`. Raises QuantTuneError
    for whatever a user can mend.
    """
    folder = run_folder(name)
    with alone(folder), pupil(patcher, config, base, clip, start) as learner:

        def exported(layers):
            return exported_lora(layers, learner, patcher, clip, config, name, subject,
                                 trainer.step)

        with replaced(name, anew):
            trainer = LoraTrainer(
                learner.denoiser, learner.learns, data, config, folder, empty, learner.reader,
                key_of(start), lambda path, layers: save_lora(path, exported(layers)), trackers)
        watcher = lora_watcher(learner, config, validation, folder, node_id)
        watcher.start(trainer)
        result = trainer.run(watcher)
        if missed := watcher.end(trainer):
            logging.warning(f"'{name}': {missed}")
        lora = exported(result.layers)
        report = _report(result, learner, config, name, anew)
    steps, losses = zip(*[(r.step, r.loss) for r in result.history]) if result.history else ((), ())
    return LoraOutcome(lora, result, loss_chart(steps, losses, title=f"{config.mode}: {name}"),
                       watcher.grid(), report, watcher.feed.end())


def key_of(start: Mapping[str, torch.Tensor] | None) -> str:
    """What tells one LORA_MODEL from another; "" for none."""
    if start is None:
        return ""
    digest = hashlib.sha256()
    for name, value in sorted(start.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def exported_lora(layers: Mapping, learner: Pupil, patcher, clip, config: LoraTraining, name: str,
                  subject: str, steps: int) -> LoraWeights:
    """Adapters as the host and other tools name them, with how they were trained."""
    named = {PREFIX + n: layer for n, layer in layers[MODEL].items()}
    named.update(layers.get(TEXT, {}))
    metadata = {"ss_output_name": name, "ss_steps": str(steps), "ss_max_train_steps":
                str(config.steps), "ss_learning_rate": str(config.learning_rate),
                "ss_optimizer": config.optimizer, "ss_lr_scheduler": config.scheduler,
                "ss_seed": str(config.seed), "quanttune.base": learner.bits,
                "quanttune.subject": subject, "quanttune.mode": config.mode}
    lora = export_lora(named, patcher, clip, metadata)
    if learner.start is not None:
        lora.update(learner.start.kept)
    return lora


class LoraWatcher(PictureWatcher):
    """A `PictureWatcher` that switches dropout off while it looks.

    Args:
        learner: whose adapters they are; others as in `PictureWatcher`.
    """

    def __init__(self, steps, node_id, every, validation, folder, model, copy, feed,
                 learner: Pupil):
        super().__init__(steps, node_id, every, validation, folder, model, copy, feed)
        self.learner = learner

    def look(self, trainer) -> None:
        """See `PictureWatcher.look`."""
        self.learner.watch(learning=False)
        try:
            super().look(trainer)
        finally:
            self.learner.watch(learning=True)


def lora_watcher(learner: Pupil, config: LoraTraining, validation: Validation | None,
                 folder: Path, node_id: str | None = None) -> LoraWatcher:
    """What looks at adapters in training, with the text encoder that learns if one does."""
    copy = learner.denoiser.patcher
    if validation and learner.reader is not None:
        validation = replace(validation, clip=learner.reader.clip)
    return LoraWatcher(config.steps, node_id, config.preview_every, validation, folder,
                       lambda _: copy, copy, LossFeed(node_id, folder.name, config.steps),
                       learner)


def _report(result: LoraResult, learner: Pupil, config: LoraTraining, name: str,
            anew: bool) -> str:
    done = len(result.history)
    tail = [r.loss for r in result.history[-max(1, done // 10):]]
    lines = [f"{config.mode} on {learner.bits}: {done} of {config.steps} steps, loss "
             f"{np.mean(tail):.4f} over the last {len(tail)}" if done
             else f"{config.mode} on {learner.bits}: no step done"]
    counts = [f"{len(own)} layers of the {'UNet' if m == MODEL else 'text encoder'}"
              for m, own in result.layers.items()]
    lines.append(f"{' and '.join(counts)}, {result.num_parameters:,} parameters, "
                 f"{4 * result.num_parameters / 1e6:.2f} MB in float32")
    lines += learner.notes(config)
    if not result.finished:
        lines.append(stopped(name, anew))
    if result.message:
        lines.append(result.message)
    return "\n".join(lines)
