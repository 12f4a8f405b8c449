"""bitsandbytes' NF4, FP4 and LLM.int8 weights as a ``QuantizedTensor`` layout of the host.

The numbers are those of bitsandbytes' own quantizers and dequantizers (Dettmers et al., *QLoRA*,
2023; *LLM.int8()*, 2022). As in the rest of this pack only weights are rounded: activations
multiply the dequantized weight, also of LLM.int8, whose own product would round them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..training.bitsandbytes_library import bitsandbytes

LAYOUT_NAME = "QuantTuneBitsandbytesLayout"
FOUR_BIT = ("nf4", "fp4")
KINDS = (*FOUR_BIT, "int8")
LABELS = {"nf4": "NF4", "fp4": "FP4", "int8": "LLM.int8"}
BLOCK = 64
"""Weights that share a scale, by default."""
INT8_MOST = 127


@dataclass(frozen=True)
class BnbWeight:
    """A weight matrix as bitsandbytes quantizes it.

    Attributes:
        data: of 4 bits uint8 ``[n / 2, 1]``, two codes a byte; of int8 ``[out, in]``.
        scale: float32; of 4 bits the largest value of each block, of int8 that of each row.
        kind: of `KINDS`.
        shape: ``(out, in)``.
        block: weights that share a scale; of int8 without meaning.
    """

    data: Tensor
    scale: Tensor
    kind: str
    shape: tuple[int, ...]
    block: int = BLOCK

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + self.scale.nbytes

    @classmethod
    def quantize(cls, weight: Tensor, kind: str, block: int = BLOCK) -> BnbWeight:
        """By bitsandbytes' own quantizer.

        Args:
            weight: float ``[out, in]`` on any device that bitsandbytes works on.
            kind: of `KINDS`.
            block: of 4 bits, a power of two from 64 on.

        Raises:
            QuantTuneError: bitsandbytes is missing or cannot do this here, or NaN.
        """
        functional = _functional()
        if not is_finite(weight):
            raise QuantTuneError("The weights hold NaN or infinite values; use another file.")
        try:
            if kind == "int8":
                codes, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
                return cls(codes, scale.float(), kind, tuple(weight.shape))
            codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=block,
                                                    quant_type=kind)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise QuantTuneError(
                f"bitsandbytes cannot make {LABELS[kind]} weights on this {weight.device.type} "
                f"({str(error).splitlines()[0]}); use 'Quantize UNet' instead.") from error
        return cls(codes, state.absmax.float(), kind, tuple(weight.shape), block)

    def to(self, device) -> BnbWeight:
        """The same weight elsewhere."""
        return BnbWeight(self.data.to(device), self.scale.to(device), self.kind, self.shape,
                         self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out, in]`` in ``dtype``, by bitsandbytes' own dequantizer."""
        if self.kind == "int8":
            weight = self.data.to(torch.float32) * (self.scale[:, None] / INT8_MOST)
            return weight.to(dtype)
        functional = _functional()
        code = functional.get_4bit_type(self.kind, device=self.data.device)
        state = functional.QuantState(self.scale, torch.Size(self.shape), code, self.block,
                                      self.kind, dtype)
        return functional.dequantize_4bit(self.data, state).view(self.shape)

    def wrap(self, dtype: torch.dtype) -> QuantizedTensor:
        """The host's tensor around it: its shape is the logical one, its dtype ``dtype``."""
        return QuantizedTensor(self.data, LAYOUT_NAME, BnbLayout.Params(
            scale=self.scale, kind=self.kind, block=self.block, orig_dtype=dtype,
            orig_shape=tuple(self.shape)))


class BnbLayout(QuantizedLayout):
    """A `BnbWeight` inside the host."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        kind: str
        block: int

    @classmethod
    def quantize(cls, tensor, kind="nf4", block=BLOCK, **kwargs):
        """Where the host asks to bake a patch into a weight."""
        weight = BnbWeight.quantize(tensor, kind, block)
        return weight.data, weight.wrap(tensor.dtype)._params

    @classmethod
    def dequantize(cls, qdata, params):
        """In the dtype a layer computes in."""
        return _weight(qdata, params).dequantize(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Codes and scales."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Of the host's own saving, which knows no such layer."""
        raise QuantTuneError("This node would save packed weights as if they were floats; use "
                             "'Export Float UNet' for a model of bitsandbytes instead.")

    @classmethod
    def requantize_kwargs(cls, qtensor):
        """How to quantize the same way again."""
        return {"kind": qtensor._params.kind, "block": qtensor._params.block}


register_layout_class(LAYOUT_NAME, BnbLayout)


def is_bnb(tensor) -> bool:
    """Whether ``tensor`` is a host tensor of this layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME


def bnb_weight(tensor: QuantizedTensor) -> BnbWeight:
    """What is inside a host tensor of this layout; it shares the memory."""
    return _weight(tensor._qdata, tensor._params)


def _weight(qdata: Tensor, params) -> BnbWeight:
    return BnbWeight(qdata, params.scale, params.kind, tuple(params.orig_shape), params.block)


def _functional():
    return bitsandbytes("A model of bitsandbytes", "use 'Quantize UNet'").functional
