import math

import pytest
import torch

from quanttune.quant import limits
from quanttune.quant.limits import is_finite, is_whole, largest

WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", (*WIDE, *NARROW))
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_anywhere_is_found(monkeypatch, dtype, bad):
    monkeypatch.setattr(limits, "BLOCK", 4)
    for place in range(10):
        values = torch.arange(10.0) - 5
        assert is_finite(values.to(dtype))
        values[place] = bad
        stored = values.to(dtype)
        if dtype is torch.float8_e4m3fn and not stored.isnan().any():
            continue  # a type without infinities, in which they are its largest number
        assert not is_finite(stored) and not is_finite(stored.view(2, 5).t())


@pytest.mark.parametrize("bad", BAD)
def test_an_imaginary_part(bad):
    value = torch.complex(torch.ones(3), torch.tensor([0.0, bad, 0.0]))
    assert not is_finite(value) and not is_finite(value.conj())


def test_the_largest_numbers_are_finite():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, *NARROW):
        top = torch.finfo(dtype).max
        assert is_finite(torch.tensor([top, -top]).to(dtype))
    assert is_finite(torch.tensor([3e38, -3e38], dtype=torch.float64))
    assert not is_finite(torch.tensor([4e38], dtype=torch.float64)), "as float32 it is infinite"


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int64, torch.bool))
def test_integers_always_are(dtype):
    assert is_finite(torch.ones(3, dtype=dtype))


def test_what_holds_nothing_and_what_is_being_learnt():
    assert is_finite(torch.ones(0, 3)) and is_finite(torch.ones(0).to(torch.float8_e5m2))
    assert is_finite(torch.nn.Parameter(torch.ones(2)))
    assert not is_finite(torch.nn.Parameter(torch.tensor(math.nan)))


@pytest.mark.skipif(limits.FLOAT4 is None, reason="this torch has no such type")
def test_a_type_that_cannot_be_converted():
    assert is_finite(torch.full((4,), 255, dtype=torch.uint8).view(limits.FLOAT4))


def test_8_bits_are_widened_a_block_at_a_time(monkeypatch):
    sizes, widen = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: sizes.append(t.numel()) or widen(t))
    monkeypatch.setattr(limits, "BLOCK", 100)
    assert is_finite(torch.ones(25, 10).to(torch.float8_e5m2))
    assert sizes == [100, 100, 50]


def test_whole_numbers():
    assert is_whole(torch.tensor([0.0, -3.0, 2.0**30])) and is_whole(torch.tensor([4, 5]))
    for bad in (0.5, *BAD):
        assert not is_whole(torch.tensor([1.0, bad]))


def test_the_largest():
    assert largest(torch.tensor([1.0, -7.0, 3.0])) == 7
    assert largest(torch.ones(0)) == 0
