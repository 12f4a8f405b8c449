"""The graphics card's kernels in Triton's interpreter, on the processor; run by `test_graphics`.

The interpreter stands in for a card: it runs the same kernels, block by block, in numpy. What it
cannot show is whether they compile, and how fast they are; `triton_backend.trial` asks each card.
"""

import pytest
import torch

from quanttune.quant import LayerScales, QuantizedWeight, QuantSpec
from quanttune.quant.int8 import (
    ConvGeometry,
    Granularity,
    Int8Layer,
    Int8Weight,
    KitchenBackend,
    ReferenceBackend,
    TritonBackend,
    activation,
    kitchen,
    triton_backend,
)
from quanttune.tests.quant.int8.test_backends import TOLERANCE, check, weight

CPU = torch.device("cpu")
# The interpreter cuts floats to bfloat16, where a card rounds.
TOLERANCE[torch.bfloat16] = 2**-7


class OnProcessor(TritonBackend):
    """The backend where it would refuse."""


TRITON = OnProcessor()
KITCHEN = KitchenBackend()
each = pytest.mark.parametrize("backend", [TRITON, KITCHEN], ids=lambda b: b.name)


def products_are_cut():
    """Whether torch's integer product, which stands in for the card's, is wrong here."""
    ones = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(ones, ones.t()) != 64 * 127 * 127).any())


needs_products = pytest.mark.skipif(
    products_are_cut(), reason="a processor without VNNI cuts the sums of integer products")


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


def test_the_trials_pass():
    assert triton_backend.trial(CPU) is None
    if products_are_cut():
        assert "wrong" in kitchen.trial(CPU)
    else:
        assert kitchen.trial(CPU) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (33, 320), (3, 4097)])
@pytest.mark.parametrize("with_scales", [False, True])
def test_tokens_become_the_codes_of_the_plain_formula(dtype, shape, with_scales):
    x = (torch.randn(shape) * 3 + 0.2).to(dtype)
    s_in = torch.rand(shape[1]) + 0.5 if with_scales else None
    got, expected = TRITON.quantize_tokens(x, s_in), activation.quantize_tokens(x, s_in)
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-6, atol=0)
    assert got.values.dtype == torch.int8 and float(got.zero_point) == 0
    off = (got.values.int() - expected.values.int()).abs()
    # Halves round to even there, and up here.
    assert off.max() <= 1 and off.float().mean() <= 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7, 5, 12), (41, 1024)])
@pytest.mark.parametrize("with_scales", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_a_tensor_becomes_the_codes_of_the_plain_formula(dtype, shape, with_scales, static):
    x = (torch.randn(shape) * 3 + 0.7).to(dtype)
    s_in = torch.rand(shape[-1]) + 0.5 if with_scales else None
    qparams = (torch.tensor(0.02), torch.tensor(100.0)) if static else None
    got = TRITON.quantize_tensor(x, s_in, qparams)
    expected = activation.quantize_tensor(x, s_in, qparams)
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-6, atol=0)
    assert float(got.zero_point) == float(expected.zero_point) - 128
    off = (got.values.int() + 128 - expected.values.int()).abs()
    assert off.max() <= 1 and off.float().mean() <= 0.01


def test_more_values_than_one_program_reads(monkeypatch):
    monkeypatch.setattr(triton_backend, "VALUES", 64)
    monkeypatch.setattr(triton_backend, "MOST_PROGRAMS", 8)
    x = torch.randn(50, 33)
    x[49, 32], x[0, 0] = 40, -30
    got, expected = TRITON.quantize_tensor(x), activation.quantize_tensor(x)
    torch.testing.assert_close(got.scale, expected.scale)
    assert ((got.values.int() + 128 - expected.values.int()).abs() <= 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(bad):
    """Nothing waits for the card to raise an error, but the output is NaN as in float."""
    x = torch.randn(6, 64)
    x[3, 5] = bad
    w = weight((8, 64))
    static = torch.tensor(0.02), torch.tensor(100.0)
    for q in (TRITON.quantize_tensor(x), TRITON.quantize_tensor(x, None, static)):
        assert TRITON.prepare(w, None)(q, w.scale, None, torch.float32).isnan().all()
    rows = TRITON.prepare(w, None)(TRITON.quantize_tokens(x), w.scale, None, torch.float32)
    assert rows[3].isnan().all() and rows[:3].isfinite().all()


@each
@pytest.mark.parametrize("tokens,inputs,outputs,dtype", [
    (1, 1, 1, torch.float32), (1, 320, 64, torch.float32), (5, 17, 3, torch.float16),
    (77, 96, 130, torch.bfloat16), (130, 70, 40, torch.float32),
])
@pytest.mark.parametrize("how", ["tensor", "tokens", "unsigned"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(backend, tokens, inputs, outputs, dtype, how, with_bias):
    x = torch.randn(tokens, inputs) + 0.3
    q = {"tensor": backend.quantize_tensor, "tokens": backend.quantize_tokens,
         "unsigned": activation.quantize_tensor}[how](x)
    check(backend, weight((outputs, inputs)), None, q, torch.randn(outputs) if with_bias else None,
          dtype)


@needs_products
def test_kitchen_without_triton(monkeypatch):
    monkeypatch.setattr(triton_backend, "trial", lambda device: "not here")
    x, w = torch.randn(9, 40) + 0.3, weight((24, 40))
    for q in (KITCHEN.quantize_tensor(x), KITCHEN.quantize_tokens(x)):
        check(KITCHEN, w, None, q, torch.randn(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image,shape,conv", [
    ((1, 8, 8, 16), (16, 16, 3, 3), ConvGeometry((3, 3), (1, 1), (1, 1))),
    ((2, 9, 7, 20), (12, 20, 3, 3), ConvGeometry((3, 3), (2, 2), (1, 1))),
    ((2, 5, 5, 70), (66, 70, 1, 1), ConvGeometry((1, 1))),
    ((2, 6, 5, 24), (16, 24, 1, 1), ConvGeometry((1, 1), (2, 1))),
    ((1, 5, 6, 24), (16, 24, 1, 1), ConvGeometry((1, 1), padding=(1, 0))),
    ((1, 11, 13, 5), (7, 5, 5, 3), ConvGeometry((5, 3), (2, 1), (0, 2))),
    ((3, 12, 12, 24), (8, 24, 3, 3), ConvGeometry((3, 3), (1, 1), (2, 2), (2, 2))),
    ((2, 8, 6, 32), (32, 8, 3, 3), ConvGeometry((3, 3), (1, 1), (1, 1), groups=4)),
    ((1, 8, 8, 16), (16, 1, 3, 3), ConvGeometry((3, 3), (1, 1), (1, 1), groups=16)),
    ((1, 3, 3, 16), (16, 16, 3, 3), ConvGeometry((3, 3))),
    ((1, 1, 1, 1), (1, 1, 1, 1), ConvGeometry((1, 1))),
])
@pytest.mark.parametrize("signed", [True, False])
def test_convolution(dtype, image, shape, conv, signed):
    x = torch.randn(image) + 0.3
    q = (TRITON if signed else ReferenceBackend()).quantize_tensor(x)
    assert (q.values.dtype == torch.int8) is signed
    w = weight(shape)
    check(TRITON, w, conv, q, torch.randn(shape[0]), dtype)
    assert torch.equal(TRITON.prepare(w, conv).unpack(), w.values)


@pytest.mark.parametrize("tile", triton_backend.TILES)
def test_every_tile_computes_the_same(tile, monkeypatch):
    monkeypatch.setattr(triton_backend.TritonProduct, "_fastest", lambda self, arguments: tile)
    monkeypatch.setattr(triton_backend, "_TILE", {})
    x, conv = torch.randn(1, 5, 9, 70), ConvGeometry((3, 3), (1, 1), (1, 1))
    check(TRITON, weight((70, 70, 3, 3)), conv, TRITON.quantize_tensor(x), torch.randn(70))


@each
def test_extreme_codes_do_not_overflow(backend):
    w = Int8Weight(torch.full((4, 3000), -128, dtype=torch.int8), torch.ones(4))
    check(backend, w, None, backend.quantize_tensor(torch.ones(2, 3000)), None)
    check(backend, w, None, backend.quantize_tensor(-torch.ones(2, 3000)), None)


@pytest.mark.parametrize("bits,symmetric", [(8, True), (8, False), (4, False)])
@pytest.mark.parametrize("split", [None, 24])
@pytest.mark.parametrize("kernel", [None, (3, 3)])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_layers_come_out_as_with_the_reference(bits, symmetric, split, kernel, rows):
    """Parts, offsets, routed scales and static ranges around the kernels."""
    conv = kernel and ConvGeometry(kernel, (2, 1), (1, 0))
    packed = QuantizedWeight.quantize(torch.randn(40, 64, *(kernel or ())) + 0.1,
                                      QuantSpec(bits, symmetric), split)
    x = torch.randn(*((4, 13, 64) if conv is None else (4, 64, 9, 11)))
    scales = None if not rows else LayerScales(
        1 + 0.3 * torch.randn(rows, 40 * packed.parts), 1 + 0.3 * torch.randn(rows, 64))
    bias = torch.randn(40)
    static = [(torch.tensor(0.03), torch.tensor(120.0))] * packed.parts
    for granularity in Granularity:
        for ranges in (None, static):
            outputs = []
            for backend in (TRITON, ReferenceBackend()):
                layer = Int8Layer(packed, conv, backend, granularity)
                layer.static = ranges
                outputs.append(layer(x, bias, scales))
            off = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
            assert off < 2e-3, (granularity, ranges)


@needs_products
@pytest.mark.parametrize("rows", [0, 1])
def test_linear_layers_by_kitchen(rows):
    """Floats go to the library itself, scaled ones through the quantizer that folds ``s_in``."""
    packed = QuantizedWeight.quantize(torch.randn(40, 64), QuantSpec(8, True))
    x, bias = torch.randn(4, 13, 64), torch.randn(40)
    scales = None if not rows else LayerScales(
        1 + 0.3 * torch.randn(rows, 40), 1 + 0.3 * torch.randn(rows, 64))
    fused = []
    layer = Int8Layer(packed, None, KITCHEN)
    prepared = layer.parts[0].prepared
    original = prepared.fused
    prepared.fused = lambda *args: fused.append(1) or original(*args)
    exact = Int8Layer(packed, None, ReferenceBackend(), Granularity.TOKEN)(x, bias, scales)
    off = (layer(x, bias, scales) - exact).norm() / exact.norm()
    assert off < 1e-2 and bool(fused) is not rows
