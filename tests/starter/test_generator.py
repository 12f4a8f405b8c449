"""The generator: the same seed draws the same bytes, and captions tell the truth."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from quanttune.starter import captions, generator, subjects
from quanttune.starter.shapes import SHAPES


def test_same_seed_same_bytes():
    first = [generator.render(generator.sample(seed)) for seed in range(8)]
    again = [generator.render(generator.sample(seed)) for seed in range(8)]
    digests = [hashlib.sha256(p.tobytes()).hexdigest() for p in first]
    assert digests == [hashlib.sha256(p.tobytes()).hexdigest() for p in again]
    assert len(set(digests)) == len(digests)


def test_pictures_have_the_stated_form():
    picture = generator.render(generator.sample(3))
    assert picture.shape == (generator.SIZE, generator.SIZE, 3)
    assert picture.dtype == np.uint8


SUMS = {
    1: (6818211, 432215927, 432050500),
    2: (8338910, 530814151, 528962048),
    3: (7601613, 481260529, 446625833),
    5: (5918977, 371244486, 379617909),
    8: (8433428, 531833911, 555464072),
    13: (10552076, 670845181, 650587169),
    "clutter": (10376573, 642246480, 623541451),
}
"""Sums over a picture's values, plain and weighted by column and row, of what the starter model was
trained on. Not a hash: another processor's sine may round one pixel in ten thousand differently."""


@pytest.mark.parametrize("seed", SUMS)
def test_pictures_are_still_those_the_starter_was_trained_on(seed):
    at = generator.SIZE
    if seed == "clutter":
        picture, named = generator.clutter(4), generator.clutter(4, at)
    else:
        scene = generator.sample(seed, held=None)
        picture, named = generator.render(scene), generator.render(scene, at)
    assert picture.tobytes() == named.tobytes()
    values, place = picture.astype(np.int64).sum(2), np.arange(at)
    sums = values.sum(), (values * place).sum(), (values * place[:, None]).sum()
    far = np.abs(np.subtract(sums, SUMS[seed]))
    assert (far <= (20, 20 * at, 20 * at)).all()


@pytest.mark.parametrize("seed", [0, 2, 6, "clutter"])
def test_a_larger_picture_is_the_same_scene_with_more_detail(seed):
    if seed == "clutter":
        small, large = generator.clutter(4), generator.clutter(4, 512)
    else:
        scene = generator.sample(seed, held=None)
        small, large = generator.render(scene), generator.render(scene, 512)
    assert large.shape == (512, 512, 3) and large.dtype == np.uint8
    means = large.reshape(128, 4, 128, 4, 3).astype(float).mean((1, 3))
    assert np.abs(means - small).mean() < 1.5
    # An edge is a pixel wide in both, and so as steep from pixel to pixel; enlarged, it is not.
    steepest = [np.abs(np.diff(p.astype(int), axis=1)).max() for p in (small, large)]
    assert steepest[1] > 0.7 * steepest[0]


def test_the_world_is_rich_enough():
    assert len(SHAPES) >= 8
    assert len(generator.COLOURS) >= 8
    assert len(generator.BACKGROUNDS) >= 6


def test_held_out_triples_never_train():
    for seed in range(300):
        scene = generator.sample(seed)
        assert not generator.held_out(scene.shape, scene.colour, scene.background)
    scenes = [generator.sample(seed, held=True) for seed in range(50)]
    assert all(generator.held_out(s.shape, s.colour, s.background) for s in scenes)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_distance_field_is_negative_inside_and_positive_outside(shape):
    field = SHAPES[shape]
    line = np.linspace(-1.6, 1.6, 65, dtype=np.float32)
    distance = field(*np.meshgrid(line, line))
    assert (distance < 0).mean() > 0.05
    border = np.concatenate([distance[0], distance[-1], distance[:, 0], distance[:, -1]])
    assert border.min() > 0.2


@pytest.mark.parametrize("position", ["left", "right", "top", "bottom"])
def test_the_object_is_where_the_words_say(position):
    scene = generator.Scene("circle", "red", "white", position=position)
    picture = generator.render(scene).astype(int)
    red = (picture[..., 0] - picture[..., 1]) > 80
    y, x = (np.nonzero(red)[axis].mean() / generator.SIZE - 0.5 for axis in (0, 1))
    dx, dy = generator.POSITIONS[position]
    assert np.sign(x) * (abs(x) > 0.1) == np.sign(dx)
    assert np.sign(y) * (abs(y) > 0.1) == np.sign(dy)


@pytest.mark.parametrize("colour", generator.COLOURS)
def test_the_object_has_the_colour_the_words_say(colour):
    background = "gray" if colour != "gray" else "white"
    picture = generator.render(generator.Scene("square", colour, background, size="large"))
    middle = picture[58:70, 58:70].reshape(-1, 3).mean(0)
    distance = {
        name: np.abs(middle - np.array(value)).sum() for name, value in generator.COLOURS.items()
    }
    assert min(distance, key=distance.get) == colour


def test_captions_tell_the_truth():
    synonyms = {
        "shape": captions.SHAPE_WORDS,
        "colour": captions.COLOUR_WORDS,
        "background": captions.BACKGROUND_WORDS,
    }
    for seed in range(300):
        scene = generator.sample(seed)
        text = f" {captions.describe(scene, seed, complete=True)} ".replace(",", " ")
        for field, table in synonyms.items():
            value = getattr(scene, field)
            words = table.get(value, (value,))
            assert any(f" {word} " in text for word in words), (text, scene)
        for field, table in (("fill", captions.FILL_WORDS), ("size", captions.SIZE_WORDS)):
            for value, words in table.items():
                said = any(word and f" {word} " in text for word in words)
                neutral = value == "plain"
                assert not said or neutral or getattr(scene, field) == value, (text, scene)


def test_the_shipped_subjects_are_what_the_code_draws():
    from pathlib import Path

    from PIL import Image

    root = Path(subjects.__file__).parent / "subjects"
    for name in subjects.SUBJECTS:
        files = sorted((root / name).glob("*.png"))
        assert len(files) == len(subjects.VIEWS) == 6
        for number, (file, view) in enumerate(zip(files, subjects.VIEWS), 1):
            drawn = subjects.draw(name, *view, seed=number).astype(int)
            with Image.open(file) as image:
                assert np.abs(np.asarray(image).astype(int) - drawn).max() <= 2
            words = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
            assert words == subjects.caption(name, *view[:3])
