"""A MODEL that sees one tile at a time: what it keeps between its calls."""

import pytest

from quanttune.tests.host.test_upscale import inference, latents, run  # noqa: F401
from quanttune.tests.host.upscale_models import pictures, small_upscaler, small_vae


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_what_a_cache_keeps_is_for_the_same_tile(monkeypatch, kind, caplog):
    """The host's caches cost by tiles what they cost on the whole: no tile gets another's."""
    from comfy_extras import nodes_easycache

    model, vae = small_upscaler(), small_vae()
    # A local model, inside of where the host's caches are.
    model.model.diffusion_model._forward = lambda x, *rest, **more: 0.3 * x[:, :4] - x[:, 4:5]
    node = getattr(nodes_easycache, f"{kind}Node")
    cached, = node.execute(model, 2.0, 0.0, 1.0, False).args
    found, picture = latents(monkeypatch), pictures(100, 120)["gradient"]
    for chosen, tile in ((model, 64), (model, 256), (cached, 256), (cached, 64)):
        caplog.clear()
        with caplog.at_level("INFO"):
            run((chosen, vae), picture, tile_size=tile, steps=10, cfg=1.0, sampler="euler",
                scheduler="karras")
    # The host's words count what was left out of the last run, whose tiles have caches.
    skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(skipped) == 1 and "skipped 0/" not in skipped[0]
    tiled, whole, whole_cached, tiled_cached = found
    assert (tiled - whole).abs().max() / whole.abs().max() < 1e-5
    cost = (whole_cached - whole).abs().mean()
    assert 0 < (tiled_cached - whole).abs().mean() < 1.5 * cost
