"""Variants of pictures: drawn from the seed, of the same shape, each knob doing its own."""

import colorsys

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.training import augment
from quanttune.training.augment import Augmentation, augmented, variant
from quanttune.training.data import TrainingImages

STILL = {"flip": 0.0, "crop": 0.0, "colour": 0.0}


def pictures(count=2, height=48, width=32):
    """Smooth ones, darker to the left, each in a hue of its own."""
    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, height), torch.linspace(0.2, 0.8, width),
                          indexing="ij")
    return tuple(torch.stack([x, y, torch.full_like(x, (i + 1) / (count + 1))], -1)
                 for i in range(count))


def images(count=2, **options):
    return TrainingImages(pictures(count), tuple(f"picture {i}" for i in range(count)), "a dog",
                          **options)


def test_each_picture_is_followed_by_its_variants():
    given = images(3, prior=(False, True, False))
    found = augmented(given, Augmentation(3, seed=1))
    assert found.captions == ("picture 0",) * 3 + ("picture 1",) + ("picture 2",) * 3
    assert found.prior == (False,) * 3 + (True,) + (False,) * 3 and found.subject == "a dog"
    for place, own in ((0, 0), (3, 1), (4, 2)):
        assert torch.equal(found.images[place], given.images[own])
    for place in (1, 2, 5, 6):
        picture = found.images[place]
        assert picture.shape == (48, 32, 3) and picture.dtype == torch.float32
        assert picture.is_contiguous() and 0 <= picture.min() and picture.max() <= 1
        assert not torch.equal(picture, given.images[0 if place < 3 else 2])
    assert not torch.equal(found.images[1], found.images[2])


def test_the_seed_alone_decides():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = augmented(images(), Augmentation(4, seed=7)).images
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = augmented(images(), Augmentation(4, seed=7)).images
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other = augmented(images(), Augmentation(4, seed=8)).images
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    fewer = augmented(images(), Augmentation(2, seed=7)).images
    assert torch.equal(fewer[1], first[1]) and torch.equal(fewer[3], first[5])


def test_one_copy_is_the_picture_and_nothing_chosen_changes_nothing():
    given = images()
    assert augmented(given, Augmentation(1)).images == given.images
    same = augmented(given, Augmentation(3, **STILL)).images
    assert all(torch.equal(p, given.images[i // 3]) for i, p in enumerate(same))


def test_flip_mirrors_the_given_share():
    picture = pictures(1)[0]
    mirrored = [not torch.equal(variant(picture, Augmentation(**{**STILL, "flip": 0.3}), 0, copy),
                                picture) for copy in range(400)]
    assert 90 < sum(mirrored) < 150
    whole = variant(picture, Augmentation(**{**STILL, "flip": 1.0}), 0, 1)
    assert torch.equal(whole, picture.flip(1))


def test_crop_cuts_up_to_its_share_and_keeps_the_shape():
    """On a ramp from 0.2 to 0.8, the span of a crop tells which part of the side is left."""
    picture = pictures(1, 96, 64)[0]
    kept_x, kept_y, starts = [], [], []
    for copy in range(200):
        found = variant(picture, Augmentation(**{**STILL, "crop": 0.4}), 0, copy)
        spans = [float(found[..., c].max() - found[..., c].min()) / 0.6 for c in (0, 1)]
        kept_x.append(spans[0])
        kept_y.append(spans[1])
        starts.append(float(found[..., 0].min()))
    assert min(kept_x) > 0.56 and max(kept_x) < 1.03 and min(kept_x) < 0.65 < 0.95 < max(kept_x)
    assert all(abs(a - b) < 0.04 for a, b in zip(kept_x, kept_y))
    assert min(starts) < 0.21 and max(starts) > 0.35


def test_colour_changes_light_and_hue_and_no_place():
    picture = pictures(1)[0]
    means = torch.stack([variant(picture, Augmentation(**{**STILL, "colour": 0.3}), 0, copy)
                         .mean((0, 1)) for copy in range(100)]) / picture.mean((0, 1))
    light = means.mean(1)
    assert light.min() > 0.65 and light.max() < 1.35 and light.min() < 0.8 < 1.2 < light.max()
    skin = torch.tensor([0.8, 0.4, 0.2]).expand(16, 16, 3)
    hues = [colorsys.rgb_to_hsv(*variant(skin, Augmentation(**{**STILL, "colour": 0.2}), 0, copy)
                                [0, 0].tolist())[0] for copy in range(50)]
    before = colorsys.rgb_to_hsv(0.8, 0.4, 0.2)[0]
    assert before - 0.022 < min(hues) < before - 0.01 < before + 0.01 < max(hues) < before + 0.022
    grey = torch.linspace(0.3, 0.6, 32)[None, :, None].expand(48, 32, 3).contiguous()
    brighter = variant(grey, Augmentation(**{**STILL, "colour": 0.2}), 0, 1)
    assert brighter[0].diff(dim=0).gt(0).all()
    assert float((brighter[..., 0] - brighter[..., 2]).abs().max()) < 1e-3


@pytest.mark.parametrize("name,value", [
    ("copies", 0), ("copies", 1001), ("flip", -0.1), ("flip", 1.1), ("crop", 0.95),
    ("colour", float("nan")), ("colour", 2),
])
def test_values_out_of_range(name, value):
    with pytest.raises(QuantTuneError, match=f"setting {name} of the augmentation is"):
        Augmentation(**{name: value})


def test_more_copies_than_memory_holds(monkeypatch):
    monkeypatch.setattr(augment, "free_memory", lambda: 16 * 2**30)
    with pytest.raises(QuantTuneError, match=r"1000 copies of 1,000 pictures would take 17\.1 GiB "
                                             "more, which is not free; use fewer copies"):
        augmented(TrainingImages(pictures(1) * 1000, ("",) * 1000), Augmentation(1000))
