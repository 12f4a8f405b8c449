import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import (
    QuantSpec,
    QuantTuneError,
    choose_qparams,
    dequantize_codes,
    quantize_codes,
    quantizer,
)

BITS = st.sampled_from([2, 3, 4, 8])


@st.composite
def matrices(draw):
    """Rows of very different sizes, some constant, one-sided or zero."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=generator)
    for row in range(rows):
        kind = draw(st.sampled_from(["normal", "positive", "negative", "constant", "zero", "tail"]))
        if kind == "positive":
            w[row].abs_()
        elif kind == "negative":
            w[row].abs_().neg_()
        elif kind == "constant":
            w[row] = draw(st.floats(-3, 3, width=32))
        elif kind == "zero":
            w[row] = 0
        elif kind == "tail":
            w[row].pow_(3)
    return w * 10 ** draw(st.floats(-4, 4))


def roundtrip(w, spec):
    scale, zero_point = choose_qparams(w, spec)
    codes = quantize_codes(w, scale, zero_point, spec.bits)
    return scale, zero_point, codes, dequantize_codes(codes, scale, zero_point)


@given(matrices(), BITS, st.booleans())
def test_minmax_error_is_at_most_half_a_step(w, bits, symmetric):
    scale, zero_point, codes, restored = roundtrip(w, QuantSpec(bits, symmetric))
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert (scale > 0).all() and torch.equal(zero_point, zero_point.round())
    assert (zero_point >= 0).all() and (zero_point <= 2**bits - 1).all()
    allowed = scale[:, None] * 0.5 * (1 + 1e-4) + w.abs() * 1e-6
    assert ((restored - w).abs() <= allowed).all()


@given(matrices(), BITS, st.booleans())
def test_mse_range_is_never_worse_than_minmax(w, bits, symmetric):
    error = {}
    for method in ("minmax", "mse"):
        _, _, codes, restored = roundtrip(w, QuantSpec(bits, symmetric, method))
        assert int(codes.max()) < 2**bits
        error[method] = (restored - w).norm(dim=1)
    assert (error["mse"] <= error["minmax"] * (1 + 1e-5) + 1e-30).all()


@given(matrices(), BITS, st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_zero_is_exact(w, bits, symmetric, method):
    w[:, 0] = 0
    _, _, _, restored = roundtrip(w, QuantSpec(bits, symmetric, method))
    assert (restored[:, 0] == 0).all()


def test_mse_range_pays_off_at_low_bits():
    w = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    errors = [(roundtrip(w, QuantSpec(3, range=m))[3] - w).norm() for m in ("minmax", "mse")]
    assert errors[1] < 0.85 * errors[0]


def test_symmetric_zero_point_is_the_middle():
    scale, zero_point = choose_qparams(torch.randn(5, 30), QuantSpec(4, symmetric=True))
    assert (zero_point == 8).all()


def test_symmetric_uses_the_extra_negative_step():
    w = torch.tensor([[-8.0, 7.0, 1.0]])
    scale, zero_point, codes, restored = roundtrip(w, QuantSpec(4, symmetric=True))
    assert scale.item() == 1 and codes.tolist() == [[0, 15, 9]]
    assert torch.equal(restored, w)


def test_exact_grid_comes_back_exactly():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    scale, zero_point = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([3.0, 0.0, 15.0])
    w = dequantize_codes(codes, scale, zero_point)
    found_scale, found_zero, found_codes, restored = roundtrip(w, QuantSpec(4))
    assert torch.equal(found_scale, scale) and torch.equal(found_zero, zero_point)
    assert torch.equal(found_codes, codes) and torch.equal(restored, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype):
    w = torch.randn(4, 64).to(dtype)
    scale, zero_point, _, restored = roundtrip(w, QuantSpec(8))
    assert scale.dtype == zero_point.dtype == restored.dtype == torch.float32
    assert ((restored - w.float()).abs() <= scale[:, None] * 0.51).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_extreme_rows(symmetric):
    big = 2e38
    w = torch.tensor([[0.0, 0.0], [-big, big], [1e-42, -1e-42], [big, big]])
    scale, _, codes, restored = roundtrip(w, QuantSpec(4, symmetric))
    assert torch.isfinite(scale).all() and torch.isfinite(restored).all()
    assert (restored[[0, 2]] == 0).all() and (scale[[0, 2]] == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_bad_weights_are_refused(bad, method):
    w = torch.randn(3, 8)
    w[1, 4] = bad
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        choose_qparams(w, QuantSpec(4, range=method))


@pytest.mark.parametrize("w", [torch.ones(2, 3, 4), torch.ones(2, 3).int(), torch.ones(0, 3)])
def test_only_float_matrices(w):
    with pytest.raises(QuantTuneError, match="float matrix"):
        choose_qparams(w, QuantSpec(4))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_blocks_do_not_change_the_result(method, monkeypatch):
    w = torch.randn(50, 37)
    spec = QuantSpec(3, range=method)
    whole = roundtrip(w, spec)
    monkeypatch.setattr(quantizer, "BLOCK_ELEMENTS", 100)
    for a, b in zip(whole, roundtrip(w, spec)):
        assert torch.equal(a, b)
