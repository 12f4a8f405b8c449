import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from quanttune.quant import QuantizedWeight, dequantize, dequantize_into
from quanttune.tests.quant.reference import (
    materialise,
    random_scales,
    random_weight,
    relative,
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class RecordStorages(TorchDispatchMode):
    """Sizes of the storages of everything that operations return, by address."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
        return result


@st.composite
def cases(draw):
    """A weight of any kind of layer, with or without scales."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    rows = draw(st.integers(1, 12)) * groups
    inputs = draw(st.integers(1, 12))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 1)]))
    split = None
    if groups == 1 and inputs > 1 and draw(st.booleans()):
        split = draw(st.integers(1, inputs - 1))
    qweight = random_weight(
        (rows, inputs, *kernel),
        draw(st.sampled_from([2, 3, 4, 8])),
        split,
        draw(st.booleans()),
        draw(st.integers(0, 999)),
        draw(st.sampled_from([0, 0, 1, 5])),
    )
    return qweight, groups, draw(st.booleans()), draw(st.booleans())


@given(cases(), st.sampled_from(list(TOLERANCE)), st.integers(1, 200))
@settings(max_examples=200)
def test_equals_the_reference(case, dtype, block):
    qweight, groups, with_r, with_s = case
    scales = random_scales(qweight, 1, groups)
    r_out = scales.r_out[0] if with_r else None
    s_in = scales.s_in[0] if with_s else None
    expected = materialise(qweight, r_out, s_in)
    r_columns = None if r_out is None else r_out.view(qweight.parts, -1).t()
    before, dequantize.BLOCK_CODES = dequantize.BLOCK_CODES, block
    try:
        actual = qweight.dequantize(dtype, r_columns, s_in)
    finally:
        dequantize.BLOCK_CODES = before
    assert actual.dtype == dtype and tuple(actual.shape) == qweight.shape
    assert relative(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(256, 320), (64, 320, 3, 3), (1280, 36)])
@pytest.mark.parametrize("rank", [0, 16])
def test_several_full_size_blocks(bits, shape, rank, monkeypatch):
    monkeypatch.setattr(dequantize, "BLOCK_CODES", 10_000)
    qweight = random_weight(shape, bits, rank=rank)
    assert relative(qweight.dequantize(), materialise(qweight)) < 1e-6


def test_writes_into_the_given_buffer():
    qweight = random_weight((8, 16))
    out = torch.full((8, 16), float("nan"))
    assert dequantize_into(out, qweight.packed, qweight.scale, qweight.zero_point, 4) is out
    assert relative(out, materialise(qweight)) < 1e-6


@pytest.mark.parametrize("zero", [-300.0, -113.0, 128.0, 400.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_beyond_a_byte(zero, bits):
    qweight = random_weight((8, 16), bits)
    qweight.zero_point.fill_(zero)
    assert relative(qweight.dequantize(), materialise(qweight)) < 1e-6


@pytest.mark.parametrize("rank", [0, 4])
def test_half_precision_is_the_rounded_float32(rank):
    qweight = random_weight((16, 64), 4, rank=rank)
    exact = qweight.dequantize()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(qweight.dequantize(dtype), exact.to(dtype))


@pytest.mark.parametrize("split", [None, 11])
@pytest.mark.parametrize("rank", [0, 4])
def test_general_path_equals_the_cpu_path(split, rank, monkeypatch):
    """The path of other devices, reached here by pretending that the layout needs padding."""
    qweight = random_weight((24, 40, 3, 3), 3, split, rank=rank)
    scales = random_scales(qweight, 1)
    r_out, s_in = scales.r_out.view(qweight.parts, -1).t(), scales.s_in[0]
    blocked = qweight.dequantize(torch.float32, r_out, s_in)
    monkeypatch.setattr(dequantize, "folded_codes", lambda *_: -1)
    general = qweight.dequantize(torch.float32, r_out, s_in)
    # One product for all rows may add its terms in another order.
    assert torch.equal(general, blocked) if not rank else relative(general, blocked) < 1e-6


def test_inside_and_outside_inference_mode():
    with torch.inference_mode():
        inside = random_weight((8, 16))
        first = inside.dequantize(torch.bfloat16)
    assert torch.equal(inside.dequantize(torch.bfloat16), first)
    outside = random_weight((8, 16))
    with torch.inference_mode():
        assert torch.equal(outside.dequantize(torch.bfloat16), first)


@pytest.mark.parametrize("rank", [0, 4])
def test_no_allocation_of_weight_size(rank):
    qweight = random_weight((512, 512, 3, 3), rank=rank)
    out = torch.empty(qweight.shape, dtype=torch.bfloat16)
    qweight.dequantize(out=out)
    known = {out.untyped_storage().data_ptr(), qweight.packed.untyped_storage().data_ptr()}
    with RecordStorages() as record:
        qweight.dequantize(out=out)
    largest = max(size for pointer, size in record.sizes.items() if pointer not in known)
    assert largest <= 4 * dequantize.BLOCK_CODES < qweight.numel


def test_unquantized_geometry_is_kept_by_to():
    qweight = random_weight((8, 6, 3, 3), 4, split=2)
    moved = qweight.to("cpu")
    assert isinstance(moved, QuantizedWeight) and moved.split == 2 and moved.shape == (8, 6, 3, 3)


def test_a_low_rank_term_moves_along():
    moved = random_weight((8, 6), rank=2).to("meta")
    assert moved.low_rank.up.is_meta and moved.low_rank.down.is_meta and moved.packed.is_meta
