"""Static ranges: which one acts, and what a layer does with it."""

import pytest
import torch

from quanttune.quant import LayerScales, QuantTuneError
from quanttune.quant.int8 import (
    ActivationRanges,
    Granularity,
    Int8Layer,
    SharedActivation,
    bucket_of,
)
from quanttune.quant.int8.activation import tensor_qparams
from quanttune.tests.quant.int8.test_layer import (
    CONV,
    each_backend,
    example,
    relative,
    scales,
    weight_only,
)


def ends(x):
    return torch.stack([x.min().clamp(max=0), x.max().clamp(min=0)])


def test_buckets_are_those_of_experts():
    t = torch.tensor([0.0, 249.0, 250.0, 999.0, 1000.0, 1500.0])
    assert bucket_of(t, 1000, 4) == (0, 0, 1, 3, 3, 3)
    assert bucket_of(torch.tensor([0.3, 0.7]), 1.0, 2) == (0, 1)


def test_samples_of_several_buckets_share_the_range_that_holds_all():
    ranges = ActivationRanges({"a": torch.tensor([[[-1.0, 2.0]], [[-3.0, 1.0]], [[0.0, 9.0]]])})
    assert ranges.num_buckets == 3
    ((scale, zero_point),) = ranges.select((1, 0, 1))["a"]
    wanted = tensor_qparams(torch.tensor(-3.0), torch.tensor(2.0))
    assert (scale, zero_point) == wanted
    assert ranges.select((2, 2))["a"] == ranges.select((2,))["a"]
    assert ranges.select((2,))["a"][0][1] == 0


@pytest.mark.parametrize("bad", [
    torch.zeros(0, 1, 2), torch.tensor([[[-3e38, 3e38]]]), torch.zeros(2, 1),
    torch.zeros(2, 3, 2), torch.zeros(1, 1, 2).double(),
    torch.tensor([[[0.5, 1.0]]]), torch.tensor([[[-1.0, float("nan")]]]),
    torch.tensor([[[-float("inf"), 1.0]]]),
])
def test_what_is_no_range_is_refused(bad):
    with pytest.raises(QuantTuneError):
        ActivationRanges({"a": bad})
    with pytest.raises(QuantTuneError):
        ActivationRanges({})


def test_layers_with_other_numbers_of_buckets_are_refused():
    with pytest.raises(QuantTuneError, match="of layer b"):
        ActivationRanges({"a": torch.zeros(2, 1, 2), "b": torch.zeros(3, 1, 2)})


@each_backend
@pytest.mark.parametrize("split", [None, 24])
@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_the_range_of_the_moment_as_a_static_one(backend, split, conv, rows):
    packed, x, bias = example(conv, split=split)
    row = scales(rows, packed.parts, 40, 64) if rows else None
    layer = Int8Layer(packed, conv, backend, Granularity.TENSOR)
    expected = layer(x, bias, row)
    channels = x.movedim(1, -1) if conv else x
    if rows:
        s_in = row.s_in.view(rows, *[1] * (channels.dim() - 2), 64)
        channels = channels * s_in
    parts = [channels] if split is None else list(channels.tensor_split([split], -1))
    layer.static = [tensor_qparams(*ends(p)) for p in parts]
    assert relative(layer(x, bias, row), expected) < 1e-6


@each_backend
@pytest.mark.parametrize("granularity", list(Granularity))
def test_values_outside_a_static_range_are_clipped(backend, granularity):
    packed, x, bias = example(None)
    layer = Int8Layer(packed, None, backend, granularity)
    layer.static = [tensor_qparams(torch.tensor(-1.0), torch.tensor(0.5))]
    expected = weight_only(x.clamp(-1.0, 0.5), packed, bias, None, None)
    assert relative(layer(x, bias), expected) < 0.02
    layer.static = None
    assert relative(layer(x, bias), weight_only(x, packed, bias, None, None)) < 0.015


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_does_not_become_a_code(backend, value):
    packed, x, bias = example(None)
    layer = Int8Layer(packed, None, backend)
    layer.static = [tensor_qparams(torch.tensor(-1.0), torch.tensor(1.0))]
    x[1, 2, 3] = value
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        layer(x, bias)


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_met_with_experts_of_their_own_and_in_compiled_code(backend, value):
    packed, x, bias = example(None)
    layer = Int8Layer(packed, None, backend)
    layer.static = [tensor_qparams(torch.tensor(-1.0), torch.tensor(1.0))]
    outputs, inputs = packed.shape[:2]
    own = LayerScales(torch.ones(x.shape[0], outputs), torch.ones(x.shape[0], inputs))
    expected = layer(x, bias)
    assert relative(layer(x, bias, own), expected) < 1e-5
    compiled = torch.compile(lambda v: layer(v, bias), backend="eager", fullgraph=True)
    x[1, 2, 3] = value
    for run in (lambda: layer(x, bias, own), lambda: compiled(x)):
        try:
            assert not bool(run().isfinite().all()), "a wrong result that looks right"
        except QuantTuneError as error:
            assert "NaN or infinite" in str(error)


@each_backend
def test_layers_of_one_input_share_only_equal_ranges(backend):
    packed, x, bias = example(None)
    layers = [Int8Layer(packed, None, backend) for _ in range(3)]
    shared = SharedActivation()
    narrow = [tensor_qparams(torch.tensor(-0.1), torch.tensor(0.1))]
    wide = [tensor_qparams(*ends(x))]
    apart = []
    for layer, qparams in zip(layers, (wide, narrow, None)):
        layer.static = qparams
        apart.append(layer(x, bias))
        layer.shared = shared
    for layer, expected in zip(layers, apart):
        assert torch.equal(layer(x, bias), expected)


def test_static_ranges_compile_once():
    packed, x, bias = example(None)
    from quanttune.quant.int8 import ReferenceBackend

    layer = Int8Layer(packed, None, ReferenceBackend())
    ranges = ActivationRanges({"a": torch.tensor([[[-4.0, 4.0]], [[-1.0, 2.0]], [[-2.0, 3.0]]])})
    compiled = torch.compile(lambda v: layer(v, bias), backend="eager", fullgraph=True)
    graphs = []
    for bucket in range(3):
        layer.static = ranges.select((bucket,))["a"]
        assert relative(compiled(x), layer(x, bias)) < 1e-6
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2], "another bucket is not another graph"
