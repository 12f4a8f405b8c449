"""Integer products: activations quantized at run time, 8-bit weights, one backend a device."""

from .activation import Granularity, QuantizedActivation, quantize_tensor, quantize_tokens
from .backend import Backend, ConvGeometry, Prepared, choose
from .layer import Int8Layer, SharedActivation
from .onednn import OneDNNBackend
from .reference import ReferenceBackend
from .weight import Int8Weight

BACKENDS: list[Backend] = [OneDNNBackend()]
"""Backends in the order in which they are asked; the reference is for tests alone."""

__all__ = [
    "BACKENDS",
    "Backend",
    "ConvGeometry",
    "Granularity",
    "Int8Layer",
    "Int8Weight",
    "OneDNNBackend",
    "Prepared",
    "QuantizedActivation",
    "ReferenceBackend",
    "SharedActivation",
    "choose",
    "quantize_tensor",
    "quantize_tokens",
]
