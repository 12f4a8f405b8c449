"""The integer layer against the weight-only one: scales, parts, offsets, shared activations."""

import pytest
import torch

from quanttune.quant import LayerScales, QuantizedWeight, QuantSpec, QuantTuneError, functional
from quanttune.quant.int8 import (
    ConvGeometry,
    Granularity,
    Int8Layer,
    OneDNNBackend,
    ReferenceBackend,
    SharedActivation,
)

CONV = ConvGeometry((3, 3), (2, 1), (1, 0))
BACKENDS = [ReferenceBackend()]
if OneDNNBackend().refuses(torch.device("cpu"), None, (64, 64)) is None:
    BACKENDS.append(OneDNNBackend())
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=[b.name for b in BACKENDS])


def scales(rows, parts, outputs, inputs):
    generator = torch.Generator().manual_seed(3)
    r_out = 1 + 0.3 * torch.randn(rows, parts * outputs, generator=generator)
    return LayerScales(r_out, 1 + 0.3 * torch.randn(rows, inputs, generator=generator))


def example(conv, bits=8, symmetric=True, split=None):
    generator = torch.Generator().manual_seed(0)
    kernel = () if conv is None else conv.kernel
    weight = torch.randn(40, 64, *kernel, generator=generator) + 0.1
    x = torch.randn(*((4, 13, 64) if conv is None else (4, 64, 9, 11)), generator=generator)
    packed = QuantizedWeight.quantize(weight, QuantSpec(bits, symmetric), split)
    return packed, x, torch.randn(40, generator=generator)


def weight_only(x, packed, bias, conv, rows):
    if conv is None:
        return functional.linear(x, packed, bias, rows)
    return functional.conv2d(x, packed, bias, conv.stride, conv.padding, conv.dilation,
                             conv.groups, rows)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@each_backend
@pytest.mark.parametrize("bits,symmetric", [(8, True), (8, False), (4, False), (3, True)])
@pytest.mark.parametrize("split", [None, 24])
@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("rows", [0, 1, 2, 4])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_close_to_weight_only(backend, bits, symmetric, split, conv, rows, granularity):
    packed, x, bias = example(conv, bits, symmetric, split)
    row = scales(rows, packed.parts, 40, 64) if rows else None
    got = Int8Layer(packed, conv, backend, granularity)(x, bias, row)
    assert relative(got, weight_only(x, packed, bias, conv, row)) < 0.015


@each_backend
@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
def test_exact_where_activations_are_codes_already(backend, conv):
    """With inputs on the grid of one scale, the only error left is that of float sums."""
    packed, x, bias = example(conv, 8, False)
    x = torch.randint(-127, 128, x.shape).float() / 64
    x.view(-1)[:2] = torch.tensor([-127, 127]) / 64.0
    got = Int8Layer(packed, conv, backend, Granularity.TENSOR)(x, bias)
    assert relative(got, weight_only(x, packed, bias, conv, None)) < 2e-6


@each_backend
@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, conv, dtype):
    packed, x, bias = example(conv)
    row = scales(4, 1, 40, 64)
    got = Int8Layer(packed, conv, backend)(x.to(dtype), bias, row)
    assert got.dtype == dtype
    assert relative(got, weight_only(x, packed, bias, conv, row)) < 0.02


@each_backend
def test_a_grouped_convolution_with_an_offset(backend):
    conv = ConvGeometry((3, 3), (1, 1), (1, 1), groups=4)
    weight = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    packed = QuantizedWeight.quantize(weight, QuantSpec(8))
    x = torch.randn(2, 16, 7, 5, generator=torch.Generator().manual_seed(1))
    got = Int8Layer(packed, conv, backend)(x)
    assert relative(got, weight_only(x, packed, None, conv, None)) < 0.015


@each_backend
def test_images_come_out_channels_last(backend):
    packed, x, bias = example(CONV)
    y = Int8Layer(packed, CONV, backend)(x, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)


@each_backend
def test_samples_do_not_depend_on_which_expert_others_have(backend):
    packed, x, bias = example(None)
    layer = Int8Layer(packed, None, backend, Granularity.TOKEN)
    both = scales(4, 1, 40, 64)
    together = layer(x, bias, both)
    for index in range(4):
        one = LayerScales(both.r_out[index, None], both.s_in[index, None])
        torch.testing.assert_close(together[index], layer(x[index, None], bias, one)[0],
                                   rtol=1e-4, atol=1e-4)


def test_a_shared_activation_is_quantized_once_and_forgotten():
    packed, x, _ = example(None)
    shared = SharedActivation()
    layers = [Int8Layer(packed, None, ReferenceBackend()) for _ in range(2)]
    expected = layers[0](x)
    for layer in layers:
        layer.shared = shared
    layers[0](x)
    kept = shared.get(x, Granularity.TENSOR)
    assert kept is not None and shared.get(x, Granularity.TOKEN) is None
    assert shared.get(x.clone(), Granularity.TENSOR) is None
    assert torch.equal(layers[1](x), expected)
    assert shared.get(x, Granularity.TENSOR) is kept
    other = x * 2
    layers[1](other)
    assert shared.get(x, Granularity.TENSOR) is None
    del other
    assert shared._quantized is None, "what is kept goes with its source"


def test_scaled_activations_are_not_shared():
    packed, x, _ = example(None)
    layer = Int8Layer(packed, None, ReferenceBackend())
    layer.shared = SharedActivation()
    layer(x, None, scales(1, 1, 40, 64))
    assert layer.shared.get(x, Granularity.TENSOR) is None


def test_bad_rows_and_bad_splits():
    packed, x, bias = example(None)
    with pytest.raises(QuantTuneError, match="3 samples"):
        Int8Layer(packed, None, ReferenceBackend())(x, bias, scales(3, 1, 40, 64))
    grouped = QuantizedWeight.quantize(torch.randn(8, 4, 3, 3), QuantSpec(8), split=2)
    with pytest.raises(QuantTuneError, match="grouped convolution"):
        Int8Layer(grouped, ConvGeometry((3, 3), groups=2), ReferenceBackend())


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
def test_compiles_without_a_graph_break_and_once_for_all_layers_and_experts(conv):
    packed, x, bias = example(conv)
    backend = BACKENDS[-1]
    layers = [Int8Layer(packed, conv, backend), Int8Layer(
        QuantizedWeight.quantize(packed.dequantize() * 2, QuantSpec(4)), conv, backend)]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda layer, x, b, s: layer(x, b, s), backend=count, fullgraph=True)
    with torch.inference_mode():
        for seed in range(3):
            for layer in layers:
                row = LayerScales(torch.rand(1, 40) + seed, torch.rand(1, 64) + 0.5)
                assert relative(run(layer, x, bias, row), layer(x, bias, row)) < 1e-3
    assert len(graphs) <= len(layers), "a layer's graph serves every expert"
