"""The x4 upscaler by tiles: against diffusers' pipeline, the host's own graph, and itself."""

import pytest
import torch

from quanttune.tests.host.upscale_models import (
    added_steps,
    image,
    pictures,
    predicting,
    prompt,
    seam_energy,
    small_upscaler,
    small_vae,
)


@pytest.fixture(scope="module")
def parts(comfy_inprocess):
    with torch.inference_mode():
        yield small_upscaler(), small_vae()


@pytest.fixture(autouse=True)
def inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def run(parts, picture, **settings):
    from quanttune.host.upscale import upscale

    settings = {"steps": 2, "cfg": 2.0, "tile_size": 64, "overlap": 16, **settings}
    return upscale(*parts, picture, prompt(0), prompt(1), **settings)


def latents(monkeypatch):
    """What is handed to the decoder, in the order of decoding; nothing is decoded any more."""
    from quanttune.host import upscale

    found = []
    monkeypatch.setattr(upscale, "decode_into", lambda *a: found.append(a[2].clone()))
    return found


# what it computes


def noise_of(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pipeline_latents(model, picture, level, steps, cfg, seed, final_alpha_one=True):
    """Latents of diffusers' own pipeline with the weights of ``model``, as the VAE takes them."""
    import comfy.utils
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )

    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=7, out_channels=4, block_out_channels=(32, 64, 64, 128),
        layers_per_block=1, down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"), cross_attention_dim=32,
        attention_head_dim=8, use_linear_projection=True, num_class_embeds=1000,
        only_cross_attention=(True, True, True, False)).eval()
    ours = model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    state = {theirs: ours[name] for theirs, name in names.items() if name in ours}
    state["class_embedding.weight"] = ours["label_emb.weight"]
    unet.load_state_dict(state)
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=final_alpha_one,
                              steps_offset=1, prediction_type="v_prediction")
    pipe = StableDiffusionUpscalePipeline(
        AutoencoderKL(block_out_channels=(32, 32, 32), down_block_types=["DownEncoderBlock2D"] * 3,
                      up_block_types=["UpDecoderBlock2D"] * 3, scaling_factor=0.08333),
        None, None, unet, DDPMScheduler(**betas), scheduler)
    pipe.set_progress_bar_config(disable=True)
    sigma = model.model.model_sampling.sigmas[1 + (steps - 1) * (1000 // steps)]
    # The host begins a schedule below its last timestep with noise * sigma of that timestep.
    start = noise_of((1, 4, *picture.shape[1:3]), seed) * sigma / (1 + sigma ** 2) ** 0.5
    found = pipe(image=picture.movedim(-1, 1), num_inference_steps=steps, guidance_scale=cfg,
                 noise_level=level, generator=torch.Generator().manual_seed(seed - 10),
                 latents=start, prompt_embeds=prompt(0)[0][0],
                 negative_prompt_embeds=prompt(1)[0][0], output_type="latent").images
    return found / 0.08333


@pytest.mark.parametrize("level, size, cfg", [(0, (16, 24), 3.0), (20, (16, 40), 9.0),
                                              (350, (16, 16), 1.0)])
def test_untiled_it_is_diffusers_pipeline(parts, monkeypatch, level, size, cfg):
    """Same weights, same noise, DDIM: equal up to the rounding of float32."""
    with torch.inference_mode(False), torch.no_grad():
        model = small_upscaler()
        expected = pipeline_latents(model, image(*size), level, 5, cfg, 11)
    found = latents(monkeypatch)
    run((model, parts[1]), image(*size), noise_level=level, steps=5, cfg=cfg, seed=11)
    scale = expected.abs().max()
    assert (found[0] - expected).abs().max() / scale < 1e-4
    if level == 20:
        run((model, parts[1]), image(*size), noise_level=21, steps=5, cfg=cfg, seed=11)
        assert (found[1] - expected).abs().max() / scale > 1e-3


def test_what_the_shipped_schedule_of_the_pipeline_differs_by(parts, monkeypatch):
    """Its last step ends at timestep 0 rather than at the clean latent: a hundredth."""
    with torch.inference_mode(False), torch.no_grad():
        model = small_upscaler()
        expected = pipeline_latents(model, image(24, 24), 20, 10, 3.0, 11, final_alpha_one=False)
    found = latents(monkeypatch)
    run((model, parts[1]), image(24, 24), steps=10, cfg=3.0, seed=11)
    assert (found[0] - expected).abs().mean() / expected.abs().mean() < 0.03


@pytest.mark.parametrize("sampler, scheduler", [("euler", "normal"), ("dpmpp_2m_sde", "karras"),
                                                ("euler_ancestral_cfg_pp", "simple")])
def test_untiled_it_is_the_host_own_graph(parts, monkeypatch, sampler, scheduler):
    """SD_4XUpscale_Conditioning and KSampler, bit for bit."""
    import comfy.sample
    from comfy_extras.nodes_sdupscale import SD_4XUpscale_Conditioning

    model, _ = parts
    positive, negative, latent = SD_4XUpscale_Conditioning.execute(
        image(32, 40), prompt(0), prompt(1), 4.0, 20 / 350).args
    noise = comfy.sample.prepare_noise(latent["samples"], 12)
    expected = comfy.sample.sample(model, noise, 4, 2.0, sampler, scheduler, positive, negative,
                                   latent["samples"], seed=12, disable_pbar=True)
    found = latents(monkeypatch)
    run(parts, image(32, 40), steps=4, seed=12, sampler=sampler, scheduler=scheduler)
    assert torch.equal(found[0], expected)


def local(x, sigma, low_res):
    """A prediction for a place that knows nothing of its neighbours."""
    base = torch.cat([low_res, low_res.mean(1, keepdim=True)], 1)
    return 0.08333 * base + torch.tanh(x / (1 + sigma)) / 50


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun", "dpmpp_sde", "uni_pc",
                                     "euler_cfg_pp"])
def test_tiles_of_a_local_model_are_the_whole(parts, monkeypatch, sampler):
    """Nothing but the network itself can make a tile differ: any sampler, any noise."""
    model = predicting(parts[0], local)
    found = latents(monkeypatch)
    for tile in (64, 256):
        run((model, parts[1]), image(150, 100), tile_size=tile, sampler=sampler, cfg=1.5)
    scale = found[1].abs().max()
    assert (found[0] - found[1]).abs().max() / scale < 1e-5


def test_guidance_patches_see_the_whole_latent(parts, monkeypatch):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    model, = RescaleCFG().patch(predicting(parts[0], local), 0.7)
    found = latents(monkeypatch)
    for tile in (64, 256):
        run((model, parts[1]), image(100, 100), tile_size=tile, cfg=4.0)
    assert (found[0] - found[1]).abs().max() / found[1].abs().max() < 1e-5


def test_hooks_of_a_conditioning_act_in_every_tile(parts):
    """A LoRA in a hook gives what the LoRA in the model does, and is gone afterwards."""
    import comfy.hooks
    import comfy.sd

    from quanttune.host.upscale import upscale

    generator = torch.Generator().manual_seed(1)
    name = "diffusion_model.output_blocks.7.0.out_layers.3"
    lora = {f"{name}.lora_up.weight": torch.randn(32, 2, 1, 1, generator=generator),
            f"{name}.lora_down.weight": torch.randn(2, 32, 3, 3, generator=generator)}
    model, vae = small_upscaler(), parts[1]
    picture, settings = image(70, 16), {"steps": 1, "cfg": 2.0, "tile_size": 64}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    expected = upscale(patched, vae, picture, prompt(0), prompt(1), **settings)
    plain = upscale(model, vae, picture, prompt(0), prompt(1), **settings)
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    hooked = [[[c[0], {"hooks": hooks}]] for conds in (prompt(0), prompt(1)) for c in conds]
    found = upscale(model, vae, picture, *hooked, **settings)
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain,
                                                                             atol=1e-2)
    assert torch.equal(plain, upscale(model, vae, picture, prompt(0), prompt(1), **settings))


def test_an_upscaler_in_8_bits(parts, monkeypatch):
    from quanttune.tests.host.models import quantize

    found = latents(monkeypatch)
    packed, _ = quantize(parts[0], 8)
    for model in (parts[0], packed):
        run((model, parts[1]), image(66, 20), steps=1)
    error = (found[1] - found[0]).abs().mean() / found[0].abs().mean()
    assert 0 < error < 0.05


def test_one_tile_is_the_whole_and_memory_is_asked_for_one_tile(parts, monkeypatch):
    import comfy.sampler_helpers

    asked = []
    estimate = comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory",
                        lambda m, shape, c: (asked.append(tuple(shape)), estimate(m, shape, c))[1])
    found = latents(monkeypatch)
    run(parts, image(72, 30), tile_size=72)
    run(parts, image(72, 30), tile_size=512, overlap=64)
    assert torch.equal(found[0], found[1])
    run((predicting(parts[0], local), parts[1]), image(120, 200), tile_size=64, overlap=8)
    assert asked == [(1, 4, 72, 32), (1, 4, 72, 32), (1, 4, 64, 56)]


# no seams


def networklike(x, sigma, low_res):
    """What a UNet does at borders, and more of it: padding and statistics of the tile show."""
    base = torch.cat([low_res, low_res.mean(1, keepdim=True)], 1)
    blurred = torch.nn.functional.avg_pool2d(base, 9, 1, 4)
    spread = base.std((2, 3), keepdim=True) + 0.5
    found = 0.6 * blurred + 0.4 * base - 0.25 * base.mean((2, 3), keepdim=True) / spread
    return 0.08333 * (found + 0.05 * torch.tanh(x / (1 + sigma)))


def hard_cuts(monkeypatch):
    """Each tile replaces what those before it gave, in place of windows."""
    from quanttune.host import tiles

    def windows(size, length, starts):
        ends = [*(b - a for a, b in zip(starts, starts[1:])), length]
        return torch.stack([(torch.arange(length) < end).float() for end in ends])

    monkeypatch.setattr(tiles, "_windows", windows)


def strips(height, width):
    from quanttune.host.tiles import strip

    return strip(height, 64, 16, 8), strip(width, 64, 16, 8)


SEAM = 1.05
"""Differences across tile borders may be so many times as large as elsewhere, as chance has it."""
ADDED = 0.02
"""Of that, what tiling may put in."""


@pytest.mark.parametrize("kind", ["gradient", "flat", "text", "noise"])
def test_no_seam_at_tile_borders(parts, monkeypatch, kind):
    model = predicting(parts[0], networklike)
    picture, where = pictures(160, 208)[kind], strips(160, 208)
    found = latents(monkeypatch)
    settings = {"steps": 3, "cfg": 1.0, "sampler": "euler_ancestral"}
    run((model, parts[1]), picture, **settings, tile_size=256)
    run((model, parts[1]), picture, **settings)
    whole, tiled = (latent[0] for latent in found)
    # A picture may have an edge of its own where a tile has one: what the whole shows there counts.
    assert seam_energy(tiled, *where) <= SEAM * max(1, seam_energy(whole, *where))
    assert added_steps(tiled, whole, *where) <= ADDED
    # Or else this test would see nothing:
    assert not torch.allclose(tiled, whole, atol=0.003)
    hard_cuts(monkeypatch)
    run((model, parts[1]), picture, **settings)
    assert added_steps(found[2][0], whole, *where) > 1.5 * ADDED


def test_no_seam_in_what_a_network_of_random_weights_draws(parts, monkeypatch):
    found = latents(monkeypatch)
    for picture in pictures(96, 72).values():
        run(parts, picture, steps=1, cfg=1.0)
        assert seam_energy(found[-1][0], *strips(96, 72)) <= SEAM


# batches, seeds, shapes


def test_the_same_seed_gives_the_same_image(parts):
    one, two = (run(parts, image(20, 70), seed=4) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, run(parts, image(20, 70), seed=5))
    assert one.shape == (1, 80, 280, 3) and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_an_image_of_a_batch_is_what_it_is_alone(parts, sampler):
    batch = image(12, 66, count=2)
    together = run(parts, batch, seed=7, sampler=sampler)
    for i in range(2):
        alone = run(parts, batch[i:i + 1], seed=7 + i, sampler=sampler)
        assert torch.equal(together[i], alone[0])


def test_after_the_last_seed_comes_the_first(parts):
    """A seed that comes by a link is not held to the widget's range."""
    batch = image(12, 66, count=2)
    first = run(parts, batch[1:], seed=0, steps=1)[0]
    for seed in (2**63 - 1, 2**64 - 1):
        assert torch.equal(run(parts, batch, seed=seed, steps=1)[1], first)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 3), (30, 200), (9, 65), (64, 64)])
def test_any_shape(parts, height, width):
    found = run(parts, image(height, width), steps=1)
    assert found.shape == (1, 4 * height, 4 * width, 3) and torch.isfinite(found).all()


def test_a_very_long_picture(parts, monkeypatch):
    found = latents(monkeypatch)
    run((predicting(parts[0], local), parts[1]), image(4000, 30), steps=1, cfg=1.0)
    assert found[0].shape == (1, 4, 4000, 32) and torch.isfinite(found[0]).all()


def test_no_band_at_the_edges(parts, monkeypatch):
    """A flat picture of an odd size stays as flat at its ends as in its middle."""
    model = predicting(parts[0], local)
    found = latents(monkeypatch)
    run((model, parts[1]), torch.full((1, 67, 75, 3), 0.6), noise_level=0, sampler="euler")
    latent = found[0][0]
    inside = latent[:, 20:47, 20:55]
    for edge in (latent[:, :2], latent[:, -2:], latent[:, :, :2], latent[:, :, -2:]):
        assert (edge.mean((1, 2)) - inside.mean((1, 2))).abs().max() < 0.05 * latent.abs().max()


def test_transparency_is_enlarged_and_grey_becomes_rgb(parts):
    rgba = image(20, 24, channels=4)
    found = run(parts, rgba)
    assert found.shape == (1, 80, 96, 4)
    assert torch.equal(found[..., :3], run(parts, rgba[..., :3]))
    alpha = torch.nn.functional.interpolate(rgba[None, ..., 3], scale_factor=4, mode="bicubic")
    assert torch.equal(found[..., 3], alpha[0].clamp(0, 1))
    grey = rgba[..., :1]
    assert torch.equal(run(parts, grey), run(parts, grey.expand(-1, -1, -1, 3)))


# progress, Stop


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm_adaptive"])
def test_progress_counts_up_to_the_end_with_a_picture_each_step(parts, monkeypatch, sampler):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    told = []
    run((predicting(parts[0], local), parts[1]), image(80, 60, count=2), steps=2, sampler=sampler,
        cfg=1.0, overlap=8, progress=lambda *a: told.append(a))
    done, totals, shown = zip(*told)
    # 2 pictures: 2 steps of 2 tiles, and 2 tiles to decode each.
    assert set(totals) == {2 * (2 * 2 + 2)} and done[-1] == totals[0]
    assert list(done) == sorted(done)
    previews = [picture for picture in shown if picture]
    assert len(previews) == 4 or sampler == "dpm_adaptive"
    assert previews[0][0] == "JPEG" and previews[0][1].size == (60, 80)


def test_stop_between_tiles_leaves_the_model_usable(parts):
    import comfy.model_management as management

    before = run(parts, image(66, 20))

    def stop(done, total, picture):
        if done == 3:
            management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        run(parts, image(66, 20), progress=stop)
    assert not management.processing_interrupted()
    assert torch.equal(before, run(parts, image(66, 20)))
    assert not any("quanttune" in str(key) for kinds in parts[0].wrappers.values()
                   for key in kinds)
