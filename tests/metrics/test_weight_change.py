"""The change of a layer against the definition, and its pictures."""

import numpy as np
import pytest
import torch

from quanttune.metrics.weight_change import (
    change_boxes,
    change_map,
    change_of_layer,
    change_table,
)
from quanttune.quant import QuantTuneError


def test_the_ratio_is_the_definition():
    base = torch.tensor([[1.0, -2.0], [4.0, 0.5]])
    change = change_of_layer(base, base * torch.tensor([[1.1, 1.0], [0.5, 2.0]]))
    assert torch.allclose(change.ratio, torch.tensor([[0.1, 0.0], [0.5, 1.0]]), atol=1e-6)
    assert change.mean == pytest.approx(0.4) and change.largest == 1.0 and change.zeros == 0


def test_kernels_are_averaged_and_zeros_left_out():
    base = torch.ones(2, 1, 1, 4)
    base[0, 0, 0, 0] = 0
    base[1] = 0
    tuned = base + 0.5
    change = change_of_layer(base, tuned)
    assert change.ratio[0, 0] == 0.5 and change.ratio[1, 0].isnan() and change.zeros == 5
    assert change.mean == 0.5


def test_stripes_of_peqa_go_across():
    base = torch.randn(40, 30)
    change = change_of_layer(base, base * (1 + 0.1 * torch.rand(40, 1)))
    assert (change.ratio - change.ratio[:, :1]).abs().max() < 1e-5


def test_other_shapes():
    with pytest.raises(QuantTuneError, match="one architecture"):
        change_of_layer(torch.ones(2, 2), torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (1300, 20), (600, 600)])
@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_pictures_of_any_layer(shape, amount):
    base = torch.randn(shape)
    base[0, 0] = 0
    change = change_of_layer(base, base * (1 + amount * torch.rand(shape)))
    for draw in (change_map, change_boxes):
        picture = np.asarray(draw(change, "a layer"))
        assert picture.ndim == 3 and picture.std() > 0


def test_the_table_is_sorted():
    base = torch.ones(2, 2)
    changes = {f"layer{i}": change_of_layer(base, base * (1 + i / 10)) for i in range(30)}
    lines = change_table(changes, 5).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [f"layer{i}" for i in range(29, 24, -1)]
    assert lines[-1] == "... and 25 more"
