"""Geometry of tiles and windows: what holds for every size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def host(comfy_inprocess):
    """Importing `quanttune.host` needs the host."""


@st.composite
def sides(draw):
    grid = draw(st.sampled_from([1, 4, 8]))
    size = grid * draw(st.integers(1, 300))
    tile = draw(st.integers(grid, 40 * grid))
    return size, tile, draw(st.integers(0, tile - 1)), grid


@given(sides())
def test_equal_pieces_cover_a_side(side):
    from quanttune.host.tiles import strip

    size, tile, overlap, grid = side
    found = strip(*side)
    longest, shared = tile // grid * grid, min(-(-overlap // grid), tile // grid - 1) * grid
    ends = [start + found.length for start in found.starts]
    assert found.size == size and found.starts[0] == 0 and ends[-1] == size
    assert found.windows.shape == (len(found.starts), found.length)
    assert found.length % grid == 0 and all(start % grid == 0 for start in found.starts)
    assert found.length <= max(longest, grid)
    for start, end in zip(found.starts[1:], ends):
        assert end - start >= shared
    # No fewer pieces would do, and no shorter ones: nothing is computed for nothing.
    count = len(found.starts)
    if count > 1:
        assert (count - 1) * longest - (count - 2) * shared < size
        assert count * (found.length - grid) - (count - 1) * shared < size
    gaps = [b - a for a, b in zip(found.starts, found.starts[1:])]
    assert not gaps or max(gaps) - min(gaps) <= grid


@given(sides())
def test_weights_sum_to_one_and_fall_to_zero_only_inside(side):
    from quanttune.host.tiles import strip

    found = strip(*side)
    total = torch.zeros(found.size, dtype=torch.float64)
    for start, window in zip(found.starts, found.windows.double()):
        total[start:start + found.length] += window
    assert (total - 1).abs().max() < 1e-6 and found.windows.min() >= 0
    last = len(found.starts) - 1
    pairs = all(b >= a + found.length for a, b in zip(found.starts, found.starts[2:]))
    for i, window in enumerate(found.windows):
        if i == 0 and pairs:
            assert window[0] == 1
        if i == last and pairs:
            assert window[-1] == 1
        if i and pairs:
            shared = found.starts[i - 1] + found.length - found.starts[i]
            if shared:
                # sin² of half a place: smooth, from next to nothing to next to all.
                assert window[0] <= 2.5 / max(shared, 2) ** 2 + (shared == 1) * 0.5
                assert window[:shared + 1].diff().abs().max() <= 1.6 / shared + 1e-6


@given(sides(), sides())
def test_blending_crops_gives_the_whole_back(one, other):
    from quanttune.host.tiles import Tiling, strip

    tiles = Tiling(strip(*one), strip(*other))
    if len(tiles) > 400:
        return
    whole = torch.randn(2, one[0], other[0], generator=torch.Generator().manual_seed(0))
    blended = torch.zeros_like(whole)
    count = 0
    for tile in tiles:
        part = tile.crop(whole)
        assert part.shape[1:] == tiles.shape
        tile.add(blended, part)
        count += 1
    assert count == len(tiles) and (blended - whole).abs().max() < 1e-5


def test_a_side_no_longer_than_a_tile_is_one_piece():
    from quanttune.host.tiles import tiling

    for height, width in ((8, 8), (64, 128), (128, 120)):
        tiles = tiling(height, width, 128, 32, 8)
        assert len(tiles) == 1 and tiles.shape == (height, width)
        assert next(iter(tiles)).row_weights.min() == 1
    assert tiling(32, 4000, 144, 16, 8).shape[0] == 32


@pytest.mark.parametrize("arguments", [(0, 8, 0), (12, 8, 0, 8), (16, 8, 8), (16, 4, 0, 8),
                                       (16, 8, -1)])
def test_what_cannot_be_covered_is_refused(arguments):
    from quanttune.host.tiles import strip

    with pytest.raises(ValueError, match="no tiles"):
        strip(*arguments)


@pytest.mark.parametrize("size, target, expected", [
    (1, 8, [0] * 8), (2, 6, [0, 1, 0, 1, 0, 1]), (3, 8, [0, 1, 2, 1, 0, 1, 2, 1]),
    (8, 8, list(range(8))), (7, 8, [0, 1, 2, 3, 4, 5, 6, 5]),
])
def test_mirrored_sides(size, target, expected):
    from quanttune.host.tiles import mirrored, padded

    assert mirrored(size, target).tolist() == expected
    assert padded(size, 8) == 8


def test_the_defaults_cost_little_more_than_the_whole():
    """Work of the tiles over that of the picture; what `tile_size` and `overlap` were chosen by."""
    from quanttune.host.tiles import tiling

    for size, most in ((256, 1.13), (512, 1.27), (768, 1.32), (1024, 1.27)):
        tiles = tiling(size, size, 144, 16, 8)
        assert len(tiles) * tiles.shape[0] * tiles.shape[1] / size ** 2 <= most
