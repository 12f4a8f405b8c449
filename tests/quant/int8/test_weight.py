"""Packed weights as signed 8-bit values: nothing is rounded, whatever the zero point."""

import pytest
import torch

from quanttune.quant import QuantizedWeight, QuantSpec
from quanttune.quant.int8 import Int8Weight


def joined(parts):
    return torch.cat([weight.dequantize() for _, weight in parts], dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (6, 5, 3, 3)])
@pytest.mark.parametrize("split", [None, 3])
def test_equals_the_packed_weight(bits, symmetric, shape, split):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3
    packed = QuantizedWeight.quantize(weight, QuantSpec(bits, symmetric), split)
    parts = Int8Weight.parts(packed)
    assert [p.values.dtype for _, p in parts] == [torch.int8] * packed.parts
    assert [c.stop - c.start for c, _ in parts] == ([shape[1]] if split is None
                                                    else [split, shape[1] - split])
    torch.testing.assert_close(joined(parts), packed.dequantize(), rtol=1e-6, atol=0)


def test_only_what_does_not_fit_gets_an_offset():
    weight = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    for bits, symmetric, expected in ((8, True, False), (8, False, True), (4, False, False)):
        packed = QuantizedWeight.quantize(weight, QuantSpec(bits, symmetric))
        ((_, part),) = Int8Weight.parts(packed)
        assert (part.offset is not None) is expected


def test_a_zero_point_far_outside_of_the_codes():
    packed = QuantizedWeight.quantize(torch.randn(4, 9), QuantSpec(4))
    packed.zero_point[1] = -170.0
    ((_, part),) = Int8Weight.parts(packed)
    assert part.offset is not None
    torch.testing.assert_close(part.dequantize(), packed.dequantize(), rtol=1e-6, atol=0)
