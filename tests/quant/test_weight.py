import pytest
import torch

from quanttune.quant import (
    QuantizedWeight,
    QuantSpec,
    QuantTuneError,
    choose_qparams,
    dequantize_codes,
    quantize_codes,
)
from quanttune.tests.quant.reference import materialise, random_weight, relative


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1, 1), (6, 4, 3, 3), (5, 3, 3), (4, 2, 2, 2, 2)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_quantizer(shape, bits):
    weight = torch.randn(shape)
    spec = QuantSpec(bits)
    w2d = weight.view(shape[0], -1)
    scale, zero_point = choose_qparams(w2d, spec)
    codes = quantize_codes(w2d, scale, zero_point, bits)
    qweight = QuantizedWeight.quantize(weight, spec)
    assert torch.equal(qweight.codes(), codes)
    assert torch.equal(qweight.scale, scale[:, None])
    expected = dequantize_codes(codes, scale, zero_point).view(shape)
    assert relative(qweight.dequantize(), expected) < 1e-6
    assert (qweight.numel, qweight.parts) == (weight.numel(), 1)


def test_split_quantizes_each_part_on_its_own():
    weight = torch.randn(8, 12, 1, 1)
    weight[:, 8:] *= 50
    qweight = QuantizedWeight.quantize(weight, QuantSpec(4), split=8)
    assert tuple(qweight.scale.shape) == (8, 2) and qweight.parts == 2
    for part, columns in enumerate([slice(0, 8), slice(8, 12)]):
        alone = QuantizedWeight.quantize(weight[:, columns], QuantSpec(4))
        assert torch.equal(qweight.scale[:, part], alone.scale[:, 0])
        assert torch.equal(qweight.dequantize()[:, columns], alone.dequantize())
    whole = QuantizedWeight.quantize(weight, QuantSpec(4))
    small = weight[:, :8]
    assert (qweight.dequantize()[:, :8] - small).norm() < 0.2 * (
        whole.dequantize()[:, :8] - small
    ).norm()


@pytest.mark.parametrize("split", [0, 12, -1, 40, 2.0, True])
def test_wrong_split(split):
    with pytest.raises(QuantTuneError, match="split"):
        QuantizedWeight.quantize(torch.randn(8, 12), QuantSpec(4), split=split)


@pytest.mark.parametrize("shape", [(8,), (0, 4), ()])
def test_wrong_shape(shape):
    with pytest.raises(QuantTuneError, match="float"):
        QuantizedWeight.quantize(torch.ones(shape), QuantSpec(4))


def test_sizes():
    qweight = random_weight((64, 128), 4)
    assert qweight.nbytes == 64 * 128 // 2 + 2 * 64 * 4


def test_error():
    weight = torch.randn(32, 64)
    qweight = QuantizedWeight.quantize(weight, QuantSpec(4))
    assert qweight.error(weight) == pytest.approx(relative(materialise(qweight), weight), rel=1e-4)
    zero = QuantizedWeight.quantize(torch.zeros(2, 4), QuantSpec(4))
    assert zero.error(torch.zeros(2, 4)) == 0


def test_fewer_bits_lose_more():
    weight = torch.randn(32, 256)
    errors = [QuantizedWeight.quantize(weight, QuantSpec(b)).error(weight) for b in (8, 4, 3, 2)]
    assert errors == sorted(errors) and errors[0] < 0.01


def test_channels_last_and_transposed_weights():
    weight = torch.randn(8, 4, 3, 3)
    expected = QuantizedWeight.quantize(weight, QuantSpec(4))
    strided = weight.to(memory_format=torch.channels_last)
    assert torch.equal(QuantizedWeight.quantize(strided, QuantSpec(4)).packed, expected.packed)
