"""The small upscaler's recipe: its data, its first state, and the form it is shipped in."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("comfy")

from quanttune.starter import (  # noqa: E402
    upscaler_data,
    upscaler_fold,
    upscaler_start,
    upscaler_unet,
    upscaler_vae,
)


def tiny_pictures(count=3):
    rng = np.random.default_rng(0)
    side, step = upscaler_data.WINDOW, upscaler_data.FACTOR
    large = rng.integers(0, 256, (count, side * step, side * step, 3), dtype=np.uint8)
    clean = np.stack([upscaler_data.shrink(p) for p in large])
    told = np.zeros((count, 2, 32, 128), np.float16)
    return upscaler_data.Pictures(large, clean, clean, told, told[0, 0])


def test_small_pictures_are_means_and_lie_under_the_large_ones():
    data = tiny_pictures()
    index, y, x = np.array([2, 0]), np.array([5, 40]), np.array([9, 3])
    small = upscaler_data.cut(data.clean, index, y, x, 16)
    large = upscaler_data.cut(data.large, index, y, x, 16, 4)
    assert torch.allclose(torch.nn.functional.avg_pool2d(large, 4), small, atol=0.006)


def test_places_lie_inside_and_prefer_detail():
    data = tiny_pictures()
    data.clean[:] = 100
    data.clean[:, :, 40:] = np.arange(24)[:, None] * 5
    detail, rng = data.detail(), np.random.default_rng(1)
    assert detail.shape == (3, upscaler_data.WINDOW + 1, upscaler_data.WINDOW + 1)
    y, x = upscaler_data.places(detail, rng.integers(3, size=400), 16, rng)
    assert y.min() >= 0 and x.min() >= 0
    assert max(y.max(), x.max()) <= upscaler_data.WINDOW - 16
    assert (x > 24).mean() > 0.55  # by chance 0.49


def test_the_autoencoder_starts_as_a_blurred_enlargement():
    model = upscaler_vae.build().eval()
    ramp = torch.linspace(-0.8, 0.8, 64).expand(1, 3, 64, 64)
    with torch.inference_mode():
        again = model.decoder(model.encoder(ramp)[:, :4])
    assert (again - ramp)[..., 12:-12, 12:-12].abs().mean() < 0.12


def test_the_diffusion_model_starts_as_the_best_linear_estimate():
    """With nothing but noise it says what the small picture does; with little noise, the latent."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (4, 8, 8, 3), generator=generator, dtype=torch.uint8)
    small = small.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    picture = torch.from_numpy(small).permute(0, 3, 1, 2) / 127.5 - 1
    by_colour = torch.randn(4, 3, generator=generator)
    latents = torch.einsum("lc,nchw->nlhw", by_colour, picture) + 0.5
    colours = upscaler_start.read_off(latents.numpy(), small)
    assert torch.allclose(colours[:, :3], by_colour, atol=1e-4)
    assert torch.allclose(colours[:, 3], torch.tensor(0.5), atol=1e-4)

    model, signal = upscaler_unet.build(), upscaler_unet.signal_levels()
    upscaler_start.start(model, colours, signal)
    truth = latents + 0.1 * torch.randn(latents.shape, generator=generator)
    for t, most in ((999, 0.2), (500, 0.2), (100, 0.15), (5, 0.04)):
        a, s = signal[t].sqrt(), (1 - signal[t]).sqrt()
        noisy = a * truth + s * torch.randn(latents.shape, generator=generator)
        more = {"context": torch.zeros(4, 32, 128), "y": torch.zeros(4, dtype=torch.long)}
        with torch.inference_mode():
            velocity = model(torch.cat([noisy, picture], 1), torch.full((4,), float(t)), **more)
        error = (a * noisy - s * velocity - truth).square().mean().sqrt()
        assert error < most * truth.std()


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def test_folding_the_norms_changes_no_output():
    torch.manual_seed(0)
    unet, vae = randomised(upscaler_unet.build()), randomised(upscaler_vae.build())
    mean, std = np.array([0.1, -0.2, 0.3, 0.0], np.float32), np.float32([0.5, 1.5, 1.0, 2.0])
    x, z = torch.randn(2, 7, 16, 16), torch.randn(1, 4, 8, 8)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    more = {
        "timesteps": torch.tensor([3.0, 800.0]),
        "context": torch.randn(2, 32, 128),
        "y": torch.tensor([0, 351]),
    }
    m, s = (torch.from_numpy(v).view(1, 4, 1, 1) for v in (mean, std))
    with torch.inference_mode():
        before = unet(x, **more), vae.decoder(z * s + m), (vae.encoder(picture)[:, :4] - m) / s
    upscaler_unet.for_the_host(unet)
    upscaler_vae.for_the_host(vae, mean, std)
    scale = upscaler_vae.SCALE_FACTOR
    with torch.inference_mode():
        after = unet(x, **more), vae.decode(z / scale), vae.encode(picture) * scale
    for one, other in zip(before, after):
        assert torch.allclose(one, other, atol=2e-3 * float(one.std()))
    eps = {m.eps for m in [*unet.modules(), *vae.modules()] if isinstance(m, torch.nn.GroupNorm)}
    assert all(any(abs(e / wanted - 1) < 1e-6 for wanted in (1e-5, 1e-6)) for e in eps)


def test_the_recipe_runs_from_pictures_to_a_file(tmp_path, monkeypatch):
    """The loop itself, on two pictures and for a second each."""
    from quanttune.starter import upscaler_export
    from quanttune.starter.common import Run, prepare_host

    prepare_host("cpu")
    monkeypatch.setattr(upscaler_vae, "BATCH", 1)
    monkeypatch.setattr(upscaler_unet, "PLAN", ((1.0, 16, 2),))
    data = tiny_pictures(2)
    upscaler_vae.train(Run(tmp_path, "upscaler-vae", 0.01), data, 1)
    encoded = upscaler_vae.latents(tmp_path, data, upscaler_vae.finished(tmp_path))
    assert encoded["latents"].shape == (2, 4, upscaler_data.WINDOW, upscaler_data.WINDOW)
    spread = encoded["latents"][:, :3].astype(np.float32).std((0, 2, 3))
    assert np.abs(spread - upscaler_vae.SPREAD).max() < 0.1
    upscaler_unet.train(Run(tmp_path, "upscaler-unet", 0.01), data, encoded["latents"], 1)
    upscaler_export.export(tmp_path, data, tmp_path / "out" / "x4.safetensors")
    assert 1e6 < (tmp_path / "out" / "x4.safetensors").stat().st_size < 12e6


def test_soft_norms_keep_what_hard_ones_forget():
    norm = torch.nn.GroupNorm(2, 4, eps=1e-6)
    x = torch.tensor([0.1, -0.1, 0.3, -0.3]).view(1, 4, 1, 1).expand(1, 4, 3, 3)
    assert torch.allclose(norm(x).abs(), torch.ones(1, 4, 3, 3), atol=1e-3)
    upscaler_fold.soften(norm, 1e-3)
    assert torch.allclose(norm(x)[0, 2] / norm(x)[0, 0], torch.full((3, 3), 3.0), rtol=0.1)
