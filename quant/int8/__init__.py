"""Integer products: activations quantized at run time, 8-bit weights, one backend a device."""

from .activation import Granularity, QuantizedActivation, quantize_tensor, quantize_tokens
from .backend import Backend, ConvGeometry, Prepared, choose
from .kitchen import KitchenBackend
from .layer import Int8Layer, SharedActivation
from .observer import RangeEstimator, RangeObserver
from .onednn import OneDNNBackend
from .ranges import ActivationRanges, bucket_of
from .reference import ReferenceBackend
from .triton_backend import TritonBackend
from .weight import Int8Weight

BACKENDS: list[Backend] = [OneDNNBackend(), KitchenBackend(), TritonBackend()]
"""Backends in the order in which they are asked; the reference is for tests alone."""

__all__ = [
    "BACKENDS",
    "ActivationRanges",
    "Backend",
    "ConvGeometry",
    "Granularity",
    "Int8Layer",
    "Int8Weight",
    "KitchenBackend",
    "OneDNNBackend",
    "Prepared",
    "QuantizedActivation",
    "RangeEstimator",
    "RangeObserver",
    "ReferenceBackend",
    "SharedActivation",
    "TritonBackend",
    "bucket_of",
    "choose",
    "quantize_tensor",
    "quantize_tokens",
]
