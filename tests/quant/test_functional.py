"""The quantized layers against eq. 5 materialised in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import (
    WEIGHTS,
    LayerScales,
    QuantTuneError,
    conv2d,
    linear,
    scaled_conv2d,
    scaled_linear,
)
from quanttune.tests.quant.reference import (
    materialise,
    random_scales,
    random_weight,
    relative,
)

TOLERANCE = 1e-5


def row(scales, index):
    """One sample's scales as (r_out, s_in)."""
    index = min(index, scales.rows - 1)
    return scales.r_out[index], None if scales.s_in is None else scales.s_in[index]


def expected_linear(x, qweight, bias, scales):
    outputs = []
    for index in range(x.shape[0]):
        weight = materialise(qweight, *row(scales, index))
        outputs.append(F.linear(x[index].double(), weight, bias.double()))
    return torch.stack(outputs)


def expected_conv(x, qweight, bias, scales, **options):
    outputs = []
    for index in range(x.shape[0]):
        weight = materialise(qweight, *row(scales, index))
        outputs.append(F.conv2d(x[index : index + 1].double(), weight, bias.double(), **options))
    return torch.cat(outputs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_scales_equals_the_float_layer(bits):
    qlinear, qconv = random_weight((24, 40), bits), random_weight((16, 8, 3, 3), bits)
    x, bias = torch.randn(3, 7, 40), torch.randn(24)
    expected = F.linear(x.double(), materialise(qlinear), bias.double())
    assert relative(linear(x, qlinear, bias), expected) < TOLERANCE
    image, bias = torch.randn(2, 8, 9, 9), torch.randn(16)
    expected = F.conv2d(image.double(), materialise(qconv), bias.double(), padding=1, stride=2)
    assert relative(conv2d(image, qconv, bias, stride=2, padding=1), expected) < TOLERANCE


@given(
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([None, 3]),
    st.booleans(),
    st.sampled_from([(), (5,), (30,), (2, 3)]),
    st.booleans(),
)
def test_linear_with_scales(batch, per_sample, bits, split, with_s_in, middle, float_weight):
    qweight = random_weight((6, 10), bits, split)
    scales = random_scales(qweight, batch if per_sample else 1, with_s_in=with_s_in)
    x, bias = torch.randn(batch, *middle, 10), torch.randn(6)
    if float_weight:
        actual = scaled_linear(x, qweight.dequantize(), bias, scales, split)
    else:
        actual = linear(x, qweight, bias, scales)
    assert relative(actual, expected_linear(x, qweight, bias, scales)) < TOLERANCE


@given(
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([3, 4]),
    st.sampled_from([(1, None), (1, 5), (2, None), (4, None)]),
    st.booleans(),
    st.sampled_from([(1, 1), (3, 3)]),
    st.sampled_from([3, 12]),
    st.booleans(),
)
def test_conv_with_scales(batch, per_sample, bits, kind, with_s_in, kernel, size, float_weight):
    groups, split = kind
    qweight = random_weight((12, 8 // groups, *kernel), bits, split)
    scales = random_scales(qweight, batch if per_sample else 1, groups, with_s_in)
    x, bias = torch.randn(batch, 8, size, size), torch.randn(12)
    options = {"padding": kernel[0] // 2, "groups": groups}
    if float_weight:
        actual = scaled_conv2d(x, qweight.dequantize(), bias, scales=scales, split=split, **options)
    else:
        actual = conv2d(x, qweight, bias, scales=scales, **options)
    assert relative(actual, expected_conv(x, qweight, bias, scales, **options)) < TOLERANCE


def test_stride_dilation_and_no_bias():
    qweight = random_weight((8, 4, 3, 3))
    scales = random_scales(qweight, 2)
    x = torch.randn(2, 4, 11, 11)
    options = {"stride": 2, "padding": 2, "dilation": 2}
    expected = expected_conv(x, qweight, torch.zeros(8), scales, **options)
    assert relative(conv2d(x, qweight, scales=scales, **options), expected) < TOLERANCE


def test_mixed_rows_equal_single_runs():
    qweight = random_weight((16, 24))
    scales = random_scales(qweight, 3)
    x, bias = torch.randn(3, 5, 24), torch.randn(16)
    mixed = linear(x, qweight, bias, scales)
    for index in range(3):
        one = LayerScales(scales.r_out[index : index + 1], scales.s_in[index : index + 1])
        single = linear(x[index : index + 1], qweight, bias, one)
        assert relative(mixed[index : index + 1], single) < 1e-6


def test_rows_repeat_over_a_larger_batch():
    qweight = random_weight((6, 10))
    scales = random_scales(qweight, 2)
    repeated = LayerScales(
        scales.r_out.repeat_interleave(3, 0), scales.s_in.repeat_interleave(3, 0)
    )
    x = torch.randn(6, 10)
    assert torch.equal(linear(x, qweight, None, scales), linear(x, qweight, None, repeated))


def test_rows_that_do_not_fit_the_batch():
    qweight = random_weight((6, 10))
    with pytest.raises(QuantTuneError, match="2 samples"):
        linear(torch.randn(3, 10), qweight, None, random_scales(qweight, 2))


@pytest.mark.parametrize("rows", [1, 2])
def test_channels_that_do_not_fit_the_layer(rows):
    qweight = random_weight((6, 10))
    x = torch.randn(2, 10)
    with pytest.raises(QuantTuneError, match="output channels"):
        linear(x, qweight, None, LayerScales(torch.ones(rows, 7)))
    with pytest.raises(QuantTuneError, match="input channels"):
        linear(x, qweight, None, LayerScales(torch.ones(rows, 6), torch.ones(rows, 9)))


def test_grouped_convolutions_have_no_split():
    qweight = random_weight((6, 4, 1, 1), split=2)
    with pytest.raises(QuantTuneError, match="grouped"):
        conv2d(torch.randn(1, 8, 2, 2), qweight, groups=2)


def test_peqa_is_s_in_of_ones():
    qweight = random_weight((6, 10))
    scales = random_scales(qweight, 2, with_s_in=False)
    ones = LayerScales(scales.r_out, torch.ones(2, 10))
    x = torch.randn(2, 10)
    assert torch.equal(linear(x, qweight, None, scales), linear(x, qweight, None, ones))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4])
def test_half_precision_keeps_small_scale_changes(dtype, rows):
    """A scale of 1.001 is nearer to 1 than bfloat16 can tell, and must still have its effect."""
    qweight = random_weight((64, 128), 8)
    x, bias = torch.randn(4, 320, 128).to(dtype), torch.randn(64)
    # Per sample, the input scales meet activations that are rounded already: only outputs here.
    s_in = torch.full((1, 128), 1.001) if rows == 1 else None
    changed = LayerScales(torch.full((rows, 64), 1.001), s_in)
    plain = (linear(x, qweight, bias).double() - bias).flatten()
    scaled = (linear(x, qweight, bias, changed).double() - bias).flatten()
    slope = float((scaled @ plain) / (plain @ plain))
    assert slope == pytest.approx(1.001 ** (2 if rows == 1 else 1), abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_bias_with_half_precision_input(dtype):
    qweight = random_weight((6, 10), split=4)
    x, bias = torch.randn(2, 10), torch.randn(6)
    for rows in (1, 2):
        scales = random_scales(qweight, rows)
        actual = linear(x.to(dtype), qweight, bias, scales)
        assert actual.dtype == dtype
        assert relative(actual, expected_linear(x, qweight, bias, scales)) < 0.02


def test_inputs_are_left_alone():
    qweight = random_weight((6, 10), split=4)
    x, bias = torch.randn(2, 10), torch.randn(6)
    scales = random_scales(qweight, 2)
    copies = [t.clone() for t in (x, bias, scales.r_out, scales.s_in)]
    with torch.no_grad():
        linear(x, qweight, bias, scales)
        scaled_linear(x, qweight.dequantize(), bias, scales, 4)
    for before, after in zip(copies, (x, bias, scales.r_out, scales.s_in)):
        assert torch.equal(before, after)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_equal_those_of_eq_5(split, rows):
    """Through x, r_out and s_in, against autograd over the materialised float64 weight."""
    qweight = random_weight((6, 8, 3, 3), 4, split)
    start = random_scales(qweight, rows)
    tensors = [torch.randn(2, 8, 5, 5), start.r_out, start.s_in]
    x, r_out, s_in = (t.clone().requires_grad_() for t in tensors)
    y = conv2d(x, qweight, torch.ones(6), padding=1, scales=LayerScales(r_out, s_in))
    y.square().sum().backward()

    x64, r64, s64 = (t.double().requires_grad_() for t in tensors)
    parts = qweight.parts
    base = materialise(qweight)
    total = 0
    for index in range(2):
        pick = min(index, rows - 1)
        r = r64[pick].view(parts, 6)
        width = [8] if split is None else [split, 8 - split]
        rows_of = torch.cat([r[p][:, None].expand(6, w) for p, w in enumerate(width)], dim=1)
        weight = base * (rows_of * s64[pick])[:, :, None, None]
        out = F.conv2d(x64[index : index + 1], weight, torch.ones(6).double(), padding=1)
        total = total + out.square().sum()
    total.backward()
    for actual, expected in zip((x, r_out, s_in), (x64, r64, s64)):
        assert relative(actual.grad, expected.grad) < 1e-5


def test_gradient_through_x_alone_survives_the_next_layer():
    """The weight that autograd saved must not be the shared buffer."""
    first, second = random_weight((10, 10), seed=1), random_weight((10, 10), seed=2)
    scales = random_scales(first, 1)
    x = leaf(3, 10)
    linear(linear(x, first, None, scales), second).sum().backward()
    expected = torch.ones(3, 10).double() @ materialise(second)
    expected = expected @ materialise(first, scales.r_out[0], scales.s_in[0])
    assert relative(x.grad, expected) < 1e-5


def test_gradients_with_a_base_made_in_inference_mode():
    with torch.inference_mode():
        qweight = random_weight((6, 10), split=4)
    r_out, s_in = torch.ones(1, 12).requires_grad_(), torch.ones(1, 10).requires_grad_()
    x = leaf(2, 10)
    linear(x, qweight, None, LayerScales(r_out, s_in)).sum().backward()
    assert r_out.grad.abs().sum() > 0 and s_in.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_gradients_under_checkpointing():
    qweight = random_weight((10, 10))
    r_out = torch.ones(1, 10).requires_grad_()

    def layer(x):
        return linear(x, qweight, None, LayerScales(r_out))

    x = leaf(4, 10)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    checkpointed = r_out.grad.clone()
    r_out.grad = None
    layer(x).square().sum().backward()
    assert torch.allclose(checkpointed, r_out.grad)


def test_no_grad_uses_one_buffer():
    WEIGHTS.clear()
    with torch.no_grad():
        for seed in range(4):
            linear(torch.randn(2, 64), random_weight((64, 64), seed=seed))
    assert WEIGHTS.nbytes() == 64 * 64 * 4
    WEIGHTS.clear()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_compiler_sees_one_graph(bits):
    qconv, qlinear = random_weight((8, 4, 3, 3), bits), random_weight((6, 8), bits)
    one, each = random_scales(qconv, 1), random_scales(qlinear, 2)

    def model(x):
        y = conv2d(x, qconv, None, padding=1, scales=one)
        return linear(y.mean((2, 3)), qlinear, None, each)

    x = torch.randn(2, 4, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), model(x)) < TOLERANCE
