"""Every backend of this machine against the exact product: odd shapes, groups, strides, padding."""

import pytest
import torch
import torch.nn.functional as F

from quanttune.quant import QuantTuneError
from quanttune.quant.int8 import (
    BACKENDS,
    ConvGeometry,
    Granularity,
    Int8Weight,
    ReferenceBackend,
    choose,
    onednn,
    quantize_tensor,
    quantize_tokens,
)

CPU = torch.device("cpu")
HERE = [b for b in BACKENDS if b.refuses(CPU, None, (64, 64)) is None]
each_backend = pytest.mark.parametrize("backend", HERE, ids=[b.name for b in HERE])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to the largest output or bias: two roundings to the result's dtype."""


def weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return Int8Weight(values, torch.rand(shape[0], generator=generator) + 0.1)


def bias_of(outputs):
    return torch.randn(outputs, generator=torch.Generator().manual_seed(2))


def check(backend, w, conv, q, bias, dtype=torch.float32):
    got = backend.prepare(w, conv)(q, w.scale, bias, dtype)
    expected = ReferenceBackend().prepare(w, conv)(q, w.scale, bias, torch.float64)
    assert got.dtype == dtype and got.shape == expected.shape
    # The product before the bias is rounded, too, and a bias may cancel most of it.
    parts = [expected, *([] if bias is None else [bias])]
    largest = max(1e-9, *(float(p.abs().max()) for p in parts))
    assert float((got.double() - expected).abs().max()) <= TOLERANCE[dtype] * largest


def test_the_reference_is_the_float_product():
    """Of the dequantized operands, in float64."""
    x, w, bias = torch.rand(2, 9, 7, 6) - 0.2, weight((8, 3, 3, 2)), torch.randn(8)
    conv = ConvGeometry((3, 2), (2, 1), (1, 0), (1, 2), groups=2)
    q = quantize_tensor(x)
    expected = F.conv2d(q.dequantize().double().movedim(-1, 1), w.dequantize().double(),
                        bias.double(), conv.stride, conv.padding, conv.dilation, conv.groups)
    got = ReferenceBackend().prepare(w, conv)(q, w.scale, bias, torch.float32)
    torch.testing.assert_close(got.movedim(-1, 1), expected.float(), rtol=1e-5, atol=1e-4)


def test_this_machine_has_a_backend():
    """Those without one skip what follows, which must not happen unseen where it is developed."""
    reasons = {b.name: b.refuses(CPU, None, (64, 64)) for b in BACKENDS}
    assert HERE or "VNNI" in str(reasons), reasons


@each_backend
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens,inputs,outputs", [
    (1, 1, 1), (1, 320, 64), (5, 17, 3), (77, 768, 320), (2, 64, 1281),
])
@pytest.mark.parametrize("quantize", [quantize_tensor, quantize_tokens])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(backend, dtype, tokens, inputs, outputs, quantize, with_bias):
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)) + 0.3
    bias = bias_of(outputs) if with_bias else None
    check(backend, weight((outputs, inputs)), None, quantize(x), bias, dtype)


@each_backend
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("image,shape,conv", [
    ((1, 8, 8, 16), (16, 16, 3, 3), ConvGeometry((3, 3), (1, 1), (1, 1))),
    ((2, 9, 7, 20), (12, 20, 3, 3), ConvGeometry((3, 3), (2, 2), (1, 1))),
    ((2, 5, 5, 64), (32, 64, 1, 1), ConvGeometry((1, 1))),
    ((1, 11, 13, 5), (7, 5, 5, 3), ConvGeometry((5, 3), (2, 1), (0, 2))),
    ((3, 12, 12, 24), (8, 24, 3, 3), ConvGeometry((3, 3), (1, 1), (2, 2), (2, 2))),
    ((2, 8, 6, 32), (32, 8, 3, 3), ConvGeometry((3, 3), (1, 1), (1, 1), groups=4)),
    ((1, 8, 8, 16), (16, 1, 3, 3), ConvGeometry((3, 3), (1, 1), (1, 1), groups=16)),
    ((1, 3, 3, 16), (16, 16, 3, 3), ConvGeometry((3, 3))),
    ((1, 1, 1, 1), (1, 1, 1, 1), ConvGeometry((1, 1))),
])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution(backend, dtype, image, shape, conv, with_bias):
    x = torch.randn(image, generator=torch.Generator().manual_seed(1)) + 0.3
    bias = bias_of(shape[0]) if with_bias else None
    check(backend, weight(shape), conv, quantize_tensor(x), bias, dtype)


@each_backend
def test_extreme_codes_do_not_saturate(backend):
    w = Int8Weight(torch.full((16, 64, 3, 3), -128, dtype=torch.int8), torch.ones(16))
    x = torch.ones(1, 6, 6, 64)
    check(backend, w, ConvGeometry((3, 3), (1, 1), (1, 1)), quantize_tensor(x), None)
    check(backend, Int8Weight(w.values[..., 0, 0].contiguous(), w.scale), None,
          quantize_tensor(x.flatten(0, 2)), None)


@each_backend
def test_one_convolution_at_several_sizes_and_back(backend):
    """The prepacked layout changes with the size; what is in it must not."""
    w, conv = weight((48, 32, 3, 3)), ConvGeometry((3, 3), (1, 1), (1, 1))
    prepared = backend.prepare(w, conv)
    for size in (64, 8, 33, 64):
        q = quantize_tensor(torch.randn(1, size, size, 32))
        expected = ReferenceBackend().prepare(w, conv)(q, w.scale, None, torch.float32)
        torch.testing.assert_close(prepared(q, w.scale, None, torch.float32), expected,
                                   rtol=1e-4, atol=1e-2)
    assert torch.equal(prepared.unpack(), w.values)


@each_backend
def test_compiled_code_meets_a_nan_with_an_error(backend):
    """It quantizes without looking; the product does look."""
    w = weight((8, 16))
    q = quantize_tensor(torch.randn(4, 16))._replace(scale=torch.tensor(float("nan")))
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        backend.prepare(w, None)(q, w.scale, None, torch.float32)


def test_the_first_that_fits_is_chosen_and_the_others_say_why():
    class No:
        name = "no"

        def refuses(self, device, conv, channels):
            return "it is a test"

    reference = ReferenceBackend()
    assert choose([No(), reference], CPU, None, (8, 8)) == (reference, {"no": "it is a test"})
    assert choose([No()], CPU, None, (8, 8)) == (None, {"no": "it is a test"})
    assert choose([reference], torch.device("mps"), None, (8, 8))[0] is None


def test_onednn_is_for_processors_and_wide_convolutions():
    backend = onednn.OneDNNBackend()
    assert "processor" in backend.refuses(torch.device("cuda"), None, (64, 64))
    conv = ConvGeometry((3, 3))
    if HERE:
        assert backend.refuses(CPU, conv, (64, 64)) is None
        assert "gains nothing" in backend.refuses(CPU, conv, (4, 320))
        assert "gains nothing" in backend.refuses(CPU, conv, (320, 4))


@pytest.mark.skipif(not HERE, reason="a processor without VNNI is refused anyway")
def test_a_torch_that_changed_its_operators_is_refused(monkeypatch):
    onednn._trial.cache_clear()
    monkeypatch.setattr(onednn._Linear, "__call__", lambda *a: torch.zeros(60, 8))
    try:
        assert "wrong" in onednn.OneDNNBackend().refuses(CPU, None, (64, 64))
    finally:
        onednn._trial.cache_clear()
    monkeypatch.setattr(onednn._Linear, "__init__",
                        lambda *a: torch.ops.onednn.there_is_no_such_operator)
    try:
        assert "lacks it" in onednn.OneDNNBackend().refuses(CPU, None, (64, 64))
    finally:
        onednn._trial.cache_clear()


@each_backend
def test_granularity_is_declared(backend):
    assert backend.granularity in list(Granularity)
