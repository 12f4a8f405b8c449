"""Aspect-ratio buckets: few shapes, none larger than the square, the nearest one chosen."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quanttune.training.buckets import LONGEST, bucket_of, bucket_shapes, told

resolutions = st.integers(8, 512).map(lambda n: 8 * n)


def test_the_known_lists():
    assert bucket_shapes(512) == ((320, 768), (384, 640), (448, 576), (512, 512), (576, 448),
                                  (640, 384), (768, 320))
    sdxl = {(704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)}
    assert sdxl <= set(bucket_shapes(1024)) and len(bucket_shapes(1024)) == 13


@given(resolutions)
def test_what_holds_for_every_list(resolution):
    shapes, unit = bucket_shapes(resolution), 64 if resolution >= 256 else 8
    assert len(shapes) == len(set(shapes)) < 60
    assert set(shapes) == {(h, w) for w, h in shapes}
    for width, height in shapes:
        assert width % unit == height % unit == 0 and width > 0 and height > 0
        assert width * height <= resolution**2
        assert max(width, height) <= LONGEST * min(width, height)
    side = resolution // unit * unit
    assert (side, side) in shapes


@given(resolutions, st.integers(8, 8000), st.integers(8, 8000))
def test_the_nearest_shape_is_chosen_and_turns_with_the_picture(resolution, width, height):
    chosen = bucket_of(width, height, resolution)
    error = abs(math.log(chosen[0] / chosen[1] * height / width))
    assert all(error <= abs(math.log(w / h * height / width)) + 1e-12
               for w, h in bucket_shapes(resolution))
    turned = bucket_of(height, width, resolution)
    assert abs(math.log(turned[0] / turned[1] * width / height)) == pytest.approx(error)


@pytest.mark.parametrize("size,bucket", [
    ((1000, 1000), (512, 512)), ((4000, 3000), (576, 448)), ((1080, 1920), (384, 640)),
    ((9, 9000), (320, 768)), ((8, 8), (512, 512)),
])
def test_usual_pictures(size, bucket):
    assert bucket_of(*size, 512) == bucket


def test_the_count_of_each_shape():
    wide, tall = torch.zeros(384, 640, 3), torch.zeros(640, 384, 3)
    assert told([wide] * 2) == "" and told([]) == ""
    assert told([tall, wide, wide]) == "buckets: 640x384: 2, 384x640: 1"
