"""What tells one MODEL from another across sessions, by content."""

from __future__ import annotations

import hashlib

from .build import quantized_model
from .patches import changes_digest, content
from .quantize import originals
from .routing import OPTION as ROUTER


def identity_of(patcher) -> str:
    """Of what a MODEL computes: its weights, patches, bypass LoRAs, scales and sampling."""
    own = quantized_model(patcher)
    digest = hashlib.sha256(changes_digest(patcher).encode())
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
        digest.update(key.encode() + content(entry[0][0]))
    return digest.hexdigest()
