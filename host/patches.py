"""The patches on a MODEL (LoRAs, merges) and what is put around its layers, by content."""

from __future__ import annotations

import hashlib
import secrets

import torch
from comfy.quant_ops import QuantizedTensor

LOADED = "quanttune_patches"
"""Where a diffusion model keeps what `note_patches` found, until it is unloaded."""
SAMPLES = 1024
"""Values of a tensor that count, evenly apart."""


def note_patches(patcher, injected: bool = False) -> None:
    """Keep the digest of what a MODEL was just loaded with; see `loaded_patches`.

    injected: whether its injections are around the layers at this moment.
    """
    unet = patcher.model.diffusion_model.__dict__
    # The host loads a model anew before every sampling; the patches are the same ones mostly.
    # The injections themselves are kept, so that no other object can take one's place.
    around = [i for each in patcher.injections.values() for i in each] if injected else []
    source = patcher.patches_uuid, around
    if unet.get(LOADED, (None, ""))[0] != source:
        digest = changes_digest(patcher) if injected else patches_digest(patcher)
        unet[LOADED] = source, digest


def changes_digest(patcher) -> str:
    """`patches_digest` and `injections_digest` in one; "" without any of either."""
    return patches_digest(patcher) + injections_digest(patcher)


def loaded_patches(diffusion_model: torch.nn.Module) -> str:
    """`changes_digest` of the MODEL that ``diffusion_model`` was last loaded for."""
    return diffusion_model.__dict__.get(LOADED, ("", ""))[1]


def patches_digest(patcher) -> str:
    """Of the patches on a MODEL (LoRAs, merges), whoever loaded them and when; "" without any."""
    if not patcher.patches:
        return ""
    digest = hashlib.sha256()
    for key, patches in sorted(patcher.patches.items()):
        digest.update(str(key).encode())
        for patch in patches:
            digest.update(content(patch))
    return digest.hexdigest()


def injections_digest(patcher) -> str:
    """Of what is put around a patcher's layers while it is loaded (a bypass LoRA); "" without any.

    What cannot be looked into is told apart by object, so it is never taken for another.
    """
    if not patcher.injections:
        return ""
    digest = hashlib.sha256()
    for key, injections in sorted(patcher.injections.items()):
        digest.update(str(key).encode())
        for injection in injections:
            digest.update(_injected(injection))
    return digest.hexdigest()


def _injected(injection) -> bytes:
    """The adapters, by layer and with their strengths, that the host's bypass manager puts in."""
    for cell in getattr(injection.inject, "__closure__", None) or ():
        adapters = getattr(cell.cell_contents, "adapters", None)
        if isinstance(adapters, dict):
            return content([[key, *value] for key, value in sorted(adapters.items())])
    return vars(injection).setdefault("quanttune_token", secrets.token_hex()).encode()


def content(value) -> bytes:
    """Of a tensor its shape and `SAMPLES` of its values; of an adapter what it holds."""
    if isinstance(value, QuantizedTensor):
        return content([value._qdata, value._params.scale])
    if isinstance(value, torch.Tensor):
        flat = value.detach().flatten()
        flat = flat[:: max(1, flat.numel() // SAMPLES)]
        return f"{tuple(value.shape)}".encode() + flat.float().cpu().numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return b"(" + b",".join(content(v) for v in value) + b")"
    if hasattr(value, "weights"):
        return type(value).__name__.encode() + content(value.weights)
    if isinstance(value, torch.nn.Module):  # an adapter under training
        return type(value).__name__.encode() + content(sorted(value.state_dict().items()))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__).encode()
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # a strength of 1 is one of 1.0
    return repr(value).encode()
