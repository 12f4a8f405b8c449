"""Recorded forwards are repeated as they were: timesteps, ControlNets, what patches read."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import models

LATENT = {"samples": torch.zeros(1, 4, 8, 8)}


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def resident_model(dtype=None):
    from quanttune.host.build import resident

    model = resident(models.small_model())
    if dtype is not None:
        model.set_model_compute_dtype(dtype)
    return model


def prompt(model, **extra):
    generator = torch.Generator().manual_seed(5)
    width = model.model.model_config.unet_config["context_dim"]
    return [[torch.randn(1, 7, width, generator=generator), extra]]


def settings(**options):
    from quanttune.host.sensitivity import SensitivitySettings

    return SensitivitySettings(**{"forwards": 4, "samples": 8, "steps": 4, "timestep_buckets": 2,
                                  "precisions": ("8",), "unit": "group", **options})


def recorded(model, positive, **options):
    from quanttune.host.samples import Samples
    from quanttune.host.sensitivity import record_forwards

    how = settings(**options)
    return record_forwards(model, Samples(LATENT, positive, [], how), how.forwards)


def control():
    """A ControlNet that adds a constant in the middle of the UNet."""
    from comfy.controlnet import ControlBase

    class Constant(ControlBase):
        def get_control(self, x, timestep, cond, count, options):
            size = (x.shape[0], 64, x.shape[2] // 2, x.shape[3] // 2)
            return {"middle": [torch.full(size, 3.0)], "output": [None] * 20}

        def copy(self):
            made = Constant()
            self.copy_to(made)
            return made

        def get_models(self):
            return []

        def pre_run(self, *args):
            pass

        def inference_memory_requirements(self, dtype):
            return 0

    return Constant()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_unchanged_model_gives_what_was_recorded(dtype):
    model = resident_model(dtype)
    record = recorded(model, prompt(model))
    assert len(record.calls) == 4
    assert record.error(model) == 0.0


def test_with_a_control_net():
    model = resident_model()
    plain, controlled = (recorded(model, prompt(model, **extra)) for extra in (
        {}, {"control": control(), "control_apply_to_uncond": True}))
    assert not torch.equal(plain.calls[0][2], controlled.calls[0][2]), "it acts"
    assert controlled.error(model) == 0.0
    assert controlled.error(model) == 0.0, "its residuals are there again"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_patches_that_read_what_the_sampler_tells(dtype):
    model = resident_model(dtype)
    seen = []

    def patch(h, options):
        seen.append((float(options["sigmas"][0]), tuple(options["cond_or_uncond"])))
        return h * (1.0 + 0.01 * options["sigmas"][0])

    model.set_model_input_block_patch(patch)
    record = recorded(model, prompt(model))
    before = set(seen)
    seen.clear()
    assert record.error(model) == 0.0 and seen and set(seen) <= before


def test_what_cannot_be_repeated_is_refused():
    """Stands in for a LoRA scheduled by hooks: something that acts only while sampling."""
    model = resident_model()
    sampling = []

    def patch(h, options):
        return h * (0.5 if sampling else 1.0)

    def wrapper(executor, *args, **kwargs):
        sampling.append(1)
        try:
            return executor(*args, **kwargs)
        finally:
            sampling.clear()

    import comfy.patcher_extension

    model.set_model_input_block_patch(patch)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "test", wrapper)
    with pytest.raises(QuantTuneError, match="come out differently.*measure it without"):
        recorded(model, prompt(model))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_prompts_and_steps_share_the_forwards(sampler):
    model = resident_model()
    positive = [prompt(model)[0] for _ in range(2)]
    record = recorded(model, positive, sampler=sampler, forwards=4, samples=8)
    told = [call[1]["transformer_options"] for call in record.calls]
    steps = [int((t["sample_sigmas"][:-1] - t["sigmas"][0]).abs().argmin()) for t in told]
    assert sorted(steps) == [0, 1, 2, 3]


def test_another_model_is_never_answered_from_memory():
    from quanttune.host.sensitivity import layer_sensitivity

    model = resident_model()
    first = layer_sensitivity(model, LATENT, prompt(model), [], settings())
    patched = model.clone()
    patched.set_model_input_block_patch(lambda h, options: h * 0.3)
    second = layer_sensitivity(patched, LATENT, prompt(model), [], settings())
    assert not torch.equal(first.error, second.error)
