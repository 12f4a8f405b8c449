"""What a LoRA file says of itself: the metadata that kohya's tools and model browsers show."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import comfy.supported_models
import torch
from torch import Tensor

from ..quant.safe_file import METADATA_KEY
from ..quant.whole_file import stored_order, tensor_bytes
from ..training.lora_layer import LoraLayer

LORA_FORMAT = "quanttune.lora"
LORA_FORMAT_VERSION = 1
FAMILIES = (
    # The host's class, kohya's version, the architecture of sai_model_spec, pixels a side.
    (comfy.supported_models.SDXL, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024),
    (comfy.supported_models.SD20, "sd_v2", "stable-diffusion-v2-512", 512),
    (comfy.supported_models.SD15, "sd_v1", "stable-diffusion-v1", 512),
    (comfy.supported_models.SD3, "sd3", "stable-diffusion-3", 1024),
    (comfy.supported_models.Flux, "flux1", "flux-1", 1024),
)
V_PREDICTION = {"sd_v2": ("sd_v2_v", "stable-diffusion-v2-768-v", 768)}
"""SD2.x has a model of its own for that."""


def describe(layers: Mapping[str, LoraLayer], model,
             facts: Mapping[str, object] | None = None) -> dict[str, str]:
    """The metadata of a LoRA that was trained on ``model``.

    Args:
        layers: the LoRA.
        model: MODEL.
        facts: what else there is to say: those whose names begin with ``ss_`` or ``modelspec.``
            stand beside the others and replace them, the rest goes into our own object.

    Returns:
        Names and texts: kohya's ``ss_...``, ``modelspec....`` of sai_model_spec 1.0.0, and a JSON
        object of ours. The title and date come when the file is written.
    """
    config = model.model.model_config
    version, architecture, pixels = next(
        ((v, a, p) for family, v, a, p in FAMILIES if isinstance(config, family)),
        (type(config).__name__.lower(), type(config).__name__.lower(), 1024))
    predicts_v = model.model.model_type.name == "V_PREDICTION"
    if predicts_v:
        version, architecture, pixels = V_PREDICTION.get(version, (version, architecture, pixels))
    dora = any(layer.dora_scale is not None for layer in layers.values())
    text = {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": _one({layer.rank for layer in layers.values()}),
        "ss_network_alpha": _one({layer.alpha for layer in layers.values()}),
        "ss_network_args": json.dumps({"algo": "lora", "dora_wd": True} if dora else {}),
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": ("https://github.com/Stability-AI/generative-models"
                                     if version.startswith("sdxl") else "diffusers"),
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }
    own = {"format": LORA_FORMAT, "format_version": LORA_FORMAT_VERSION}
    for key, value in (facts or {}).items():
        if key.startswith(("ss_", "modelspec.")):
            text[key] = value if isinstance(value, str) else (
                json.dumps(value) if isinstance(value, (dict, list)) else str(value))
        else:
            own[key] = value
    return {**text, METADATA_KEY: json.dumps(own)}


def _one(values: set) -> str:
    """The value that all layers share, as kohya's tools write it."""
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"


def on_saving(metadata: Mapping[str, str], tensors: Mapping[str, Tensor],
              path: Path) -> tuple[dict[str, str], dict]:
    """What is known of a file only when it is written.

    Args:
        metadata: of the LoRA.
        tensors: as they are written.
        path: of the file, whose name becomes its title.

    Returns:
        ``(texts, our own object)``.
    """
    texts = {k: v for k, v in metadata.items()
             if isinstance(v, str) and k not in ("format", METADATA_KEY)}
    texts |= {"ss_output_name": path.stem, "sshs_model_hash": content_hash(tensors)}
    if "modelspec.sai_model_spec" in texts:
        now = datetime.datetime.now().replace(microsecond=0)
        texts |= {"modelspec.title": path.stem, "modelspec.date": now.isoformat()}
    own = own_object(metadata)
    return texts, {**own, "format": LORA_FORMAT, "format_version": LORA_FORMAT_VERSION}


def own_object(metadata: Mapping[str, str]) -> dict:
    """Our object in a LoRA's metadata; empty if there is none that can be read."""
    try:
        own = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return own if isinstance(own, dict) else {}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes as a file holds them, by which galleries know a LoRA.

    Source: ``addnet_hash_safetensors`` of kohya's sd-scripts.
    """
    digest = hashlib.sha256()
    for name in stored_order(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        with torch.no_grad():
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
