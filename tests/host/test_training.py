"""The host's model behind the trainer: losses, recomputation, what it leaves untouched."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def arguments(model, seed=1):
    """Latents, conditions as they come out of the encoder, for a batch of two."""
    found = models.inputs(model, seed=seed)
    with torch.inference_mode(False):
        return found["x"].clone(), {n: found[k].clone() for n, k in (
            ("c_crossattn", "context"), ("y", "y")) if k in found}


def step(denoiser, scales, expert, x, conditions, checkpointing=False):
    """Output and gradients of one pass."""
    scales.zero_grad()
    sigma = denoiser.sigma(torch.full((len(x),), 250.0 * expert + 10))
    out = denoiser.denoise(x, sigma, conditions, scales.select([expert] * len(x)), checkpointing)
    out.square().mean().backward()
    return out.detach(), [p.grad.clone() for p in scales.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_recomputing_activations_changes_nothing(family):
    from quanttune.host.training import checkpoint_units, training_copy
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model(family))
    x, conditions = arguments(quantized)
    with training_copy(quantized) as denoiser:
        scales = TrainableScales(denoiser.shapes, 4)
        plain, kept = step(denoiser, scales, 3, x, conditions)
        again, recomputed = step(denoiser, scales, 3, x, conditions, checkpointing=True)
        names = {type(u).__name__ for u in checkpoint_units(denoiser.base.diffusion_model)}
    assert names == {"ResBlock", "SpatialTransformer"}
    assert torch.equal(plain, again)
    assert len(kept) == 2 and all(torch.equal(a, b) for a, b in zip(kept, recomputed))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in kept)


def test_gradients_are_those_of_eq_5_on_float_weights():
    """Against a float model of the same weights, through finite differences of its output."""
    from quanttune.host.training import training_copy
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model(), bits=8)
    x, conditions = arguments(quantized)
    with training_copy(quantized) as denoiser:
        scales = TrainableScales(denoiser.shapes, 1)
        _, (grad_r, grad_s) = step(denoiser, scales, 0, x, conditions)

        def loss(direction_r, direction_s, h):
            with torch.no_grad():
                scales.r_out[0] += h * direction_r
                scales.s_in[0] += h * direction_s
                sigma = denoiser.sigma(torch.full((len(x),), 10.0))
                out = denoiser.denoise(x, sigma, conditions, scales.select([0, 0]))
                scales.r_out[0] -= h * direction_r
                scales.s_in[0] -= h * direction_s
            return float(out.double().square().mean())

        generator = torch.Generator().manual_seed(0)
        for r, s in ((1, 0), (0, 1)):
            r = r * torch.randn(grad_r.shape, generator=generator)
            s = s * torch.randn(grad_s.shape, generator=generator)
            slope = (loss(r, s, 1e-3) - loss(r, s, -1e-3)) / 2e-3
            expected = float((grad_r * r).sum() + (grad_s * s).sum())
            assert slope == pytest.approx(expected, rel=2e-2)


def test_the_graphs_model_is_not_touched_and_shares_its_integers():
    from quanttune.host.training import training_copy
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model())
    before = models.forward(quantized, models.inputs(quantized))
    x, conditions = arguments(quantized)
    with training_copy(quantized) as denoiser:
        ours = denoiser.base.diffusion_model.out[2].weight._qdata
        theirs = quantized.model.diffusion_model.out[2].weight._qdata
        assert ours.data_ptr() == theirs.data_ptr()
        step(denoiser, TrainableScales(denoiser.shapes, 1), 0, x, conditions, True)
        assert "forward" not in denoiser.base.diffusion_model.input_blocks[1][0].__dict__
    assert torch.equal(models.forward(quantized, models.inputs(quantized)), before)


def test_the_copy_can_be_unloaded_and_loaded_again_while_sampling():
    """A small card makes room for the decoder between two steps, inside inference mode."""
    import comfy.model_management

    from quanttune.host.training import training_copy

    quantized, _ = quantize(models.small_model())
    expected = models.forward(quantized, models.inputs(quantized))
    with training_copy(quantized) as denoiser:
        denoiser.patcher.detach()
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([denoiser.patcher])
            again = models.forward(denoiser.patcher, models.inputs(quantized))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("keep", ["first_last_time", "*attn2*"])
def test_layers_kept_in_float_train_too(keep):
    from quanttune.host.training import training_copy
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model(), keep=keep)
    x, conditions = arguments(quantized)
    with training_copy(quantized) as denoiser:
        scales = TrainableScales(denoiser.shapes, 1, base_scales=denoiser.base_scales)
        _, gradients = step(denoiser, scales, 0, x, conditions, True)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


def test_a_saved_and_loaded_model_trains_alike(tmp_path):
    from quanttune.host.build import load_model, quantized_model
    from quanttune.host.training import training_copy
    from quanttune.quant import save_quantized_unet
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model())
    checkpoint = quantized_model(quantized).checkpoint
    save_quantized_unet(tmp_path / "m.safetensors", checkpoint.layers, checkpoint.floats,
                        checkpoint.metadata)
    loaded = load_model(str(tmp_path / "m.safetensors"), "m")
    x, conditions = arguments(quantized)
    results = []
    for model in (quantized, loaded):
        with training_copy(model) as denoiser:
            results.append(step(denoiser, TrainableScales(denoiser.shapes, 2), 1, x, conditions))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_bfloat16_is_close_to_float():
    from quanttune.host.training import training_copy
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model())
    x, conditions = arguments(quantized)
    gradients = []
    for precision in ("fp32", "bf16"):
        with training_copy(quantized, precision) as denoiser:
            scales = TrainableScales(denoiser.shapes, 1)
            gradients.append(torch.cat(step(denoiser, scales, 0, x, conditions)[1]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.98


def test_class_images_between_forward_and_backward_do_not_confuse_recomputation():
    """Each pass is differentiated before the next one sets other scales (see trainer)."""
    from quanttune.host.training import training_copy
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model())
    x, conditions = arguments(quantized)
    with training_copy(quantized) as denoiser:
        scales = TrainableScales(denoiser.shapes, 2)
        _, alone = step(denoiser, scales, 0, x, conditions, True)
        step(denoiser, scales, 1, x, conditions, True)
        _, again = step(denoiser, scales, 0, x, conditions, True)
    assert all(torch.equal(a, b) for a, b in zip(alone, again))


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION"])
def test_a_perfect_model_has_no_loss(kind):
    """If it could see the noise: the estimate that undoes `noised` is the clean latent."""
    import comfy.model_base

    from quanttune.host.training import HostDenoiser

    model = models.small_model()
    model_type = getattr(comfy.model_base.ModelType, kind)
    model.model.model_type = model_type
    model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config,
                                                                 model_type)
    quantized, _ = quantize(model)
    denoiser = HostDenoiser(quantized, "")
    assert denoiser.kind == {"EPS": "eps", "V_PREDICTION": "v"}[kind]
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    sigma = denoiser.sigma(torch.tensor([0.0, 500.0, 999.9]))
    assert torch.equal(sigma, denoiser.base.model_sampling.sigmas[[0, 500, 999]])
    x = denoiser.noised(clean, noise, sigma)
    assert torch.allclose(x - sigma.view(-1, 1, 1, 1) * noise, clean, atol=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_a_prediction_that_a_node_has_set_counts(before):
    """'ModelSamplingDiscrete' makes a v-prediction model of any."""
    import comfy_extras.nodes_model_advanced as advanced

    from quanttune.host.training import training_copy

    def patched(model):
        return advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]

    with torch.inference_mode():
        model = models.small_model()
        quantized, _ = quantize(patched(model) if before else model)
        quantized = quantized if before else patched(quantized)
    with training_copy(quantized) as denoiser:
        assert denoiser.kind == "v"


class TestRefused:
    def test_latents_of_another_model(self):
        from quanttune.host.encode import from_latents
        from quanttune.quant import QuantTuneError

        with torch.inference_mode():
            quantized, _ = quantize(models.small_model())
            row = [[torch.randn(1, 7, 32), {}]]
            with pytest.raises(QuantTuneError, match="5 channels.*have 4"):
                from_latents({"samples": torch.randn(2, 5, 8, 8)}, row, quantized)
            row[0][0][0, 0, 0] = float("nan")
            with pytest.raises(QuantTuneError, match="conditioning holds NaN"):
                from_latents({"samples": torch.randn(2, 4, 8, 8)}, row, quantized)

    def test_conditioning_of_another_width(self):
        from quanttune.host.training import training_copy
        from quanttune.quant import QuantTuneError

        quantized, _ = quantize(models.small_model())
        x, _ = arguments(quantized)
        wrong = {"c_crossattn": torch.randn(len(x), 7, 5)}
        with training_copy(quantized) as denoiser:
            with pytest.raises(QuantTuneError, match="cannot run on latents.*7, 5"):
                denoiser.denoise(x, torch.ones(len(x)), wrong, {})

    def test_a_float_model(self):
        from quanttune.host.training import training_copy
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match="Quantize UNet"):
            with training_copy(models.small_model()):
                pass

    def test_a_model_with_scales_on_it(self):
        from quanttune.host.routing import apply_scale_set
        from quanttune.host.training import training_copy
        from quanttune.quant import QuantTuneError

        quantized, _ = quantize(models.small_model())
        routed, _ = apply_scale_set(quantized, models.random_scales(quantized), 1.0, "s")
        with pytest.raises(QuantTuneError, match="before 'Apply TuneQDM Scales'"):
            with training_copy(routed):
                pass
