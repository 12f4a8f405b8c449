"""Our packed uniform integers as a ``QuantizedTensor`` layout of the host (comfy-kitchen)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout

from ..quant import LowRank, QuantizedWeight, QuantSpec, QuantTuneError

LAYOUT_NAME = "QuantTuneUniformLayout"


class UniformLayout(QuantizedLayout):
    """Per-output-channel uniform integers of 2, 3, 4 or 8 bits with zero-point, for any shape.

    ``qdata``: packed uint8 (see ``quant.packing``). ``Params``: ``scale`` and ``zero_point``,
    float32 of shape ``[out, parts]``; ``bits``; ``split`` (input channels of the first part of a
    layer quantized in two input groups, or None); ``symmetric``. ``orig_dtype`` is the dtype a
    layer computes in. TuneQDM eq. 1-2.
    """

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        zero_point: torch.Tensor
        bits: int
        split: int | None
        symmetric: bool

        def _tensor_fields(self) -> list[str]:
            return ["scale", "zero_point"]

    @classmethod
    def quantize(cls, tensor, bits=8, split=None, symmetric=False, scale=None,
                 stochastic_rounding=0, inplace_ops=False):
        """Quantize a float tensor; ``scale='recalculate'`` and rounding seeds are the host's.

        The host asks for this when it bakes a patch into a weight. Rounding is to nearest: a
        seeded stochastic rounding would add noise of one step without removing any bias here.
        """
        weight = QuantizedWeight.quantize(tensor.float(), QuantSpec(bits, symmetric), split=split)
        return weight.packed, cls._params(weight, tensor.dtype)

    @classmethod
    def _params(cls, weight: QuantizedWeight, dtype: torch.dtype) -> Params:
        return cls.Params(scale=weight.scale, zero_point=weight.zero_point, bits=weight.bits,
                          split=weight.split, symmetric=weight.symmetric, orig_dtype=dtype,
                          orig_shape=tuple(weight.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        return _weight(qdata, params).dequantize(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale, qtensor._params.zero_point

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        raise QuantTuneError(
            "This node would save packed integers as if they were float weights; use "
            "'Save Quantized UNet' for a quantized model instead."
        )

    @classmethod
    def requantize_kwargs(cls, qtensor):
        params = qtensor._params
        return {"bits": params.bits, "split": params.split, "symmetric": params.symmetric}


register_layout_class(LAYOUT_NAME, UniformLayout)


def _weight(qdata: torch.Tensor, params: UniformLayout.Params,
            low_rank: LowRank | None = None) -> QuantizedWeight:
    return QuantizedWeight(packed=qdata, scale=params.scale, zero_point=params.zero_point,
                           bits=params.bits, shape=tuple(params.orig_shape), split=params.split,
                           symmetric=params.symmetric, low_rank=low_rank)


def wrap(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedTensor:
    """The host's tensor around ``weight``: its shape is the logical one, its dtype ``dtype``."""
    return QuantizedTensor(weight.packed, LAYOUT_NAME, UniformLayout._params(weight, dtype))


def is_uniform(tensor) -> bool:
    """Whether ``tensor`` is a host tensor of this layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME


def is_packed(tensor) -> bool:
    """Whether a weight is held in less than floats: in this layout or another one."""
    return isinstance(tensor, QuantizedTensor)


def unwrap(tensor: QuantizedTensor, low_rank: LowRank | None = None) -> QuantizedWeight:
    """The packed weight inside a host tensor of this layout, which shares its memory.

    ``low_rank`` is what a LoRA adds to it, if any.
    """
    return _weight(tensor._qdata, tensor._params, low_rank)
