"""Layer sensitivity on a MODEL: against quantizing that layer by hand, resuming, refusals."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def model():
    return models.small_model()


def conditioning(width=32, rows=2):
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(1, 7, width, generator=generator), {}] for _ in range(rows)]


def measure(model, latent=None, positive=None, **options):
    from quanttune.host.sensitivity import SensitivitySettings, layer_sensitivity

    width = model.model.model_config.unet_config["context_dim"]
    how = SensitivitySettings(**{"forwards": 4, "samples": 8, "steps": 4, "timestep_buckets": 2,
                                 **options})
    latent = {"samples": torch.zeros(1, 4, 8, 8)} if latent is None else latent
    return layer_sensitivity(model, latent, conditioning(width) if positive is None else positive,
                             [], how)


@pytest.mark.parametrize("layer", ["input_blocks.0.0", "middle_block.1.proj_in"])
def test_as_quantizing_that_layer_alone(model, layer):
    from quanttune.host.quantize import quantizable_layers
    from quanttune.host.samples import Samples
    from quanttune.host.sensitivity import SensitivitySettings, record_forwards
    from quanttune.quant import QuantSpec

    found = measure(model, precisions=("4",))
    width = model.model.model_config.unet_config["context_dim"]
    how = SensitivitySettings(forwards=4, samples=8, steps=4)
    samples = Samples({"samples": torch.zeros(1, 4, 8, 8)}, conditioning(width), [], how)
    record = record_forwards(model, samples, 4)
    rest = set(quantizable_layers(model.model)) - {layer}
    from quanttune.host.quantize import quantize_model

    alone, _ = quantize_model(model, QuantSpec(4, range="mse"), rest)
    squared = []
    for index, (_, _, output) in enumerate(record.calls):
        y = record.again(index, alone, alone.model_options["transformer_options"]).float()
        squared.append(float((y - output).square().sum() / output.square().sum()))
    row = list(found.units).index(layer)
    expected = sum(squared) / len(squared)
    assert float(found.mean()[row, 0]) == pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_as_it_was(model):
    arguments = models.inputs(model)
    before = models.forward(model, arguments)
    measure(model, precisions=("2", "int8"), unit="group")
    assert torch.equal(models.forward(model, arguments), before)


def test_fewer_bits_hurt_more_and_buckets_are_filled(model):
    found = measure(model, precisions=("8", "4", "2"))
    mean = found.mean().sum(0)
    assert mean[0] < mean[1] < mean[2]
    assert sum(found.forwards) == 4 and min(found.forwards) > 0
    assert not found.error.isnan().any()


def test_given_latents_are_noised_to_all_timesteps(model):
    latent = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    found = measure(model, latent, precisions=("4",), unit="group", samples=40)
    assert found.forwards == (2, 2)


def test_an_output_that_is_not_finite_counts_as_the_worst(model, monkeypatch):
    from quanttune.host import sensitivity

    sensitivity._DONE.clear()
    again = sensitivity.Replay.again
    monkeypatch.setattr(sensitivity.Replay, "again", lambda *args: again(*args) * float("nan"))
    found = measure(model, precisions=("2",), unit="group")
    sensitivity._DONE.clear()
    assert float(found.mean().min()) == sensitivity.BROKEN


def test_models_that_the_host_streams_are_measured_on_a_copy(model, monkeypatch):
    """Stands in for dynamic VRAM, which needs a card: its patcher says that it streams."""
    import comfy.model_patcher

    from quanttune.host import sensitivity

    copies = []

    class Streaming(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    model.__class__ = Streaming
    model.cached_patcher_init = (
        lambda disable_dynamic: copies.append(disable_dynamic) or models.small_model(), ())
    sensitivity._DONE.clear()
    measure(model, precisions=("4",), unit="group")
    assert copies == [True]


def test_groups_hold_every_layer_once(model):
    from quanttune.host.quantize import quantizable_layers

    found = measure(model, precisions=("4",), unit="group")
    names = [n for layers in found.units.values() for n in layers]
    assert sorted(names) == sorted(quantizable_layers(model.model))
    assert len(found.units) < 12


def test_integer_products_count_the_activations_too(model):
    found = measure(model, precisions=("8", "int8"))
    assert float(found.mean()[:, 1].sum()) > float(found.mean()[:, 0].sum())


def test_stopped_it_goes_on(model, monkeypatch):
    import comfy.model_management as management

    from quanttune.host import sensitivity

    sensitivity._DONE.clear()
    measured, errors, pressed = [], sensitivity._errors, []

    def count(*args):
        measured.append(1)
        if len(measured) == 5 and not pressed:
            pressed.append(1)
            management.interrupt_current_processing(True)
        return errors(*args)

    monkeypatch.setattr(sensitivity, "_errors", count)
    with pytest.raises(management.InterruptProcessingException):
        measure(model, precisions=("4",))
    assert len(measured) == 5
    found = measure(model, precisions=("4",))
    assert len(measured) == len(found.units) + 1, "the fifth was cut off"
    measured.clear()
    again = measure(model, precisions=("4",))
    assert len(measured) == len(found.units), "a finished one is forgotten"
    assert torch.equal(again.error, found.error)


def test_stopped_it_does_not_go_on_for_a_model_that_was_patched_since(model, monkeypatch):
    import comfy.model_management as management

    from quanttune.host import sensitivity

    def amplified(h, skipped, options):
        return 0.3 * h, 2.0 * skipped

    patched = model.clone()
    patched.set_model_output_block_patch(amplified)
    sensitivity._DONE.clear()
    alone = measure(patched, precisions=("4",), unit="group")
    errors, seen = sensitivity._errors, []

    def stopping(*args):
        seen.append(1)
        if len(seen) == 5:
            raise management.InterruptProcessingException()
        return errors(*args)

    with monkeypatch.context() as context:
        context.setattr(sensitivity, "_errors", stopping)
        with pytest.raises(management.InterruptProcessingException):
            measure(model, precisions=("4",), unit="group")
    assert len(next(iter(sensitivity._DONE.values()))) == 4
    after = measure(patched, precisions=("4",), unit="group")
    assert torch.equal(after.error, alone.error)


def test_the_plan_makes_a_model_of_its_size(model, host_folders):
    from quanttune.host.build import load_model, quantized_model
    from quanttune.host.plan import bit_plan
    from quanttune.host.quantize import quantize_model
    from quanttune.host.save import save_model
    from quanttune.quant import QuantSpec

    found = measure(model, precisions=("8", "4", "2"))
    plan, report = bit_plan(model, "searched", found, 6.0)
    assert "6 bits a weight, searched" in report and "Expected error" in report
    mixed, _ = quantize_model(model, QuantSpec(4, range="mse"), plan=plan)
    layers = quantized_model(mixed).checkpoint.layers
    assert {n: w.bits for n, w in layers.items()} == {n: b for n, b in plan.bits.items() if b}
    assert len({w.bits for w in layers.values()}) > 1
    arguments = models.inputs(model)
    expected = models.forward(model, arguments)
    uniform, _ = quantize(model, 4)
    assert models.relative(models.forward(mixed, arguments), expected) < models.relative(
        models.forward(uniform, arguments), expected)
    path, _ = save_model(mixed, "mixed")
    assert torch.equal(models.forward(load_model(path), arguments),
                       models.forward(mixed, arguments))


def test_presets_need_no_sensitivity(model):
    from quanttune.host.plan import bit_plan
    from quanttune.quant.plan import PRESETS

    for preset in PRESETS:
        plan, report = bit_plan(model, preset, None, 5.0)
        assert preset in report and "Expected" not in report


class TestRefused:
    def test_a_quantized_model(self, model):
        from quanttune.host.plan import bit_plan
        from quanttune.quant import QuantTuneError

        quantized, _ = quantize(model)
        with pytest.raises(QuantTuneError, match="quantized already"):
            measure(quantized)
        with pytest.raises(QuantTuneError, match="quantized already"):
            bit_plan(quantized, "searched", None, 5.0)

    @pytest.mark.parametrize("options,match", [
        ({"precisions": ()}, "No precision"), ({"precisions": ("5",)}, "no precision '5'"),
        ({"unit": "block"}, "unit is 'block'"), ({"forwards": 0}, "forwards is 0"),
        ({"sampler": "best"}, "no sampler 'best'"), ({"scheduler": "best"}, "no scheduler 'best'"),
    ])
    def test_settings(self, model, options, match):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match=match):
            measure(model, **options)

    def test_no_prompt_and_nan(self, model):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match="no prompt"):
            measure(model, positive=[])
        wrong = conditioning(model.model.model_config.unet_config["context_dim"])
        wrong[0][0][:] = float("nan")
        with pytest.raises(QuantTuneError, match="NaN or infinite values already in float"):
            measure(model, positive=wrong)

    def test_a_plan_of_or_for_another_model(self, model):
        from quanttune.host.plan import bit_plan
        from quanttune.host.quantize import quantize_model
        from quanttune.quant import QuantSpec, QuantTuneError
        from quanttune.quant.plan import BitPlan

        other = models.small_model("SD21" if "SD21" in models.FAMILIES else "SDXL")
        found = measure(model, precisions=("4",), unit="group")
        with pytest.raises(QuantTuneError, match="model with other layers"):
            bit_plan(other, "searched", found, 5.0)
        with pytest.raises(QuantTuneError, match="needs a sensitivity"):
            bit_plan(model, "searched", None, 5.0)
        with pytest.raises(QuantTuneError, match="names layer 'nowhere'"):
            quantize_model(model, QuantSpec(4), plan=BitPlan({"nowhere": 4}))
        kept = dict.fromkeys(found.shapes, 0)
        with pytest.raises(QuantTuneError, match="plan 'plan' keeps every layer"):
            quantize_model(model, QuantSpec(4), plan=BitPlan(kept))
