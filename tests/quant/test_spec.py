import pytest

from quanttune.quant import QuantSpec, QuantTuneError, RangeMethod


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_supported_bits(bits):
    assert QuantSpec(bits).bits == bits


@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4, 4.0, "4", None, True])
def test_other_bits_are_refused(bits):
    with pytest.raises(QuantTuneError, match="2, 3, 4 or 8"):
        QuantSpec(bits)


def test_range_is_given_by_name_or_member():
    assert QuantSpec(4, range="mse") == QuantSpec(4, range=RangeMethod.MSE)
    assert QuantSpec(4).range is RangeMethod.MINMAX
    with pytest.raises(QuantTuneError, match="'percentile'"):
        QuantSpec(4, range="percentile")


def test_symmetric_is_a_bool():
    with pytest.raises(QuantTuneError, match="symmetric"):
        QuantSpec(4, symmetric="yes")
