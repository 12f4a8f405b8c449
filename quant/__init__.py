"""Quantization on torch alone: quantizer, packing, scale sets, routing, and the file formats."""

from .bank import ScaleBank, check_fits, check_strength
from .checkpoint import (
    QuantizedCheckpoint,
    load_quantized_unet,
    save_quantized_unet,
)
from .dequantize import dequantize_into
from .errors import QuantTuneError
from .fingerprint import fingerprint
from .functional import (
    apply_scales,
    conv2d,
    dequantize_weight,
    linear,
    scaled_conv2d,
    scaled_linear,
)
from .layers import (
    QUANTIZE_PRESETS,
    is_quantizable,
    keep_float,
    quantizable_layers,
    scale_shape,
    scale_shapes,
    shortcut_splits,
)
from .low_rank import LowRank
from .packing import pack, packed_shape, unpack
from .qdiffusion import QDiffusionCheckpoint, QDiffusionLayer, is_qdiffusion, load_qdiffusion
from .quantizer import choose_qparams, dequantize_codes, quantize_codes
from .scale_file import load_scale_set, save_scale_set
from .scales import LayerScales, ScaleMetadata, ScaleSet, expert_index
from .scratch import WEIGHTS, ScratchPool
from .spec import SUPPORTED_BITS, QuantSpec, RangeMethod
from .unet_metadata import UNetMetadata
from .weight import QuantizedWeight

__all__ = [
    "QUANTIZE_PRESETS",
    "SUPPORTED_BITS",
    "WEIGHTS",
    "LayerScales",
    "LowRank",
    "QDiffusionCheckpoint",
    "QDiffusionLayer",
    "QuantSpec",
    "QuantTuneError",
    "QuantizedCheckpoint",
    "QuantizedWeight",
    "RangeMethod",
    "ScaleBank",
    "ScaleMetadata",
    "ScaleSet",
    "ScratchPool",
    "UNetMetadata",
    "apply_scales",
    "check_fits",
    "check_strength",
    "choose_qparams",
    "conv2d",
    "dequantize_codes",
    "dequantize_into",
    "dequantize_weight",
    "expert_index",
    "fingerprint",
    "is_qdiffusion",
    "is_quantizable",
    "keep_float",
    "linear",
    "load_qdiffusion",
    "load_quantized_unet",
    "load_scale_set",
    "pack",
    "packed_shape",
    "quantizable_layers",
    "quantize_codes",
    "save_quantized_unet",
    "save_scale_set",
    "scale_shape",
    "scale_shapes",
    "scaled_conv2d",
    "scaled_linear",
    "shortcut_splits",
    "unpack",
]
