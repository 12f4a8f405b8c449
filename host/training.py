"""A ComfyUI model as a trainer sees it: frozen, differentiable, and small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..quant import LayerScales, QuantTuneError
from .build import adopt, quantized_model
from .dynamic_int8 import hasten_attention
from .explain import explained
from .int8 import OPTION as INT8
from .layout import is_uniform
from .ops import scaled_layers
from .patches import patches_digest
from .quantize import float_model, refuse_bypass_lora
from .routing import OPTION, layer_shapes, timestep_units

KINDS = {"EPS": "eps", "V_PREDICTION": "v", "EDM": "edm", "CONST": "flow", "X0": "x0",
         "V_PREDICTION_DDPM": None, "COSMOS_RFLOW": None, "IMG_TO_IMG": None,
         "IMG_TO_IMG_FLOW": None, "StableCascadeSampling": None}
"""The loss of each of the host's classes of prediction; None: not known."""


INSTEAD = "use 'Load LoRA' before the training instead"
"""Of a bypass LoRA."""
PROBE = 16
"""Height and width in latents of the forward that shows whether a family can be trained."""


class _Fixed:
    """Routes every forward to given scales."""

    def __init__(self, scales: Mapping[str, LayerScales]):
        self.scales = scales

    def resolve(self, timesteps: Tensor) -> Mapping[str, LayerScales]:
        """The scales, whatever the timesteps."""
        return self.scales


class HostDenoiser:
    """`training.denoising.Denoiser` over a MODEL with layers of ours. Made by `training_copy`.

    Attributes:
        learns: what learns beside scales, if anything.
        random: whether the model draws random numbers (dropout of adapters).
    """

    def __init__(self, patcher, fingerprint: str):
        """Raises QuantTuneError for an unknown prediction, or scales that are applied already.

        ``fingerprint`` is that of the frozen weights.
        """
        self.patcher, self.base, self.fingerprint = patcher, patcher.model, fingerprint
        self.learns: Sequence[Tensor] = ()
        self.random = False
        self.kind = _kind(self.base.model_sampling)
        if self.kind is None:
            raise QuantTuneError(
                f"Models with the prediction type {self.base.model_type.name} cannot be trained "
                "yet; use an SD1.x, SD2.x, SDXL or SD3 model.")
        self._proven = isinstance(self.base.diffusion_model, UNetModel)
        self.sigma_data = float(getattr(self.base.model_sampling, "sigma_data", 1.0))
        self.shapes = layer_shapes(self.base.diffusion_model)
        self._units = checkpoint_units(self.base.diffusion_model)
        self._convert, self.num_timesteps = timestep_units(self.base.model_sampling)
        options = patcher.model_options["transformer_options"]
        if OPTION in options:
            raise QuantTuneError("This MODEL has scales applied already; train on the model from "
                                 "before 'Apply TuneQDM Scales'.")
        # Integer products have no gradient.
        self._options = {k: v for k, v in options.items() if k != INT8}
        # What the host takes on a processor by default holds whole matrices of scores.
        hasten_attention(self._options, self.device)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.patcher.load_device

    @property
    def base_scales(self) -> dict[str, Tensor]:
        """Layer name to ``s0``; ones where a layer has stayed in float."""
        return {name: m.weight_scale if is_uniform(m.weight) else torch.ones(m.weight.shape[0], 1)
                for name, m in scaled_layers(self.base.diffusion_model).items()}

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise levels of timesteps in 0..T; discrete models have them at whole ones."""
        sampling = self.base.model_sampling
        table = getattr(sampling, "sigmas", None)
        if table is not None and len(table) == self.num_timesteps:
            return table.to(timesteps.device)[timesteps.long()].float()
        return sampling.sigma(timesteps).float()

    def routed(self, timesteps: Tensor) -> Tensor:
        """Shares of T of what the model is given at timesteps in 0..T (a flow model's shift)."""
        if self.device.type == "mps":
            timesteps = timesteps.float()
        given = self.base.model_sampling.timestep(self.sigma(timesteps.to(self.device)))
        return torch.as_tensor(self._convert(given)).cpu().double() / self.num_timesteps

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The model's own noised latents."""
        shape = (-1, *[1] * (clean.dim() - 1))
        return self.base.model_sampling.noise_scaling(sigma.view(shape), noise, clean)

    def denoise(self, noised: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor],
                scales: Mapping[str, LayerScales], checkpointing: bool = False) -> Tensor:
        """One row of the diffusion model a sample; differentiable in ``scales``."""
        options = {**self._options, OPTION: _Fixed(scales), "wrappers": self.patcher.wrappers}
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in conditions.items())
        with explained(f"The model cannot run on latents of shape {list(noised.shape)} with "
                       f"{shapes} ({{reason}}); connect latents and conditioning that were made "
                       "for this model."):
            if not self._proven:
                self._prove(noised[..., :PROBE, :PROBE], sigma, conditions, scales, options)
                self._proven = True
            with checkpointed(self._units, self.random) if checkpointing else _nothing():
                return self.base.apply_model(noised, sigma, **conditions,
                                             transformer_options=options)

    def _prove(self, noised, sigma, conditions, scales, options) -> None:
        """Differentiate a small forward of a family that is not known to allow it.

        Some change activations in place. Autograd says so, but not where they are recomputed:
        there gradients would be silently wrong.
        """
        trained = [*self.learns, *(t for s in scales.values() for t in (s.r_out, s.s_in)
                                   if t is not None and t.requires_grad)]
        try:
            output = self.base.apply_model(noised, sigma, **conditions,
                                           transformer_options=options)
            torch.autograd.grad(output.square().sum(), trained, allow_unused=True)
        except RuntimeError as error:
            if (told := not_differentiable(error, self.base)) is None:
                raise
            raise told from error


def not_differentiable(error: RuntimeError, model) -> QuantTuneError | None:
    """The sentence for an error of a backward pass if the host's ``model`` is at fault, which
    writes into activations, else None."""
    if isinstance(error, torch.OutOfMemoryError) or not any(
            word in str(error) for word in ("inplace", "in-place", "autograd")):
        return None
    reason = str(error).split(". ")[0].splitlines()[0]
    return QuantTuneError(
        f"Models of the family {type(model).__name__} cannot be trained in this ComfyUI "
        f"({reason}); use an SD1.x, SD2.x, SDXL or SD3 model.")


def _kind(model_sampling) -> str | None:
    """The loss of a model, by what its sampling says now: nodes may have replaced it."""
    names = [c.__name__ for c in type(model_sampling).__mro__]
    return next((KINDS[n] for n in names if n in KINDS), None)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def checkpoint_units(diffusion_model: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts whose activations are recomputed: the outermost blocks of several layers.

    Those are the residual blocks and transformers of a UNet, and the blocks of a DiT.
    """
    containers = (torch.nn.ModuleList, torch.nn.Sequential)
    units = []

    def visit(module):
        for child in module.children():
            if isinstance(child, containers):
                visit(child)
            elif len(scaled_layers(child)) > 1:
                units.append(child)

    visit(diffusion_model)
    return units


@contextmanager
def checkpointed(units: Sequence[torch.nn.Module], random: bool = False) -> Iterator[None]:
    """Keep only the inputs of each of ``units`` for the backward pass, and compute the rest again.

    ``random``: whether they draw random numbers, which have to be the same again.
    """
    try:
        for unit in units:
            unit.forward = _recomputing(unit.forward, random)
        yield
    finally:
        for unit in units:
            unit.__dict__.pop("forward", None)


def _recomputing(forward, random: bool):
    def run(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)
    return run


@contextmanager
def training_copy(patcher, precision: str = "auto") -> Iterator[HostDenoiser]:
    """A `HostDenoiser` over a copy of a quantized MODEL, loaded, with autograd on.

    The copy shares the integers (or the file they are mapped to), and has floats of its own that
    autograd may save: what the executor loads is made in inference mode. So the graph's own MODEL
    is never touched, whatever happens in a training.

    precision: "fp32", "bf16", or "auto" for bfloat16 where the device has it and float32 on a CPU.
    Half precision of the fp16 kind would underflow in the backward pass.

    Raises QuantTuneError for a MODEL that is not quantized, or cannot be trained.
    """
    quantized = quantized_model(patcher)
    if quantized is None:
        raise QuantTuneError("Scales can only be trained on a quantized MODEL; put 'Quantize "
                             "UNet' or 'Load Quantized UNet' before the training.")
    refuse_bypass_lora(patcher, INSTEAD)
    fingerprint = quantized.fingerprint + patches_digest(patcher)
    with _loaded_copy(patcher, fingerprint, precision) as denoiser:
        yield denoiser


@contextmanager
def float_training_copy(patcher, fingerprint: str, precision: str = "auto"
                        ) -> Iterator[HostDenoiser]:
    """`training_copy` of a float MODEL, over layers of ours that hold its floats.

    They are kept in the MODEL's own dtype, or in bfloat16 where that is computed in.
    ``fingerprint`` is what runs know the MODEL by.
    """
    refuse_bypass_lora(patcher, INSTEAD)
    device = comfy.model_management.get_torch_device()
    compute = _compute_dtype(precision, device)
    kept = patcher.model.get_dtype() if compute == torch.float32 else compute
    dtypes = (kept, None if kept == compute else compute)
    with _loaded_copy(float_model(patcher, dtypes=dtypes), fingerprint, precision) as denoiser:
        yield denoiser


@contextmanager
def packed_training_copy(patcher, fingerprint: str, precision: str = "auto"
                         ) -> Iterator[HostDenoiser]:
    """`training_copy` of a MODEL whose weights another library packed (bitsandbytes): the copy
    shares them. ``fingerprint`` is what runs know the MODEL by."""
    refuse_bypass_lora(patcher, INSTEAD)
    with _loaded_copy(patcher, fingerprint, precision) as denoiser:
        yield denoiser


@contextmanager
def _loaded_copy(patcher, fingerprint: str, precision: str) -> Iterator[HostDenoiser]:
    with torch.inference_mode(False), torch.enable_grad():
        HostDenoiser(patcher, fingerprint)  # says what is wrong before anything is built
        factory, arguments = patcher.cached_patcher_init
        copy = adopt(patcher, factory(*arguments, disable_dynamic=True), disable_dynamic=True)
        copy.set_model_compute_dtype(_compute_dtype(precision, copy.load_device))
        try:
            comfy.model_management.load_models_gpu([copy], force_full_load=True)
            # The host takes kernels without a gradient otherwise.
            comfy.model_management.in_training = True
            yield HostDenoiser(copy, fingerprint)
        finally:
            comfy.model_management.in_training = False
            copy.detach()


def _compute_dtype(precision: str, device) -> torch.dtype:
    if precision == "auto":
        good = comfy.model_management.should_use_bf16(device)
        return torch.bfloat16 if good and device.type != "cpu" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
