"""A MODEL's description in a file, and back to the host's model config."""

from __future__ import annotations

import copy
import json

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import torch

from ..quant import QuantizedCheckpoint, QuantTuneError, UNetMetadata
from .lora_keys import brief

LARGEST = 2**24
"""No size, count or setting of a real model is above this."""
COUNTS = ("depth", "num_res_blocks", "layers", "blocks")
"""Words in the names of settings that say how often a part is repeated."""
PREVIEW = {"factors": "latent_rgb_factors", "bias": "latent_rgb_factors_bias"}
"""Entries of a file's ``latent_preview``, and the host's attributes of latents."""
AGAIN = "quantize the original model again"


def describe(source, name: str, provenance: dict) -> UNetMetadata:
    """What a file has to say of the host's model ``source`` so that it can be built again.

    Raises QuantTuneError when the model's configuration cannot be written.
    """
    return _metadata(source.model_config, source.model_type.name, source.latent_format, f"'{name}'",
                     provenance)


def describe_config(config, tensors, name: str, provenance: dict) -> UNetMetadata:
    """What a file has to say of a model that the host only knows by its tensors' shapes.

    Args:
        config: the host's model config, as its detection gives it.
        tensors: by their names in the UNet; some families tell by them what they predict.
        name: of the file, for messages.
        provenance: as in the metadata.

    Raises QuantTuneError when the model's configuration cannot be written.
    """
    return _metadata(config, config.model_type(tensors, "").name, config.latent_format, name,
                     provenance)


def _metadata(config, model_type: str, latent_format, name: str, provenance: dict) -> UNetMetadata:
    # The dtype is chosen anew where the file is loaded; other dtypes are the family's own, which
    # it sets again itself.
    described = {k: v for k, v in config.unet_config.items() if not isinstance(v, torch.dtype)}
    try:
        described = json.loads(json.dumps(described))
    except TypeError as error:
        raise QuantTuneError(
            f"The configuration of {name} cannot be written to a file ({error}); this model "
            "family is not supported yet.") from error
    return UNetMetadata(
        family=type(config).__name__,
        unet_config=described,
        model_type=model_type,
        latent_format=type(latent_format).__name__,
        latent_preview=_preview(latent_format),
        sampling_settings=copy.deepcopy(config.sampling_settings),
        provenance=provenance,
    )


def _preview(latent_format) -> dict:
    """The colours that a preview shows latents with, where they are not those of the class."""
    own = [getattr(latent_format, name, None) for name in PREVIEW.values()]
    plain = type(latent_format)()
    if own[0] is None or own == [getattr(plain, name, None) for name in PREVIEW.values()]:
        return {}
    return dict(zip(PREVIEW, own))


def model_config(checkpoint: QuantizedCheckpoint, name: str):
    """The host's model config for a file, which may be hostile.

    Raises QuantTuneError when this ComfyUI does not know the family, prediction type or latent
    format, or when a number in the description is out of all reason.
    """
    metadata = checkpoint.metadata
    config_class = _known(comfy.supported_models, metadata.family,
                          comfy.supported_models.supported_models_base.BASE,
                          "a model of family", name)
    tensors = len(checkpoint.layers) + len(checkpoint.floats)
    for where in ("unet_config", "sampling_settings"):
        _check_numbers(getattr(metadata, where), where, tensors, name)
    config = config_class(dict(metadata.unet_config))
    # A family sets what it knows of its one size; the file says what this model has.
    config.unet_config.update(metadata.unet_config)
    # Some families look for marker tensors of the original file to tell the next two.
    prediction = comfy.model_base.ModelType.__members__.get(metadata.model_type)
    if prediction is None:
        raise QuantTuneError(
            f"'{name}' has the prediction type '{metadata.model_type}', which this ComfyUI does "
            f"not know; update ComfyUI or {AGAIN}.")
    config.model_type = lambda state_dict, prefix="": prediction
    if metadata.latent_format:
        config.latent_format = _known(comfy.latent_formats, metadata.latent_format,
                                      comfy.latent_formats.LatentFormat, "latents of the format",
                                      name)()
    _set_preview(config.latent_format, metadata.latent_preview, name)
    config.sampling_settings.update(metadata.sampling_settings)
    return config


def _set_preview(latent_format, preview: dict, name: str) -> None:
    """Give the latents of one model the colours that its file states."""
    if not preview:
        return
    factors, bias = preview.get("factors"), preview.get("bias")
    rows = factors if isinstance(factors, list) else []
    if len(rows) != latent_format.latent_channels or not all(map(_is_colour, rows)) or not (
            bias is None or _is_colour(bias)):
        raise QuantTuneError(
            f"'{name}' has no valid latent_preview in its metadata: it takes three numbers for "
            f"each of {latent_format.latent_channels} channels; {AGAIN}.")
    for attribute, value in zip(PREVIEW.values(), (factors, bias)):
        setattr(latent_format, attribute, value)


def _is_colour(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(
        type(v) in (int, float) and abs(v) <= LARGEST for v in value)


def _known(module, class_name, base, what, name):
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise QuantTuneError(f"'{name}' holds {what} '{class_name}', which this ComfyUI does not "
                             f"know; update ComfyUI or {AGAIN}.")
    return found


def _check_numbers(value, where: str, tensors: int, name: str) -> None:
    """Refuse numbers that no model has: the host would fill the memory, or compute with NaN."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_numbers(entry, f"{where}.{key}", tensors, name)
    elif isinstance(value, list):
        for entry in value:
            _check_numbers(entry, where, tensors, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        # Each repeated part has tensors of its own in the file.
        last = where.rpartition(".")[2]
        most = tensors if any(word in last for word in COUNTS) else LARGEST
        # An integer of a file may have more digits than a float has.
        if value != value or abs(value) > most:
            raise QuantTuneError(f"'{name}' says {where[:100]} = {brief(value, 60)}, which no "
                                 f"model has; the file is damaged, {AGAIN}.")
