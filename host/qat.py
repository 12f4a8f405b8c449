"""Quantization-aware training inside the host: the float model teaches, true integers come out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ..metrics.charts import loss_chart
from ..quant import QuantizedCheckpoint, QuantTuneError
from ..quant.int8 import ActivationRanges
from ..quant.limits import is_finite
from ..quant.qat import FakeQuantLayer
from ..training.qat import QatTrainer, QatTraining
from ..training.run_lock import alone
from .build import quantized_model
from .calibrate import Calibration
from .explain import explained
from .identity import identity_of
from .int8 import OPTION, backend_for, geometry
from .layout import is_uniform, unwrap
from .loss_feed import LossFeed
from .observe import ForwardRecord
from .ops import scaled_layers
from .quantize import model_over, originals, paged_weights
from .routing import OPTION as ROUTER
from .routing import buckets_of
from .run import Watcher, replaced, run_folder, stopped
from .samples import Samples
from .training import PROBE, checkpoint_units, checkpointed, not_differentiable, training_copy

HELD_OUT = 8
"""One picture in so many, and at least one, is not trained on, but tells the error afterwards."""


@dataclass(frozen=True)
class QatOutcome:
    """What a training gives to the graph.

    Attributes:
        model: MODEL that multiplies the trained integers.
        loss_picture: chart of the loss.
        report: in words.
        finished: False if it was stopped.
        losses: what the node's chart shows, see `LossFeed`.
    """

    model: object
    loss_picture: Image.Image
    report: str
    finished: bool
    losses: dict


class HostStudent:
    """`training.qat.Student` over a copy of a calibrated MODEL."""

    def __init__(self, denoiser, mode, record: ForwardRecord, train: Sequence[int],
                 floats: dict | None, examples: str = ""):
        self.patcher, self.record, self.examples = denoiser.patcher, record.copy(), examples
        self.device = denoiser.device
        ranges = mode.ranges
        self.num_buckets = ranges.num_buckets
        self.layers = {}
        for name, module in scaled_layers(self.unet).items():
            if (name not in mode.layers or not is_uniform(module.weight)
                    or backend_for(module, self.device)[0] is None):
                continue  # its activations are not quantized
            own = ranges.layers.get(name)
            weight = None if floats is None else floats[name]
            layer = FakeQuantLayer(unwrap(module.weight), geometry(module), own, weight)
            layer = self.layers[name] = layer.to(self.device)
            # Not as a submodule: the model's parameters stay its own.
            module.__dict__["fake_quant"] = layer
        options = self.patcher.model_options["transformer_options"]
        self.options = {k: v for k, v in options.items() if k != OPTION}
        self.options["wrappers"] = self.patcher.wrappers
        self.train = train
        digest = hashlib.sha256(denoiser.fingerprint.encode())
        for name, layer in self.layers.items():
            digest.update(f"{name}{layer.steps is not None}".encode())
            if layer.ranges is not None:
                digest.update(layer.ranges.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def unet(self) -> torch.nn.Module:
        """The diffusion model."""
        return self.patcher.model.diffusion_model

    def __len__(self):
        return len(self.train)

    def answer(self, index: int, checkpointing: bool):
        """See `training.qat.Student`."""
        call = self.train[index]
        buckets = buckets_of(self.record.timesteps(call), self.patcher.model.model_sampling,
                             self.num_buckets)
        for layer in self.layers.values():
            layer.buckets = buckets
        if checkpointing:
            with checkpointed(checkpoint_units(self.unet)):
                output = self.record.again(call, self.patcher, self.options)
        else:
            output = self.record.again(call, self.patcher, self.options)
        return output, self.record.calls[call][2].to(self.device)

    def weight(self, index: int) -> float:
        """See `training.qat.Student`: ``c_out**2 / (1 + sigma**2)``.

        ``c_out`` is what the host multiplies an output by on its way to the clean latent. A sampler
        that goes from ``sigma`` to a fixed share of it moves the latent by ``c_out`` times the
        error, and what is wrong at a noise above 1 counts as much less in the end as there is more
        noise than picture. For models that predict noise this is ``1 / (1 + SNR)``: nearly clean
        steps, whose outputs are hardest to match, hardly change the picture.
        """
        sampling = self.patcher.model.model_sampling
        timestep = self.record.timesteps(self.train[index]).flatten()[:1].float().cpu()
        # The sampling's own sigma(timestep) shifts flow models' timesteps a second time.
        sigmas = sampling.sigmas.float().cpu()
        told = torch.as_tensor(sampling.timestep(sampling.sigmas)).float().cpu()
        sigma = sigmas[(told - timestep).abs().argmin()].reshape(1)
        one = torch.ones(1, 1, 1, 1)
        zero = torch.zeros_like(one)
        c_out = (sampling.calculate_denoised(sigma, one, zero)
                 - sampling.calculate_denoised(sigma, zero, zero))
        return float(c_out.square() / (1 + sigma.square()))

    def prove(self) -> None:
        """Raise QuantTuneError for a model whose host code cannot be differentiated.

        Recomputed activations may hide that and give wrong gradients, so this is done without, on a
        corner of the first latent.
        """
        call = self.train[0]
        args, kwargs, output = self.record.calls[call]
        self.record.calls[call] = ((args[0][..., :PROBE, :PROBE], *args[1:]), kwargs, output)
        learns = [p for layer in self.layers.values() for p in layer.parameters()]
        try:
            with torch.enable_grad():
                answer, _ = self.answer(0, checkpointing=False)
                torch.autograd.grad(answer.float().square().sum(), learns, allow_unused=True)
        except RuntimeError as error:
            if (told := not_differentiable(error, self.patcher.model)) is None:
                raise
            raise told from error
        finally:
            self.record.calls[call] = args, kwargs, output


def train_qat(patcher, reference, latent: dict, positive: Sequence, negative: Sequence,
              how: Calibration, config: QatTraining, name: str,
              node_id: str | None = None, anew: bool = False) -> QatOutcome:
    """Train the integers of a calibrated MODEL to answer as a float one does, or go on with a run.

    The host's Stop ends the training after the step under way and gives what was learnt so far.

    Args:
        patcher: MODEL from *Calibrate INT8*.
        reference: the float MODEL.
        latent, positive, negative, how: what both are run on, as in `calibrate.calibrate`.
        config: settings.
        name: of the run.
        node_id: of the node that shows progress, or None.
        anew: delete that run first, once it is certain that the training can begin.

    Raises:
        QuantTuneError: a MODEL without static ranges, with a LoRA or scales, or of another
            architecture than the reference; whatever the training raises.
    """
    folder = run_folder(name)  # a name that is none is told before any work
    mode = _mode_of(patcher)
    samples = Samples(latent, positive, negative, how)
    record, owners = _recorded(reference, samples)
    train, held_out = _divided(owners)
    before = _error_of(record, patcher, held_out)
    with alone(folder), training_copy(patcher, config.precision) as denoiser:
        floats = _float_weights(reference, mode) if config.weight_learning_rate else None
        examples = repr((samples.key(), asdict(how), identity_of(reference), held_out))
        student = HostStudent(denoiser, mode, record, train, floats,
                              hashlib.sha256(examples.encode()).hexdigest())
        student.prove()
        with replaced(name, anew):
            trainer = QatTrainer(student, config, folder)
        watcher = Watcher(config.steps, node_id, LossFeed(node_id, name, config.steps))
        watcher.start(trainer)
        message = trainer.run(watcher)
        learnt = {n: layer.export() for n, layer in student.layers.items()}
    result = _exported(patcher, learnt)
    after = _error_of(record, result, held_out)
    steps, losses = zip(*[(r.step, r.loss) for r in trainer.history]) if trainer.history else (
        (), ())
    lines = [f"{len(learnt)} layers trained for {trainer.step} of {config.steps} steps on "
             f"{len(student)} forwards of the float model.",
             f"Output error against it, with true integers: {before:.2%} before, {after:.2%} "
             f"after (on {len(held_out)} forwards that were not trained on)."]
    if not after < before:
        lines.append("Training did not lower it: compare pictures, use the model from 'Calibrate "
                     "INT8' as it is, or train with lower rates on more samples and prompts.")
    if samples.unused:
        lines.append(samples.unused)
    if not trainer.finished:
        lines.append(stopped(name, anew))
    if message:
        lines.append(message)
    return QatOutcome(result, loss_chart(steps, losses, title=f"QAT: {name}"), "\n".join(lines),
                      trainer.finished, watcher.feed.end())


def _mode_of(patcher):
    """The integer products of a MODEL that can be trained."""
    options = patcher.model_options["transformer_options"]
    mode = options.get(OPTION)
    if quantized_model(patcher) is None or mode is None or mode.ranges is None:
        raise QuantTuneError("Train QAT needs a MODEL with static ranges that multiplies integers "
                             "on this machine; put 'Calibrate INT8' before it.")
    if patcher.patches:
        raise QuantTuneError("This MODEL has a LoRA or merge on top, which integers cannot hold; "
                             "train the model from before the LoRA and apply the LoRA after it.")
    if ROUTER in options:
        raise QuantTuneError("This MODEL has scales applied already; train the model from before "
                             "'Apply TuneQDM Scales'.")
    return mode


def _recorded(reference, samples: Samples) -> tuple[ForwardRecord, list[int]]:
    """Forwards of the float model on all samples, and the picture that each belongs to."""
    if quantized_model(reference) is not None:
        raise QuantTuneError("The reference is a quantized MODEL; connect the float one, which the "
                             "integers are to learn from.")
    record = ForwardRecord()
    bar = comfy.utils.ProgressBar(len(samples))
    owners: list[int] = []
    with record.recording(reference.model.diffusion_model):
        for index in range(len(samples)):
            samples.run(reference, index)
            owners += [samples.picture(index)] * (len(record.calls) - len(owners))
            bar.update(1)
    if not all(is_finite(output) for _, _, output in record.calls):
        raise QuantTuneError("The reference computes NaN or infinite values, from which nothing "
                             "can be learnt; use a precision it can run in, or another file.")
    return record, owners


def _divided(owners: Sequence[int]) -> tuple[list[int], list[int]]:
    """Forwards to train on, and those that are held out: all of one picture in `HELD_OUT`.

    The steps of a picture are alike; held out one by one they would say little about others, and
    so they are only where there is a single picture. ``owners`` is the picture of each forward.
    """
    if len(owners) < 2:
        raise QuantTuneError("There are fewer than two forwards of the float model, one to learn "
                             "from and one to judge by; use more samples.")
    parts = list(owners) if len(set(owners)) > 1 else list(range(len(owners)))
    names = sorted(set(parts))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    held = {names[i] for i in order[:max(1, len(names) // HELD_OUT)]}
    return ([i for i, part in enumerate(parts) if part not in held],
            [i for i, part in enumerate(parts) if part in held])


def _error_of(record: ForwardRecord, patcher, indices: Sequence[int]) -> float:
    """Of a MODEL, on some of the forwards."""
    comfy.model_management.load_models_gpu([patcher])
    with explained("The MODEL cannot run on what the reference ran on ({reason}); connect the "
                   "float model that was quantized."):
        return record.error(patcher, indices)


def _float_weights(reference, mode) -> dict[str, torch.Tensor]:
    found = {}
    for key, entry in originals(reference).items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if name in mode.layers:
            weight, convert = entry[0]
            with torch.inference_mode(False):
                found[name] = convert(weight).detach().float().cpu().clone()
    if missing := mode.layers - found.keys():
        raise QuantTuneError(f"The reference has no layer '{min(missing)}'; connect the float "
                             "model that was quantized.")
    return found


def _exported(patcher, learnt: dict):
    """A MODEL over the learnt integers and ranges, multiplying integers as before."""
    own = quantized_model(patcher)
    checkpoint, mode = own.checkpoint, patcher.model_options["transformer_options"][OPTION]
    ranges = {**mode.ranges.layers, **{n: r for n, (_, r) in learnt.items() if r is not None}}
    put_aside = paged_weights()
    layers = {**checkpoint.layers, **{n: put_aside(w) for n, (w, _) in learnt.items()}}
    trained = QuantizedCheckpoint(
        replace(checkpoint.metadata, fingerprint="", calibration={
            **checkpoint.metadata.calibration, "trained": True}),
        layers, checkpoint.floats, ActivationRanges(ranges))
    result = model_over(patcher, trained, own.name, disable_dynamic=True)
    options = result.model_options["transformer_options"]
    options[OPTION] = replace(mode, ranges=trained.ranges, model=result.model)
    return result
