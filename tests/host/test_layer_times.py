"""Layer times and plans of a time on MODELs: what is timed, what then multiplies integers."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_dynamic_int8 import (  # noqa: F401
    _inference,
    error,
    fast,
    models_layers,
    needs_a_backend,
)
from quanttune.tests.host.test_lora import lora_file, with_lora
from quanttune.tests.host.test_sensitivity import conditioning
from quanttune.tests.host.test_sensitivity import measure as sensitivity_of

THIN = {"input_blocks.0.0", "out.2"}


@pytest.fixture
def model():
    return models.small_model()


def measure(model, width=24, latent=None, positive=None, **options):
    from quanttune.host.layer_times import layer_times

    latent = {"samples": torch.zeros(1, 4, 16, 16)} if latent is None else latent
    positive = conditioning(width, 1) if positive is None else positive
    return layer_times(model, latent, positive, [],
                       **{"rounds": 1, "precision": "float32", **options})


def times_by_size(model, factor=0.5, rest=1.0):
    """Times as if seconds were weights and integers took ``factor`` of them; the starter's and the
    small models' own depend on the machine."""
    from quanttune.host.quantize import quantizable_layers
    from quanttune.metrics.layer_times import LayerTimes

    layers = quantizable_layers(model.model)
    shapes = {n: tuple(m.weight.shape) for n, m in layers.items()}
    floats = {n: 1e-6 * m.weight.numel() for n, m in layers.items()}
    integers = {n: None if n in THIN else factor * s for n, s in floats.items()}
    return LayerTimes(shapes, floats, integers, (1 + rest) * sum(floats.values()), "float32")


def multiplying(patcher):
    """Names of the layers that multiplied integers in the last forward."""
    return {n for n, m in models_layers(patcher).items() if m.int8 is not None}


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_every_layer_of_a_family_has_its_times(family, monkeypatch):
    source = models.small_model(family)
    positive = conditioning(24, 1)
    if family == "SDXL":
        # What the family makes of sizes and pooled text is 2816 wide, the small model's 40.
        monkeypatch.setattr(type(source.model), "encode_adm", lambda *a, **k: torch.zeros(1, 40))
    found = measure(source, positive=positive)
    assert {n for n, s in found.integers.items() if s is None} == THIN
    assert all(s > 0 for s in found.floats.values())
    assert all(s > 0 for n, s in found.integers.items() if n not in THIN)
    assert found.step > 0 and found.share(()) == 1.0
    assert found.precision == "float32" and "float is float32" in found.setting


def test_layers_of_one_shape_are_measured_once_and_calls_are_counted(model, monkeypatch):
    from quanttune.host import layer_times

    step = [1000.0]

    def one_second_each(ways, rounds, wait, least, before):
        for run in ways.values():
            run()
        return {**dict.fromkeys(ways, 1.0), layer_times.STEP: step[0]}

    monkeypatch.setattr(layer_times, "take_turns", one_second_each)
    modules = models_layers_of(model)
    found = measure(model)
    assert set(found.floats) == set(modules)
    step[0] = len(modules) / 2
    scaled = measure(model)
    assert set(scaled.floats.values()) == {0.5} and scaled.rest == 0.0, "no more than the step"
    assert "2.00 x the time of the whole step" in scaled.setting
    assert set(found.floats.values()) == {1.0}, "each is called once a step"
    shared = [n for n in modules if n.endswith((".to_q", ".to_out.0")) and "attn1" in n]
    assert len(shared) > 2
    assert int(found.setting.split("rounds, ")[1].split(" kinds")[0]) < len(modules) - len(shared)


def models_layers_of(model):
    from quanttune.host.quantize import quantizable_layers

    return quantizable_layers(model.model)


def test_float_is_float_and_integers_are_integers(model, monkeypatch):
    """What is timed is what the model would compute: the same outputs, of both ways."""
    from quanttune.host import layer_times

    seen, timed = {}, layer_times._timed

    def look(case, ready):
        run = timed(case, ready)
        name = next(iter(case.calls))
        seen[name, ready is None] = run()
        if ready is not None:
            assert ready.layer.backend.name
        return run

    monkeypatch.setattr(layer_times, "_timed", look)
    measure(model)
    names = {n for n, _ in seen} - THIN
    assert len(names) > 10
    for name in names:
        exact, integers = seen[name, True], seen[name, False]
        assert 0 < error(integers, exact) < 0.1, name


def test_the_model_is_left_as_it_was(model):
    arguments = models.inputs(model)
    before = models.forward(model, arguments)
    measure(model, precision="bfloat16")
    assert torch.equal(models.forward(model, arguments), before)
    patched = with_lora(model, lora_file(model))
    before = models.forward(patched, arguments)
    measure(patched)
    assert torch.equal(models.forward(patched, arguments), before)


def test_the_model_that_is_timed_computes_the_same_with_its_lora(model):
    from quanttune.host.quantize import float_model

    patched = with_lora(model, lora_file(model))
    arguments = models.inputs(model)
    assert error(models.forward(patched, arguments), models.forward(model, arguments)) > 0.15
    again = models.forward(float_model(patched), arguments)
    assert error(again, models.forward(patched, arguments)) < 1e-5


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_the_layers_of_the_plan_are_those_that_multiply_integers(model, share):
    from quanttune.host.plan import bit_plan

    times = times_by_size(model)
    found = sensitivity_of(model, precisions=("int8",))
    plan, report = bit_plan(model, "searched", found, 5.0, times, "time", share)
    wanted = {n for n, bits in plan.bits.items() if bits == 8}
    assert wanted and wanted < set(plan.bits) and not wanted & THIN
    assert times.share(wanted) <= share
    assert f"Expected time with 'Dynamic INT8': {times.share(wanted):.2f}" in report
    assert f"{len(wanted)} of {len(plan.bits)} layers multiply" in report
    assert "Expected error" in report
    integers, note = fast(model, plan=plan)
    arguments = models.inputs(model)
    models.forward(integers, arguments)
    assert multiplying(integers) == wanted
    held = set(models.quantized_model(integers).checkpoint.layers)
    assert held == wanted, "the others are floats"
    assert f"{len(wanted)} of {len(plan.bits)} layers multiply integers" in note


@pytest.mark.parametrize("base", ["float", "4"])
def test_images_of_integer_products_are_laid_out_as_a_larger_weight_is(model, base):
    """Else the weight is brought into their layout in every call."""
    from quanttune.host.quantize import float_model

    source = float_model(model) if base == "float" else quantize(model, 4)[0]
    models.forward(source, models.inputs(source))
    layer = models_layers(source)["middle_block.0.in_layers.2"]
    for size, first in ((4, True), (64, False)):
        x = torch.randn(1, layer.in_channels, size, size)
        assert (x.numel() < layer.weight.numel()) is first
        y = layer(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous() is first
        assert error(y, layer(x)) < 1e-5


def test_a_plan_on_a_quantized_model_chooses_of_its_layers(model):
    from quanttune.quant.plan import BitPlan

    quantized, _ = quantize(model, 8)
    names = list(models_layers_of(model))
    plan = BitPlan({n: 8 if ".attn1." in n else 0 for n in names})
    integers, note = fast(quantized, plan=plan)
    models.forward(integers, models.inputs(model))
    assert multiplying(integers) == {n for n in names if ".attn1." in n}
    assert "takes longer than the plan expects" in note


def test_recommendations_are_plans_for_integer_products_too(model):
    from quanttune.host.plan import bit_plan
    from quanttune.quant.plan import PRESETS

    times = times_by_size(model)
    plan, report = bit_plan(model, PRESETS[1], None, 5.0, times)
    integers, _ = fast(model, plan=plan)
    models.forward(integers, models.inputs(model))
    convolutions = {n for n, m in models_layers_of(model).items()
                    if isinstance(m, torch.nn.Conv2d)} - THIN
    assert multiplying(integers) == convolutions
    assert f"{times.share(convolutions):.2f} of a step" in report


@pytest.mark.parametrize("share", [0.76, 0.85])
def test_the_expected_error_is_that_of_the_starter(share):
    """Within a factor of 1.5 of what the plan's model has on the same forwards."""
    import comfy.model_management

    from quanttune.host.plan import bit_plan
    from quanttune.host.samples import Samples
    from quanttune.host.sensitivity import (
        SensitivitySettings,
        layer_sensitivity,
        record_forwards,
    )
    from quanttune.metrics.time_plan import time_plan
    from quanttune.starter.load import load_starter

    model, clip, _ = load_starter()
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red star on a blue background"))
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    how = SensitivitySettings(precisions=("int8",), unit="group", forwards=3, samples=3, steps=3,
                              timestep_buckets=1)
    found = layer_sensitivity(model, latent, positive, [], how)
    times = times_by_size(model)
    plan, report = bit_plan(model, "searched", found, 5.0, times, "time", share)
    _, expected = time_plan(found, times, share)
    assert 0 < len(plan.kept()) < len(plan.bits)
    assert f"Expected error of the output: {100 * expected:.1f} %" in report
    record = record_forwards(model, Samples(latent, positive, [], how), 3)
    integers, _ = fast(model, plan=plan)
    comfy.model_management.load_models_gpu([integers])
    measured = record.error(integers)
    assert expected / 1.5 < measured < 1.5 * expected, (expected, measured)


def test_the_hosts_stop_ends_it(model):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        measure(model)
    assert measure(model).step > 0


class TestRefused:
    def test_models_and_inputs(self, model):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match="quantized already"):
            measure(quantize(model)[0])
        with pytest.raises(QuantTuneError, match="no prompt"):
            measure(model, positive=[])
        with pytest.raises(QuantTuneError, match="rounds is 0"):
            measure(model, rounds=0)
        with pytest.raises(QuantTuneError, match="precision is 'float64'"):
            measure(model, precision="float64")
        with pytest.raises(QuantTuneError, match="cannot run on latents of shape"):
            measure(model, width=5)
        bypass = with_lora(model, lora_file(model), bypass=True)
        with pytest.raises(QuantTuneError, match="bypass LoRA.*use .Load LoRA."):
            measure(bypass)

    def test_a_machine_without_integers(self, model, monkeypatch):
        from quanttune.host import int8
        from quanttune.quant import QuantTuneError

        monkeypatch.setattr(int8, "BACKENDS", [])
        with pytest.raises(QuantTuneError, match="not available on cpu for any layer"):
            measure(model)

    def test_plans(self, model):
        from quanttune.host.plan import bit_plan
        from quanttune.quant import QuantTuneError

        found = sensitivity_of(model, precisions=("8", "int8"), unit="group")
        times = times_by_size(model)
        with pytest.raises(QuantTuneError, match="connect 'Layer Times'"):
            bit_plan(model, "searched", found, 5.0, None, "time")
        with pytest.raises(QuantTuneError, match=r"at least 0\.7[5-9]\.$"):
            bit_plan(model, "searched", found, 5.0, times, "time", 0.5)
        with pytest.raises(QuantTuneError, match="budget is 'money'"):
            bit_plan(model, "searched", found, 5.0, times, "money")
        other = times_by_size(models.small_model("SDXL"))
        with pytest.raises(QuantTuneError, match="times were measured on a model with other"):
            bit_plan(model, "searched", found, 16.0, other, "size")
        only = sensitivity_of(model, precisions=("8",), unit="group")
        with pytest.raises(QuantTuneError, match="switch on 'int8'"):
            bit_plan(model, "searched", only, 5.0, times, "time")
        plan, report = bit_plan(model, "searched", found, 5.0, times, "time", 1.0)
        assert plan.kept() == set(plan.bits) and "use the model as it is" in report
        with pytest.raises(QuantTuneError, match="make one for less time"):
            fast(model, plan=plan)

    def test_what_dynamic_int8_cannot_follow(self, model):
        from quanttune.quant import QuantTuneError
        from quanttune.quant.plan import BitPlan

        names = list(models_layers_of(model))
        plan = BitPlan(dict.fromkeys(names, 8))
        with pytest.raises(QuantTuneError, match="set layers to 'all'"):
            fast(model, "convolutions", plan=plan)
        with pytest.raises(QuantTuneError, match="layers of 2 and 4 bits; use it in 'Quantize"):
            fast(model, plan=BitPlan({names[0]: 4, names[1]: 2, names[2]: 8}))
        with pytest.raises(QuantTuneError, match="names layer 'nowhere'"):
            fast(model, plan=BitPlan({"nowhere": 8}))
        quantized, _ = quantize(model, 8, keep=names[1])
        with pytest.raises(QuantTuneError, match="with the plan 'one'"):
            fast(quantized, plan=BitPlan({names[1]: 8}, "one"))
