"""Charts: that they are pictures of the asked size, of any data, and show what they are given."""

import numpy as np
import pytest
from PIL import Image

from quanttune.metrics.charts import loss_chart, picture_grid, running_mean


def test_running_mean_by_hand():
    assert running_mean([1, 2, 3, 4], 2).tolist() == [1, 1.5, 2.5, 3.5]
    assert running_mean([5], 10).tolist() == [5] and len(running_mean([], 3)) == 0


@pytest.mark.parametrize("losses", [[], [0.5], [0.5] * 3, list(np.geomspace(1e3, 1e-3, 200)),
                                    [0.0, 1.0], [1e-12, 2e-12]])
def test_any_losses_give_a_chart(losses):
    chart = loss_chart(range(1, len(losses) + 1), losses, "run", rates=losses or None)
    assert chart.size == (768, 432) and chart.mode == "RGB"
    assert len(chart.getcolors(1 << 20)) > 10


def test_a_falling_loss_falls_in_the_picture():
    falling, rising = (np.asarray(loss_chart(range(100), values).convert("RGB"), int)
                       for values in (np.linspace(1, 0.2, 100), np.linspace(0.2, 1, 100)))

    def height(chart, part):
        blue = (abs(chart - [0x2b, 0x5f, 0xb4]).sum(-1) < 60)[60:-60]  # without the legend
        return np.nonzero(blue[:, part])[0].mean()

    left, right = slice(120, 250), slice(600, 740)
    assert height(falling, left) < height(falling, right)
    assert height(rising, left) > height(rising, right)


def test_a_grid_keeps_each_picture_in_its_place():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    rows = [[Image.new("RGB", (64, 64), c) for c in row] for row in colours]
    sheet = picture_grid(rows, ["a very long prompt " * 20, "b"], ["step 0", "step 9"], cell=64)
    pixels = np.asarray(sheet)
    for y, row in enumerate(colours):
        for x, colour in enumerate(row):
            at = (22 + 6 + y * (64 + 22 + 6) + 22 + 32, 6 + x * 70 + 32)
            assert tuple(pixels[at]) == colour


def test_rows_of_different_length_and_arrays():
    one = np.zeros((32, 48, 3), np.uint8)
    assert picture_grid([[one, one], [one]]).size[0] > 2 * 192
