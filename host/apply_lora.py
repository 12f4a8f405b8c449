"""A LoRA onto a MODEL and a CLIP by the host's own patches, looked at first."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..quant import check_strength
from .build import quantized_model
from .lora_fit import fit_lora


def apply_lora(model, clip, lora: Mapping[str, Tensor], strength_model: float,
               strength_clip: float, name: str = ""):
    """Clones of a MODEL and a CLIP with a LoRA on them; chained calls add up.

    Args:
        model: MODEL, float or quantized.
        clip: CLIP or None.
        lora: a `lora_file.LoraWeights` or the host's own LORA_MODEL.
        strength_model: 0 is the model without it, 1 the LoRA as trained.
        strength_clip: the same for the text encoder.
        name: for messages; by default the LoRA's own.

    Returns:
        ``(MODEL, CLIP or None, report)``.

    Raises:
        QuantTuneError: as `lora_fit.fit_lora`.
    """
    name = name or getattr(lora, "name", "the LoRA")
    strength_model = check_strength(strength_model)
    strengths, largest = f"strength {strength_model:g}", abs(strength_model)
    if clip is not None:
        strength_clip = check_strength(strength_clip)
        strengths += f", {strength_clip:g} on the text encoder"
        largest = max(largest, abs(strength_clip))
    fit = fit_lora(lora, model, clip, name, largest)
    patched = model.clone()
    in_model = patched.add_patches(fit.patches, strength_model) if strength_model else []
    if clip is not None:
        clip = clip.clone()
        if strength_clip:
            clip.add_patches(fit.patches, strength_clip)
    lines = [f"'{name}': {fit}, {strengths}."]
    own = quantized_model(model)
    if own is not None and any(_layer(key) in own.checkpoint.layers for key in in_model):
        lines.append("The packed integers stay as they are: it acts beside them, without rounding.")
    return patched, clip, "\n".join([*lines, *fit.notes()])


def _layer(key: str) -> str:
    return key.removeprefix("diffusion_model.").removesuffix(".weight")
