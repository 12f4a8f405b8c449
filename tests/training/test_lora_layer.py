"""The LoRA of one layer: what it changes, what it refuses, and DoRA's two ways of counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import QuantTuneError
from quanttune.training.lora_layer import (
    LoraLayer,
    largest_rank,
    peft_magnitude,
    stock_magnitude,
)


def layer(shape=(6, 5), rank=2, alpha=3.0, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return LoraLayer(down, up, alpha, **options)


@given(st.sampled_from([(6, 5), (4, 3, 3, 3), (5, 2, 1, 1)]), st.integers(1, 4),
       st.floats(-4, 4, width=32))
def test_the_delta_is_the_scaled_product(shape, rank, alpha):
    lora = layer(shape, rank, alpha)
    assert lora.rank == rank and lora.weight_shape == shape
    expected = torch.einsum("or,r...->o...", lora.up.flatten(1), lora.down) * (alpha / rank)
    assert torch.allclose(lora.delta(), expected, atol=1e-6)


def test_everything_becomes_float32_and_stays_outside_autograd():
    lora = LoraLayer(torch.ones(2, 5, dtype=torch.float16, requires_grad=True),
                     torch.ones(6, 2, dtype=torch.bfloat16), torch.tensor(4))
    assert lora.down.dtype == lora.up.dtype == torch.float32
    assert not lora.down.requires_grad and lora.alpha == 4.0 and isinstance(lora.alpha, float)


@pytest.mark.parametrize("change,message", [
    ({"down": torch.ones(3, 5)}, "do not belong together"),
    ({"up": torch.ones(6, 2, 1, 1)}, "do not belong together"),
    ({"down": torch.ones(2, 5, 3, 3), "up": torch.ones(6, 2, 3, 3)}, "do not belong together"),
    ({"down": torch.ones(0, 5), "up": torch.ones(6, 0)}, "do not belong together"),
    ({"down": torch.ones(2), "up": torch.ones(2)}, "do not belong together"),
    ({"up": torch.full((6, 2), float("nan"))}, "'up' holds NaN"),
    ({"down": torch.full((2, 5), float("inf"))}, "'down' holds NaN or infinite"),
    ({"alpha": float("nan")}, "alpha is nan"),
    ({"dora_scale": torch.ones(5, 1)}, "magnitudes have shape"),
    ({"dora_scale": torch.full((6, 1), float("nan"))}, "'dora_scale' holds NaN"),
])
def test_what_it_refuses(change, message):
    values = {"down": torch.ones(2, 5), "up": torch.ones(6, 2), "alpha": 1.0, **change}
    with pytest.raises(QuantTuneError, match=message) as caught:
        LoraLayer(**values)
    assert str(caught.value).endswith(".") and ";" in str(caught.value)


def test_rank_up_to_the_smaller_side():
    layer((6, 5), 5).check_rank()
    layer((4, 3, 3, 3), 4).check_rank()
    assert largest_rank((4, 3, 3, 3)) == 4 and largest_rank((40, 3, 3, 3)) == 27
    with pytest.raises(QuantTuneError, match="rank is 6, .* no more than 5"):
        layer((6, 5), 6).check_rank()


@given(st.sampled_from([(6, 5), (4, 3, 3, 3)]), st.integers(0, 9))
def test_dora_magnitudes_change_their_meaning_and_come_back(shape, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    lora = layer(shape, seed=seed)
    changed = weight + lora.delta()
    magnitude = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) + 0.5
    ones = [1] * (len(shape) - 1)
    column = magnitude.view(-1, *ones)
    wanted = column * changed / changed.flatten(1).norm(dim=1).view(-1, *ones)
    stock = stock_magnitude(magnitude, weight, lora.delta())
    assert stock.shape == (shape[0], *ones)
    got = changed * stock / weight.flatten(1).norm(dim=1).view(-1, *ones)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(peft_magnitude(stock, weight, lora.delta()), column, atol=1e-5)
