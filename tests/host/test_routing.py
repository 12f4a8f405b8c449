"""Timestep-routed scales on a MODEL: eq. 5-6, batches, clones, strengths, blends, bad input."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def apply(model, scales, strength=1.0, name="subject.safetensors"):
    from quanttune.host.routing import apply_scale_set

    return apply_scale_set(model, scales, strength, name)[0]


def materialised(quantized, scales, expert, strength=1.0, family="SD15"):
    """A float MODEL with ``r_out * W * s_in`` of one expert written out (eq. 5)."""
    model = models.small_model(family)
    checkpoint = models.quantized_model(quantized).checkpoint
    state = dict(checkpoint.floats)
    modules = dict(model.model.diffusion_model.named_modules())
    for name, weight in checkpoint.layers.items():
        pair = scales.layers[name]
        r_out = 1 + strength * (pair.r_out[expert] - 1)
        s_in = 1 + strength * (pair.s_in[expert] - 1)
        full = weight.dequantize()
        out = full.shape[0]
        per_input = r_out[:out].view(-1, 1).expand(out, full.shape[1]).clone()
        if weight.split:
            per_input[:, weight.split:] = r_out[out:].view(-1, 1)
        per_input = per_input * s_in[: full.shape[1]]
        assert getattr(modules[name], "groups", 1) == 1
        state[f"{name}.weight"] = full * per_input.view(*per_input.shape, *[1] * (full.ndim - 2))
    model.model.diffusion_model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("timestep,expert", [(0.0, 0), (249.0, 0), (250.0, 1), (500.0, 2),
                                              (999.0, 3)])
def test_one_expert_equals_eq_5_written_out(family, timestep, expert):
    quantized, _ = quantize(models.small_model(family))
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized, (timestep, timestep))
    expected = models.forward(materialised(quantized, scales, expert, family=family), arguments)
    got = models.forward(apply(quantized, scales), arguments)
    assert models.relative(got, expected) < 1e-5


def test_mixed_timesteps_in_a_batch_equal_single_runs():
    quantized, _ = quantize(models.small_model())
    routed = apply(quantized, models.random_scales(quantized))
    arguments = models.inputs(quantized, (999.0, 600.0, 300.0, 20.0, 301.0))
    together = models.forward(routed, arguments)
    for i in range(5):
        single = {k: v[i:i + 1] for k, v in arguments.items()}
        assert models.relative(models.forward(routed, single), together[i:i + 1]) < 1e-5


def test_the_base_and_other_clones_stay_as_they_were():
    quantized, _ = quantize(models.small_model())
    arguments = models.inputs(quantized)
    base = models.forward(quantized, arguments)
    first = apply(quantized, models.random_scales(quantized, seed=1))
    second = apply(quantized, models.random_scales(quantized, seed=2))
    a, b = models.forward(first, arguments), models.forward(second, arguments)
    assert models.relative(a, base) > 1e-3 and models.relative(a, b) > 1e-3
    assert torch.equal(models.forward(quantized, arguments), base)
    assert torch.equal(models.forward(first, arguments), a)
    # One copy of the integers serves all three.
    assert first.model is quantized.model and second.model is quantized.model


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.7, -1.0])
def test_strength_interpolates_between_base_and_trained(strength):
    quantized, _ = quantize(models.small_model())
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized, (700.0, 700.0))
    expected = models.forward(materialised(quantized, scales, 2, strength), arguments)
    assert models.relative(models.forward(apply(quantized, scales, strength), arguments),
                           expected) < 1e-5


def test_chained_sets_add_up_whatever_their_number_of_experts():
    from quanttune.quant import LayerScales, ScaleSet

    quantized, _ = quantize(models.small_model())
    one = models.random_scales(quantized, num_experts=3, seed=1)
    two = models.random_scales(quantized, num_experts=4, seed=2)
    summed = ScaleSet({
        n: LayerScales(*(1 + 0.5 * (getattr(one.layers[n], k)[1:2] - 1)
                         + 2.0 * (getattr(two.layers[n], k)[2:3] - 1) for k in ("r_out", "s_in")))
        for n in one.layers}, 1)
    arguments = models.inputs(quantized, (550.0,))
    chained = apply(apply(quantized, one, 0.5), two, 2.0)
    swapped = apply(apply(quantized, two, 2.0), one, 0.5)
    expected = models.forward(apply(quantized, summed), arguments)
    assert models.relative(models.forward(chained, arguments), expected) < 1e-5
    assert models.relative(models.forward(swapped, arguments), expected) < 1e-5


def test_peqa_is_the_case_without_input_scales():
    quantized, _ = quantize(models.small_model())
    peqa = models.random_scales(quantized, num_experts=1, with_s_in=False)
    assert peqa.num_parameters == sum(v.r_out.numel() for v in peqa.layers.values())
    arguments = models.inputs(quantized)
    assert models.relative(models.forward(apply(quantized, peqa), arguments),
                           models.forward(quantized, arguments)) > 1e-3


def test_layers_kept_in_float_take_scales_too():
    quantized, _ = quantize(models.small_model(), keep="first_last")
    scales = models.random_scales(quantized)
    assert "out.2" in scales.layers
    arguments = models.inputs(quantized)
    routed = models.forward(apply(quantized, scales), arguments)
    expected = models.forward(quantized, arguments)
    assert models.relative(routed, expected) > 1e-3


def test_switching_expert_allocates_no_weight():
    from quanttune.host.routing import OPTION

    quantized, _ = quantize(models.small_model("SDXL"))
    routed = apply(quantized, models.random_scales(quantized))
    largest = max(w.numel for w in models.quantized_model(quantized).checkpoint.layers.values())
    router = routed.model_options["transformer_options"][OPTION]
    with torch.profiler.profile(profile_memory=True) as profile:
        router.resolve(torch.tensor([999.0]))
        router.resolve(torch.tensor([1.0]))
    biggest = max((e.cpu_memory_usage for e in profile.events()), default=0)
    assert 0 < biggest < largest


def test_composes_with_another_wrapper_and_the_function_wrapper():
    quantized, _ = quantize(models.small_model())
    routed = apply(quantized, models.random_scales(quantized)).clone()
    arguments = models.inputs(quantized)
    expected = models.forward(routed, arguments)
    order = []

    def other(executor, *args, **kwargs):
        order.append("other")
        return executor(*args, **kwargs)

    routed.add_wrapper_with_key("diffusion_model", "other", other)
    assert torch.equal(models.forward(routed, arguments), expected) and order == ["other"]


class TestBadInput:
    @pytest.mark.parametrize("strength", [float("nan"), float("inf")])
    def test_strength(self, strength):
        from quanttune.quant import QuantTuneError

        quantized, _ = quantize(models.small_model())
        with pytest.raises(QuantTuneError, match=r"'subject.safetensors': The strength"):
            apply(quantized, models.random_scales(quantized), strength)

    def test_another_family_is_refused(self):
        from quanttune.quant import QuantTuneError

        small, _ = quantize(models.small_model("SD15"))
        large, _ = quantize(models.small_model("SDXL"))
        with pytest.raises(QuantTuneError, match=r"'subject.safetensors' does not fit.*base"):
            apply(small, models.random_scales(large))

    def test_another_base_of_the_same_shape_warns(self):
        from quanttune.host.routing import apply_scale_set

        first, _ = quantize(models.small_model(seed=0))
        second, _ = quantize(models.small_model(seed=5))
        mark = models.quantized_model(first).fingerprint
        scales = models.random_scales(first, base_fingerprint=mark, base_name="first")
        assert apply_scale_set(first, scales, 1.0, "s")[1] == []
        _, warnings = apply_scale_set(second, scales, 1.0, "s")
        assert len(warnings) == 1 and "another base" in warnings[0]

    def test_missing_layers_warn_and_stay_as_in_the_base(self):
        from quanttune.host.routing import apply_scale_set
        from quanttune.quant import ScaleSet

        quantized, _ = quantize(models.small_model())
        full = models.random_scales(quantized)
        some = ScaleSet(dict(list(full.layers.items())[:3]), 4)
        _, warnings = apply_scale_set(quantized, some, 1.0, "s")
        assert "no scales for" in warnings[0]


@pytest.mark.parametrize("sampling,timesteps,index", [
    ("ModelSamplingDiscrete", [0.0, 499.0, 500.0, 999.0], [0, 0, 1, 1]),
    ("ModelSamplingDiscreteFlow", [0.0, 499.0, 500.0, 1000.0], [0, 0, 1, 1]),
    ("ModelSamplingFlux", [0.0, 0.49, 0.5, 1.0], [0, 0, 1, 1]),
])
def test_every_kind_of_timestep_reaches_its_expert(sampling, timesteps, index):
    import comfy.model_sampling

    from quanttune.host.routing import timestep_units
    from quanttune.quant import expert_index

    kind = type("Sampling", (getattr(comfy.model_sampling, sampling), comfy.model_sampling.EPS), {})
    convert, total = timestep_units(kind(None))
    assert expert_index(convert(torch.tensor(timesteps)), 2, total).tolist() == index


def test_edm_timesteps_follow_the_sigma_table():
    import comfy.model_sampling

    from quanttune.host.routing import timestep_units
    from quanttune.quant import expert_index

    kind = type("S", (comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EPS),
                {})
    sampling = kind(None)
    convert, total = timestep_units(sampling)
    t = sampling.timestep(sampling.sigmas[[0, total // 2 - 1, total // 2, total - 1]])
    assert expert_index(convert(t), 2, total).tolist() == [0, 0, 1, 1]


def test_control_residuals_act_as_on_the_float_model():
    quantized, _ = quantize(models.small_model())
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized, (700.0, 700.0))
    generator = torch.Generator().manual_seed(4)
    # What a ControlNet hands the UNet: residuals for the middle and the output blocks.
    middle = torch.randn(2, 64, 8, 8, generator=generator)
    outputs = [torch.randn(2, 32, 16, 16, generator=generator)]

    def control():
        return {"input": [], "middle": [middle.clone()], "output": [o.clone() for o in outputs]}

    float_model = materialised(quantized, scales, 2)
    expected = models.forward(float_model, {**arguments, "control": control()})
    routed = apply(quantized, scales)
    got = models.forward(routed, {**arguments, "control": control()})
    assert models.relative(got, expected) < 1e-5
    assert models.relative(got, models.forward(routed, arguments)) > 1e-3
