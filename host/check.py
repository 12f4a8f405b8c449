"""Check Quantized Model: what is in it, whether it computes, and how well (Diffusia, IV-C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ..metrics.memory import peak_memory
from ..quant import QuantTuneError
from ..quant.limits import is_finite
from .build import quantized_model
from .explain import explained
from .pictures import SamplingSettings, sample_pictures

SHARES = (0.98, 0.75, 0.5, 0.25, 0.02)
"""Of the timesteps, from noise to picture, at which the model is run."""
GRADES = ((0.03, "as good as float"), (0.10, "slightly different"), (0.30, "visibly different"))
"""Largest relative error of the estimate of the picture, and what to call it."""
PLAIN = 0.01
"""Standard deviation of a channel's pixels, in 0..1, below which a picture shows nothing."""


@dataclass
class Check:
    """What was found.

    Attributes:
        lines: of the report.
        faults: what makes the model unusable; empty if nothing does.
        picture: of the prompt, float32 ``[1, H, W, 3]``, or None.
        unmeasured: why nothing is known of how good the model is, or "".
    """

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    picture: torch.Tensor | None = None
    unmeasured: str = "connect the float model as reference"

    @property
    def verdict(self) -> str:
        """In a word or a sentence."""
        if self.faults:
            return "The model is NOT usable: " + "; ".join(self.faults) + "."
        return "The model is usable." if not self.unmeasured else (
            f"The model computes; how good it is was not measured ({self.unmeasured}).")

    @property
    def report(self) -> str:
        """Verdict and findings."""
        return "\n".join([self.verdict, *self.lines])


def check_model(patcher, clip, vae, prompt: str, settings: SamplingSettings, reference=None,
                node_id: str | None = None) -> Check:
    """Look at a quantized MODEL's tensors, run it over the timesteps, and make a picture.

    Args:
        patcher: quantized MODEL.
        clip, vae: the host's.
        prompt, settings: of the picture.
        reference: the float MODEL to compare with, or None.
        node_id: of the node that shows progress, or None.

    Raises:
        QuantTuneError: a MODEL that is not quantized, or a reference that is.
    """
    own = quantized_model(patcher)
    if own is None:
        raise QuantTuneError("This MODEL is not quantized; connect one from 'Quantize UNet' or "
                             "'Load Quantized UNet'.")
    if reference is not None and quantized_model(reference) is not None:
        raise QuantTuneError("The reference is quantized, too; connect the float model.")
    check = Check()
    _look(own.checkpoint, check)
    bar = comfy.utils.ProgressBar(len(SHARES) + 1, node_id=node_id)
    device = management.get_torch_device()
    # Before: a text encoder is no part of a step, and may push the model off the card.
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
    management.load_models_gpu([patcher])
    with peak_memory(device) as found, explained(
            f"The MODEL cannot run at {settings.width} x {settings.height} with this CLIP and VAE "
            "({reason}); use those of its family, and a size that they take."):
        outputs = _outputs(patcher, vae, prompts, settings, bar)
    for share, output in zip(SHARES, outputs):
        if not is_finite(output):
            check.faults.append(f"its output is NaN or infinite at {share:.0%} of the timesteps")
    check.lines.append(f"Memory: weights {patcher.model_size() / 2**20:,.0f} MiB, a step "
                       f"{found.extra / 2**20:,.0f} MiB above them (measured).")
    if reference is not None:
        with explained("The reference cannot run on what the quantized MODEL ran on ({reason}); "
                       "connect the float model that was quantized."):
            floats = _outputs(reference, vae, prompts, settings)
        if any(a.shape != b.shape for a, b in zip(outputs, floats)):
            raise QuantTuneError("The reference makes latents of another shape; connect the float "
                                 "model that was quantized.")
        _compare(outputs, floats, check)
    if not check.faults:
        _make_picture(patcher, clip, vae, prompt, settings, reference, check)
    bar.update(1)
    return check


def _look(checkpoint, check: Check) -> None:
    """Widths, dtype of the integers, and values of what is stored.

    That shapes fit the model was made sure of when it was built (`build.build_model`).
    """
    bits = Counter(w.bits for w in checkpoint.layers.values())
    floats = sum(t.numel() for t in checkpoint.floats.values())
    check.lines.append(", ".join(f"{count} layers in {b} bits" for b, count in sorted(bits.items()))
                       + f"; {floats:,} values in float.")
    for name, weight in checkpoint.layers.items():
        top = 2**weight.bits - 1
        if weight.packed.dtype != torch.uint8:
            check.faults.append(f"layer {name} holds {weight.packed.dtype}, not packed bytes")
        elif not bool((weight.scale.isfinite() & (weight.scale > 0)).all()):
            check.faults.append(f"layer {name} has scales that are 0, negative or not finite")
        elif not is_finite(weight.zero_point) or bool(
                (weight.zero_point.abs() > 4 * top + 4).any()):
            check.faults.append(f"layer {name} has zero points far outside of its codes")
    for name, tensor in checkpoint.floats.items():
        if not is_finite(tensor):
            check.faults.append(f"the float tensor {name} holds NaN or infinite values")
    if checkpoint.ranges is not None:
        check.lines.append(f"Static activation ranges for {len(checkpoint.ranges.layers)} layers, "
                           f"{checkpoint.ranges.num_buckets} sets of them.")


def _outputs(patcher, vae, prompts, settings: SamplingSettings, bar=None) -> list[torch.Tensor]:
    """Estimates of the picture from noise alone, at each of `SHARES`, float32 on the CPU."""
    from .pictures import empty_latent

    positive, negative = prompts
    latent = empty_latent(patcher, vae, settings.width, settings.height)
    noise = comfy.sample.prepare_noise(latent, settings.seed)
    sampling = patcher.get_model_object("model_sampling")
    found = []
    for share in SHARES:
        management.throw_exception_if_processing_interrupted()
        sigma = float(sampling.percent_to_sigma(1 - share))
        found.append(comfy.sample.sample_custom(
            patcher, noise, settings.cfg, comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]), positive, negative, latent, disable_pbar=True,
            seed=settings.seed).float().cpu())
        if bar is not None:
            bar.update(1)
    return found


def _compare(outputs: Sequence[torch.Tensor], floats: Sequence[torch.Tensor],
             check: Check) -> None:
    if not all(map(is_finite, floats)):
        check.unmeasured = "the reference computes NaN or infinite values itself"
        return
    check.unmeasured = ""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(outputs, floats)]
    told = ", ".join(f"{e:.1%} at {s:.0%}" for e, s in zip(errors, SHARES))
    worst = max(errors, key=lambda e: (e != e, e))
    grade = next((name for limit, name in GRADES if worst <= limit), None)
    check.lines.append(f"Against float, error of the picture's estimate: {told} of the timesteps.")
    if grade is None or worst != worst:
        check.faults.append(f"its estimates are {worst:.0%} away from the float model's; use more "
                            "bits, calibrate with GPTQ, or train scales")
    else:
        check.lines.append(f"That is {grade}.")


def _make_picture(patcher, clip, vae, prompt: str, settings: SamplingSettings, reference,
                  check: Check) -> None:
    check.picture = picture = sample_pictures(patcher, clip, vae, [prompt], settings)
    if not is_finite(picture):
        check.faults.append("the VAE makes NaN of its picture")
    elif _is_plain(picture):
        # Some prompts and sizes ask for that.
        if reference is None:
            check.lines.append("The picture is of one colour; look whether the prompt asks for "
                               "that.")
        elif _is_plain(sample_pictures(reference, clip, vae, [prompt], settings)):
            check.lines.append("The picture is of one colour, as the float model's is; take "
                               "another prompt to see more.")
        else:
            check.faults.append("its picture is of one colour, and the float model's is not")
    else:
        check.lines.append("The picture has colours and contrast; look at it.")


def _is_plain(picture: torch.Tensor) -> bool:
    """Whether there is nothing to see: all pixels are nearly of one colour."""
    return float(picture.std((1, 2)).max()) < PLAIN
