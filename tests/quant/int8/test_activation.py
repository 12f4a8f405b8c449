"""Activations in 8 bits: half a step of error, no overflow, blocks equal to the plain formula."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.quant.int8 import activation, quantize_tensor, quantize_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample(shape, kind="normal", dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "positive": x.abs() + 1, "negative": -x.abs() - 1, "zero": x * 0,
         "huge": x * (1e4 if dtype == torch.float16 else 1e30),
         "silu": torch.nn.functional.silu(x * 3)}[kind]
    return x.to(dtype)


@pytest.fixture(params=["blocks", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(activation, "_in_blocks", lambda *a: False)
    else:
        monkeypatch.setattr(activation, "BLOCK", 64)
    return request.param


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zero", "huge", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_tensor_is_within_half_a_step(way, kind, dtype):
    x = sample((3, 5, 17), kind, dtype)
    q = quantize_tensor(x)
    assert q.values.dtype == torch.uint8 and q.scale.shape == q.zero_point.shape == ()
    error = (q.dequantize() - x.float()).abs().max()
    assert error <= 0.5001 * q.scale
    ends = x.float().clamp(min=0).max() - x.float().clamp(max=0).min()
    assert q.scale == pytest.approx(max(float(ends) / 254, 1e-12), rel=1e-5)


@pytest.mark.parametrize("kind", ["normal", "positive", "zero", "huge"])
def test_per_token_is_within_half_a_step_of_each_token(way, kind):
    x = sample((11, 17), kind) * torch.logspace(-3, 3, 11)[:, None]
    q = quantize_tokens(x)
    assert q.values.dtype == torch.int8 and q.scale.shape == (11, 1) and q.zero_point == 0
    assert ((q.dequantize() - x).abs() <= 0.5001 * q.scale).all()


@pytest.mark.parametrize("quantize", [quantize_tensor, quantize_tokens])
def test_input_scales_act_before_the_range_is_taken(way, quantize):
    x, s_in = sample((13, 17)), 1 + torch.rand(1, 17) * 9
    q, expected = quantize(x, s_in), quantize(x * s_in)
    assert torch.equal(q.values, expected.values)
    torch.testing.assert_close(q.scale, expected.scale)
    each = quantize(x, s_in.expand(13, 17).contiguous())
    assert torch.equal(each.values, expected.values)


@pytest.mark.parametrize("quantize", [quantize_tensor, quantize_tokens])
def test_blocks_equal_the_plain_formula(quantize, monkeypatch):
    x = sample((200, 31), "silu", torch.bfloat16)
    in_blocks = quantize(x)
    monkeypatch.setattr(activation, "_in_blocks", lambda *a: False)
    plain = quantize(x)
    difference = in_blocks.values.int() - plain.values.int()
    # The two differ in where they round the reciprocal, which can move a tie.
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.001
    torch.testing.assert_close(in_blocks.scale, plain.scale)
    assert torch.equal(in_blocks.zero_point, plain.zero_point)


def test_a_known_range_clamps(way):
    x = torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0]])
    scale, zero_point = activation.tensor_qparams(torch.tensor(-1.0), torch.tensor(1.0))
    q = quantize_tensor(x, qparams=(scale, zero_point))
    assert q.values.tolist() == [[0, 0, 127, 254, 255]]
    assert torch.equal(q.scale, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantize", [quantize_tensor, quantize_tokens])
@pytest.mark.parametrize("s_in", [None, torch.ones(1, 8)])
def test_no_range_is_an_error(bad, quantize, s_in, monkeypatch):
    monkeypatch.setattr(activation, "BLOCK", 16)
    x = torch.randn(9, 8)
    x[4, 3] = bad
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        quantize(x, s_in)


@pytest.mark.parametrize("quantize", [quantize_tensor, quantize_tokens])
def test_an_empty_batch(quantize):
    assert quantize(torch.empty(0, 8)).values.shape == (0, 8)


def test_channels_last_images_are_not_copied():
    x = torch.randn(2, 5, 4, 6).contiguous(memory_format=torch.channels_last)
    values = quantize_tensor(x.movedim(1, -1)).values
    assert values.is_contiguous() and values.shape == (2, 4, 6, 5)
