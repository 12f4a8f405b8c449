"""No seam in the pixels that the shipped upscaler draws: trained weights, its own autoencoder.

A trained network draws its detail a little differently in a tile than in the whole picture, and
does so everywhere: the steps that tiling puts in are to be no larger at tile borders than
elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("comfy")

from quanttune.starter.common import prepare_host  # noqa: E402
from quanttune.starter.upscaler_config import FACTOR, SETTINGS  # noqa: E402
from quanttune.tests.host.upscale_models import _steps, pictures, seam_energy  # noqa: E402

HEIGHT, WIDTH, TILE, OVERLAP = 72, 104, 64, 16
SEAM = 1.05
"""Differences across tile borders may be so many times as large as elsewhere, or as they are in
the picture done whole."""
ADDED = 1.1
"""The steps that tiling puts in at borders may be so many times those it puts in elsewhere..."""
UNSEEN = 0.1 / 255
"""...unless they are below a tenth of what a picture of 8 bits can hold."""


@pytest.fixture(scope="module")
def upscaled():
    """A function: picture and settings to the picture enlarged, channels first."""
    prepare_host("cuda" if torch.cuda.is_available() else "cpu")
    from quanttune.host.upscale import upscale
    from quanttune.host.upscale_inputs import conditioning
    from quanttune.starter.load_upscaler import load_starter_upscaler

    with torch.inference_mode():
        model, clip, vae = load_starter_upscaler()
        prompts = conditioning(clip, "a red star on a blue background", "", None, None, 2.0)

    def run(picture, **settings):
        with torch.inference_mode():
            out = upscale(model, vae, picture, *prompts, **SETTINGS, **settings)
        return out[0].movedim(-1, 0).cpu()

    return run


def borders() -> list[tuple]:
    """Strips of rows and columns in pixels: of the sampling's tiles and of the decoding's."""
    from quanttune.host.tiled_decode import decode_tiling
    from quanttune.host.tiles import strip

    sampling = []
    for side in (HEIGHT, WIDTH):
        s = strip(side, TILE, OVERLAP, 8)
        starts = tuple(FACTOR * start for start in s.starts)
        sampling.append(replace(s, size=FACTOR * side, length=FACTOR * s.length, starts=starts))
    decoding = decode_tiling(HEIGHT, WIDTH, TILE, FACTOR)
    return [tuple(sampling), (decoding.vertical, decoding.horizontal)]


def excess(tiled, whole, strips) -> float:
    """Steps put in at borders over those put in elsewhere: as they are, or as parts of the whole's
    own, whichever is less. A border may fall on strokes of a text, or between them."""
    worst = 0.0
    for (at, off), (own_at, own_off) in zip(_steps(tiled - whole, *strips), _steps(whole, *strips)):
        if at > UNSEEN:
            worst = max(worst, at / off * min(1, own_off / own_at))
    return worst


@pytest.mark.parametrize("kind", ["gradient", "flat", "text", "noise"])
def test_no_seam_in_the_shipped_upscalers_pixels(upscaled, kind):
    picture = pictures(HEIGHT, WIDTH)[kind]
    whole = upscaled(picture, tile_size=256, tile_vae=False)
    tiled = upscaled(picture, tile_size=TILE, overlap=OVERLAP)
    assert not torch.equal(tiled, whole)
    for strips in borders():
        own = max(1, seam_energy(whole, *strips))
        assert seam_energy(tiled, *strips) <= SEAM * own
        assert excess(tiled, whole, strips) <= ADDED


@pytest.mark.parametrize("kind", ["gradient", "flat"])
def test_the_same_measure_sees_tiles_that_are_cut(upscaled, monkeypatch, kind):
    from quanttune.tests.host.test_upscale import hard_cuts

    picture = pictures(HEIGHT, WIDTH)[kind]
    whole = upscaled(picture, tile_size=256, tile_vae=False)
    hard_cuts(monkeypatch)
    cut = upscaled(picture, tile_size=TILE, overlap=OVERLAP)
    assert max(excess(cut, whole, strips) for strips in borders()) > 2 * ADDED
