import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import QuantTuneError, pack, packed_shape, unpack
from quanttune.quant.packing import fold_factor

BITS = [2, 3, 4, 8]


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from(BITS), st.integers(0, 99))
def test_round_trip(rows, columns, bits, seed):
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert tuple(packed.shape) == packed_shape(rows, columns, bits)
    assert torch.equal(unpack(packed, bits, rows, columns), codes)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(BITS))
def test_no_waste(rows, columns, bits):
    shape = packed_shape(rows, columns, bits)
    size, weights = shape[0] * shape[1], rows * columns
    assert size * 8 < bits * weights + 8 * bits
    if bits == 3 and weights >= 140:
        assert size * 8 / weights <= 3.2


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(BITS))
def test_fold_is_the_smallest_divisor_that_fits(rows, columns, bits):
    multiple = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    fits = [g for g in range(1, rows + 1) if rows % g == 0 and g * columns % multiple == 0]
    assert fold_factor(rows, columns, bits) == (fits[0] if fits else rows)


def test_four_bit_layout():
    packed = pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 4)
    assert packed.tolist() == [[1 | 3 << 4, 2 | 4 << 4]]


def test_two_bit_layout():
    packed = pack(torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]], dtype=torch.uint8), 2)
    assert packed.tolist() == [[0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4 | 0 << 6]]


def test_three_bit_layout():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    low = [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    assert pack(codes, 3).tolist() == [[*low, 0b11110000]]


def test_rows_fold_together():
    codes = torch.tensor([[1], [2], [3], [4]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[1 | 2 << 4], [3 | 4 << 4]]


def test_padding_of_a_single_folded_row():
    codes = torch.tensor([[1], [2], [3]], dtype=torch.uint8)
    packed = pack(codes, 4)
    assert packed.tolist() == [[1 | 3 << 4, 2]]
    assert torch.equal(unpack(packed, 4, 3, 1), codes)


def test_real_layers_take_exactly_their_bits():
    for rows, columns in [(320, 36), (320, 2880), (1280, 1280), (4, 2880), (10240, 1280)]:
        for bits in BITS:
            shape = packed_shape(rows, columns, bits)
            assert shape[0] * shape[1] * 8 == rows * columns * bits


def test_non_contiguous_codes():
    codes = random_codes(12, 16, 4).t()
    assert torch.equal(unpack(pack(codes, 4), 4, 16, 12), codes)


def test_unknown_width():
    with pytest.raises(QuantTuneError, match="2, 3, 4 or 8"):
        packed_shape(4, 4, 5)
