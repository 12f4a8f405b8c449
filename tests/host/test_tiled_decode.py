"""Decoding by tiles against decoding the whole latent."""

import pytest
import torch

from quanttune.tests.host.upscale_models import image, pictures, seam_energy, small_vae


@pytest.fixture(scope="module")
def vae(comfy_inprocess):
    with torch.inference_mode():
        yield small_vae()


@pytest.fixture(autouse=True)
def inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def decoded(vae, latent, tile):
    from quanttune.host.tiled_decode import decode_into, decode_tiling

    height, width = latent.shape[2:]
    picture, done = torch.zeros(4 * height, 4 * width, 3), []
    tiles = decode_tiling(height, width, tile, 4)
    decode_into(picture, vae, latent, tiles, lambda: done.append(1))
    assert len(done) == len(tiles)
    return picture, tiles


def smooth_latent(height, width, seed=0):
    return image(height, width, channels=4, seed=seed).movedim(-1, 1) * 4 - 2


def test_a_single_tile_is_what_the_host_decodes(vae):
    latent = smooth_latent(24, 33)
    for tile in (None, 64):
        picture, tiles = decoded(vae, latent, tile)
        assert len(tiles) == 1 and torch.equal(picture, vae.decode(latent)[0])


def test_tiles_never_exceed_the_largest(vae):
    from quanttune.host.tiled_decode import LARGEST_TILE, decode_tiling

    tiles = decode_tiling(1024, 900, 4096, 4)
    assert max(tiles.shape) <= 4 * LARGEST_TILE
    assert len(decode_tiling(1024, 900, None, 4)) == 1
    assert decode_tiling(30, 4000, 64, 4).shape[0] == 120
