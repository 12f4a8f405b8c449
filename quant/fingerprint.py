"""A short name for the exact integers and scales of a quantized model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from .weight import QuantizedWeight
from .whole_file import tensor_bytes


def fingerprint(layers: Mapping[str, QuantizedWeight]) -> str:
    """SHA-256 over names, bit widths, shapes, scales, zero points and packed codes.

    Independent of the order of ``layers``, the device and the file they came from. A scale set
    carries the fingerprint of the base it was trained on.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(layers):
        add_layer(digest, name, layers[name])
    return digest.hexdigest()


def add_layer(digest, name: str, layer: QuantizedWeight) -> None:
    """Add one layer to a SHA-256; the layers have to come in the order of their names."""
    facts = [name, layer.bits, list(layer.shape), layer.split]
    digest.update(json.dumps(facts).encode())
    for tensor in (layer.scale, layer.zero_point, layer.packed):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(tensor_bytes(tensor))
