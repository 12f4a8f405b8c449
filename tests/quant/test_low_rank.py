"""A low-rank term beside a packed weight: joined from LoRAs, and in every form of a layer."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import LayerScales, LowRank, conv2d, linear
from quanttune.tests.quant.reference import materialise, random_scales, random_weight, relative
from quanttune.tests.quant.test_functional import expected_conv, expected_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=["beside", "inside"])
def way(request, monkeypatch):
    """Activations times the factors, or the factors added to the weight."""
    monkeypatch.setattr(LowRank, "cheaper_beside", lambda *_: request.param == "beside")


def product_of(term):
    return term.up.double() @ term.down.double()


def test_joins_terms_of_any_rank_strength_and_shape():
    terms = [(torch.randn(6, 2), torch.randn(2, 36), 0.5),
             (torch.randn(6, 5, 1, 1), torch.randn(5, 4, 3, 3), -2.0),
             (torch.randn(6, 1).half(), torch.randn(1, 4, 3, 3).bfloat16(), 1.0)]
    joined = LowRank.join(terms)
    expected = sum(f * u.double().flatten(1) @ d.double().flatten(1) for u, d, f in terms)
    assert joined.rank == 8 and joined.up.dtype == joined.down.dtype == torch.float32
    assert relative(product_of(joined), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_half_precision_rounds_only_the_last_digit(dtype, magnitude):
    """Also of factors so unlike that one of them would be nothing in half precision."""
    up, down = torch.randn(32, 4) * magnitude, torch.randn(4, 64) / magnitude
    joined = LowRank.join([(up, down, 1e-3)], dtype)
    assert joined.up.dtype == dtype
    expected = 1e-3 * up.double() @ down.double()
    assert relative(product_of(joined), expected) < 4 * torch.finfo(dtype).eps


def test_an_untrained_lora_adds_nothing():
    joined = LowRank.join([(torch.zeros(6, 2), torch.randn(2, 8), 1.0),
                           (torch.randn(6, 1), torch.zeros(1, 8), 1.0)])
    assert torch.equal(product_of(joined), torch.zeros(6, 8).double())


def test_added_to_a_float_weight():
    qweight = random_weight((6, 4, 3, 3), rank=3)
    weight = torch.randn(6, 4, 3, 3)
    expected = weight.double() + product_of(qweight.low_rank).view(weight.shape)
    assert relative(qweight.low_rank.added_to(weight), expected) < 1e-6
    half = qweight.low_rank.added_to(weight.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half, expected) < 1e-2


def test_few_positions_read_the_factors_and_many_the_weight():
    term = LowRank(torch.empty(1280, 16, device="meta"), torch.empty(16, 11520, device="meta"))
    assert term.cheaper_beside(128) and not term.cheaper_beside(8192)


@given(batch=st.integers(1, 3), rows=st.sampled_from([0, 1, 3]), bits=st.sampled_from([2, 3, 4, 8]),
       split=st.sampled_from([None, 3]), with_s_in=st.booleans(),
       middle=st.sampled_from([(), (5,), (2, 3), (40,)]), dtype=st.sampled_from(list(TOLERANCE)))
def test_linear(way, batch, rows, bits, split, with_s_in, middle, dtype):
    qweight = random_weight((6, 10), bits, split, rank=4)
    scales = random_scales(qweight, batch if rows == 3 else 1, with_s_in=with_s_in)
    x, bias = torch.randn(batch, *middle, 10), torch.randn(6)
    plain = LayerScales(torch.ones(1, qweight.parts * 6))
    expected = expected_linear(x, qweight, bias, scales if rows else plain)
    actual = linear(x.to(dtype), qweight, bias, scales if rows else None)
    assert actual.dtype == dtype and relative(actual, expected) < TOLERANCE[dtype]


@given(batch=st.integers(1, 3), rows=st.sampled_from([0, 1, 3]), bits=st.sampled_from([3, 4]),
       kind=st.sampled_from([(1, None), (1, 5), (2, None)]), kernel=st.sampled_from([1, 3]),
       stride=st.sampled_from([1, 2, (2, 1)]), dtype=st.sampled_from(list(TOLERANCE)))
def test_conv2d(way, batch, rows, bits, kind, kernel, stride, dtype):
    groups, split = kind
    qweight = random_weight((12, 8 // groups, kernel, kernel), bits, split, rank=4)
    scales = random_scales(qweight, batch if rows == 3 else 1, groups)
    x, bias = torch.randn(batch, 8, 7, 9), torch.randn(12)
    options = {"padding": kernel // 2, "stride": stride, "groups": groups}
    plain = LayerScales(torch.ones(1, qweight.parts * 12))
    expected = expected_conv(x, qweight, bias, scales if rows else plain, **options)
    actual = conv2d(x.to(dtype), qweight, bias, scales=scales if rows else None, **options)
    assert actual.dtype == dtype and relative(actual, expected) < TOLERANCE[dtype]


def test_channels_last_images(way):
    qweight = random_weight((12, 8, 3, 3), rank=4)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), materialise(qweight), padding=1)
    assert relative(conv2d(x, qweight, padding=1), expected) < 1e-5


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_pass_through_it(way, split, rows):
    """Of the input and the scales; the base was made in inference mode, as the host does."""
    with torch.inference_mode():
        qweight = random_weight((6, 8, 3, 3), 4, split, rank=4)
    start = random_scales(qweight, rows)
    tensors = [torch.randn(2, 8, 5, 5), start.r_out, start.s_in]
    x, r_out, s_in = (t.clone().requires_grad_() for t in tensors)
    conv2d(x, qweight, padding=1, scales=LayerScales(r_out, s_in)).square().sum().backward()
    x64, r64, s64 = (t.double().requires_grad_() for t in tensors)
    base, total = materialise(qweight).clone(), 0
    for index in range(2):
        pick = min(index, rows - 1)
        r = r64[pick].view(qweight.parts, 6)
        width = [8] if split is None else [split, 8 - split]
        rows_of = torch.cat([r[p][:, None].expand(6, w) for p, w in enumerate(width)], dim=1)
        weight = base * (rows_of * s64[pick])[:, :, None, None]
        total = total + F.conv2d(x64[index : index + 1], weight, padding=1).square().sum()
    total.backward()
    for actual, expected in zip((x, r_out, s_in), (x64, r64, s64)):
        assert relative(actual.grad, expected.grad) < 1e-5


@pytest.mark.parametrize("what", ["x", "bias", "scales"])
def test_gradients_without_a_closed_form(way, what):
    """A padding of "same" that is not even, or a bias that trains: ordinary autograd."""
    with torch.inference_mode():
        qweight = random_weight((6, 8, 2, 2), rank=4)
    tensors = {"x": torch.randn(2, 8, 5, 5), "bias": torch.randn(6), "scales": torch.randn(2, 6)}
    ours = {k: t.clone().requires_grad_(k in (what, "bias")) for k, t in tensors.items()}
    theirs = {k: t.double().requires_grad_() for k, t in tensors.items()}
    conv2d(ours["x"], qweight, ours["bias"], padding="same",
           scales=LayerScales(ours["scales"])).square().sum().backward()
    y = F.conv2d(theirs["x"], materialise(qweight).clone(), padding="same")
    y = y * theirs["scales"][:, :, None, None] + theirs["bias"].view(-1, 1, 1)
    y.square().sum().backward()
    assert relative(ours[what].grad, theirs[what].grad) < 1e-5


def test_the_compiler_sees_one_graph(way):
    qconv = random_weight((8, 4, 3, 3), rank=3)
    qlinear = random_weight((6, 8), rank=3)
    one, each = random_scales(qconv, 1), random_scales(qlinear, 2)

    def model(x):
        y = conv2d(x, qconv, None, padding=1, scales=one)
        return linear(y.mean((2, 3)), qlinear, None, each)

    x = torch.randn(2, 4, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), model(x)) < 1e-5
