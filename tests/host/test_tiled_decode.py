"""Decoding by tiles against decoding the whole latent."""

import pytest
import torch

from quanttune.tests.host.upscale_models import (
    added_steps,
    image,
    pictures,
    seam_energy,
    small_vae,
)


@pytest.fixture(scope="module")
def vae(comfy_inprocess):
    with torch.inference_mode():
        yield small_vae()


@pytest.fixture(autouse=True)
def inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def decoded(vae, latent, tile, cut=0):
    from quanttune.host.tiled_decode import decode_into, decode_tiling

    height, width = latent.shape[2:]
    picture, done = torch.zeros(4 * height - cut, 4 * width - cut, 3), []
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


def test_what_is_beyond_the_picture_is_cut_off(vae):
    latent = smooth_latent(24, 40)
    for tile in (24, 64):
        whole, _ = decoded(vae, latent, tile)
        picture, _ = decoded(vae, latent, tile, cut=28)
        assert torch.equal(picture, whole[:-28, :-28])


def test_tiles_never_exceed_the_largest(comfy_inprocess):
    from quanttune.host.tiled_decode import LARGEST_TILE, decode_tiling

    tiles = decode_tiling(1024, 900, 4096, 4)
    assert max(tiles.shape) <= 4 * LARGEST_TILE
    assert len(decode_tiling(1024, 900, None, 4)) == 1
    assert decode_tiling(30, 4000, 64, 4).shape[0] == 120


def local(latent):
    """A decoder that knows nothing of a pixel's neighbours."""
    return latent[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


def networklike(latent):
    """What a VAE does at borders, and more of it: padding and statistics of the tile show."""
    base = latent[:, :3]
    blurred = torch.nn.functional.avg_pool2d(base, 7, 1, 3)
    found = 0.5 * blurred + 0.5 * base - 0.2 * base.mean((2, 3), keepdim=True)
    return torch.nn.functional.interpolate(found, scale_factor=4, mode="bilinear")


def test_tiles_of_a_local_decoder_are_the_whole(vae, monkeypatch):
    monkeypatch.setattr(vae.first_stage_model, "decode", local)
    latent = smooth_latent(70, 45)
    whole, tiled = decoded(vae, latent, None)[0], decoded(vae, latent, 24)[0]
    assert (whole - tiled).abs().max() < 1e-6 and tiled.min() >= 0 and tiled.max() <= 1


@pytest.mark.parametrize("kind", ["gradient", "flat", "text", "noise"])
def test_no_seam_at_tile_borders(vae, monkeypatch, kind):
    from quanttune.host import tiles

    monkeypatch.setattr(vae.first_stage_model, "decode", networklike)
    grain = torch.randn(1, 4, 100, 130, generator=torch.Generator().manual_seed(2))
    latent = torch.nn.functional.pad(pictures(100, 130)[kind].movedim(-1, 1), (0, 0, 0, 0, 0, 1))
    latent = latent * 1.2 - 0.6 + 0.05 * grain
    whole, _ = decoded(vae, latent, None)
    tiled, where = decoded(vae, latent, 48)
    whole, tiled = whole.movedim(-1, 0), tiled.movedim(-1, 0)
    where = where.vertical, where.horizontal
    assert seam_energy(tiled, *where) <= 1.05 * max(1, seam_energy(whole, *where))
    assert added_steps(tiled, whole, *where) <= 0.04
    monkeypatch.setattr(tiles, "_windows", lambda size, length, starts: torch.stack([
        (torch.arange(length) < end).float()
        for end in [*(b - a for a, b in zip(starts, starts[1:])), length]]))
    cut = decoded(vae, latent, 48)[0].movedim(-1, 0)
    assert added_steps(cut, whole, *where) > 0.1


def test_no_seam_in_what_random_weights_decode(vae):
    for kind, picture in pictures(72, 64).items():
        latent = torch.nn.functional.pad(picture.movedim(-1, 1), (0, 0, 0, 0, 0, 1)) * 4 - 2
        tiled, where = decoded(vae, latent, 32)
        energy = seam_energy(tiled.movedim(-1, 0), where.vertical, where.horizontal)
        own = seam_energy(vae.decode(latent)[0].movedim(-1, 0), where.vertical, where.horizontal)
        assert energy <= 1.05 * max(1, own), kind


def test_memory_is_asked_for_the_largest_tile_and_stop_leaves_the_vae_usable(vae, monkeypatch):
    import comfy.model_management as management

    latent, asked = smooth_latent(60, 60), []
    before = decoded(vae, latent, 24)[0]
    memory = vae.memory_used_decode
    monkeypatch.setattr(vae, "memory_used_decode",
                        lambda shape, dtype: (asked.append(shape), memory(shape, dtype))[1])

    def stop():
        management.interrupt_current_processing()

    from quanttune.host.tiled_decode import decode_into, decode_tiling

    with pytest.raises(management.InterruptProcessingException):
        decode_into(torch.zeros(240, 240, 3), vae, latent, decode_tiling(60, 60, 24, 4), stop)
    assert asked == [(1, 4, 64, 64)]
    assert torch.equal(decoded(vae, latent, 24)[0], before)


def test_tiles_share_the_tone_of_the_whole(comfy_inprocess, monkeypatch):
    """Group norms are nearly as exact as with the whole latent; each tile's own are not."""
    from quanttune.host import shared_norms

    vae = small_vae()
    # Attention to the whole latent is what tiles cannot have; without it norms alone differ.
    monkeypatch.setattr(vae.first_stage_model.decoder.mid.attn_1, "forward", lambda x: x)
    latent = torch.cat([0.3 * smooth_latent(96, 40), 2 * smooth_latent(96, 56, seed=1)], -1)
    whole, _ = decoded(vae, latent, None)
    names = set(dir(vae.first_stage_model.decoder.norm_out))
    shared, _ = decoded(vae, latent, 32)
    assert set(dir(vae.first_stage_model.decoder.norm_out)) == names
    monkeypatch.setattr(shared_norms.SharedNorms, "note", lambda *a: None)
    own, _ = decoded(vae, latent, 32)
    errors = [(found - whole).abs().mean().item() for found in (shared, own)]
    assert errors[0] < errors[1] / 3, errors


def test_held_statistics_of_the_same_input_are_the_ordinary_norm(comfy_inprocess):
    import comfy.ops

    from quanttune.host.shared_norms import SharedNorms

    for kind in (comfy.ops.disable_weight_init, comfy.ops.manual_cast):
        norm = kind.GroupNorm(4, 8)
        generator = torch.Generator().manual_seed(0)
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
        x = torch.randn(1, 8, 6, 5, generator=generator) * 3 + 2
        shared = SharedNorms(torch.nn.Sequential(norm))
        with shared.measured():
            ordinary = norm(x)
        with shared.applied():
            assert torch.allclose(norm(x), ordinary, atol=1e-5)
            # And of a part of it what the whole has there.
            assert torch.allclose(norm(x[..., :3]), ordinary[..., :3], atol=1e-5)
        assert torch.allclose(norm(x), ordinary, atol=1e-5) and "forward" not in vars(norm)


def test_memory_is_given_back_before_each_norm(comfy_inprocess):
    import comfy.ops

    from quanttune.host.shared_norms import SharedNorms

    module = torch.nn.Sequential(*(comfy.ops.disable_weight_init.GroupNorm(2, 4) for _ in "ab"))
    calls = []
    shared = SharedNorms(module, lambda: calls.append(1))
    x = torch.arange(16.).view(1, 4, 2, 2)
    with shared.measured():
        module(x)
    assert len(calls) == 2
    with shared.applied():
        module(x)
    assert len(calls) == 4
    module(x)
    assert len(calls) == 4


@pytest.mark.parametrize("size", [(100, 60), (600, 65), (17, 4000), (9, 2000), (256, 80)])
def test_samples_are_no_larger_than_a_tile_and_come_from_everywhere(comfy_inprocess, size):
    from quanttune.host.tiled_decode import LARGEST_TILE, SAMPLE, SAMPLES, _samples

    latent = torch.arange(size[0] * size[1]).view(1, 1, *size)
    found, margins = _samples(latent)
    found = list(found)
    assert len(found) == SAMPLES and margins == tuple(0.25 * (side > SAMPLE) for side in size)
    for batch in found:
        assert batch.shape[2:] == tuple(min(SAMPLE, side) for side in size)
        assert LARGEST_TILE ** 2 / 2 < batch.numel() <= LARGEST_TILE ** 2
    seen = torch.cat([batch.flatten() for batch in found])
    for places, side in ((seen // size[1], size[0]), (seen % size[1], size[1])):
        assert places.min() < side / 3 and places.max() >= side * 2 / 3
    assert all(torch.equal(a, b) for a, b in zip(found, _samples(latent)[0]))


def test_statistics_of_a_small_latent_are_those_of_all_of_it(comfy_inprocess):
    from quanttune.host.tiled_decode import _samples

    latent = smooth_latent(40, 72)
    assert torch.equal(_samples(latent)[0][0], latent) and _samples(latent)[1] == (0, 0)


@pytest.mark.parametrize("kind", ["stripes", "checks", "text", "gradient"])
def test_detail_does_not_shift_the_tone_of_the_picture(comfy_inprocess, kind):
    """The shipped decoder, by tiles and whole: thinned out, fine detail would be another."""
    from quanttune.starter.load_upscaler import load_starter_upscaler
    from quanttune.tests.host.upscale_models import pictures as kinds

    vae = load_starter_upscaler()[2]
    rows, columns = torch.arange(80)[:, None], torch.arange(88)[None]
    made = {"stripes": (columns // 2 % 2).expand(80, 88), "checks": (rows + columns) % 2}
    small = (made[kind].float()[None, ..., None].expand(1, 80, 88, 3) if kind in made
             else kinds(80, 88)[kind])
    latent = vae.encode(small.repeat_interleave(4, 1).repeat_interleave(4, 2))
    whole, _ = decoded(vae, latent, None)
    tiled, _ = decoded(vae, latent, 40)
    assert (tiled - whole).square().mean() < 10 ** -4.7
