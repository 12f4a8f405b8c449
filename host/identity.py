"""What tells one MODEL from another across sessions, by content."""

from __future__ import annotations

import hashlib

import torch

from .build import quantized_model
from .quantize import originals
from .routing import OPTION as ROUTER

SAMPLES = 1024
"""Values of a tensor that count, evenly apart."""


def identity_of(patcher) -> str:
    """Of what a MODEL computes: its weights, patches, scales and sampling."""
    own = quantized_model(patcher)
    digest = hashlib.sha256(patches_digest(patcher).encode())
    sampling = patcher.get_model_object("model_sampling")
    digest.update(repr([c.__name__ for c in type(sampling).__mro__]).encode())
    for key, value in sorted(sampling.state_dict().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    router = patcher.model_options["transformer_options"].get(ROUTER)
    if router is not None:
        digest.update(router.digest.encode())
    if own is not None:
        return own.fingerprint + digest.hexdigest()
    for key, entry in sorted(originals(patcher).items()):
        digest.update(key.encode() + _content(entry[0][0]))
    return digest.hexdigest()


def patches_digest(patcher) -> str:
    """Of the patches on a MODEL (LoRAs, merges), whoever loaded them and when; "" without any."""
    if not patcher.patches:
        return ""
    digest = hashlib.sha256()
    for key, patches in sorted(patcher.patches.items()):
        digest.update(str(key).encode())
        for patch in patches:
            digest.update(_content(patch))
    return digest.hexdigest()


def _content(value) -> bytes:
    """Of a tensor its shape and `SAMPLES` of its values; of an adapter what it holds."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().flatten()
        flat = flat[:: max(1, flat.numel() // SAMPLES)]
        return f"{tuple(value.shape)}".encode() + flat.float().cpu().numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return b"(" + b",".join(_content(v) for v in value) + b")"
    if hasattr(value, "weights"):
        return type(value).__name__.encode() + _content(value.weights)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__).encode()
    return repr(value).encode()
