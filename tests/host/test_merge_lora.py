"""Merging a LoRA into integers: exact up to the rounding that the report tells."""

import pytest
import torch

from quanttune.tests.host import lora_models, models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


ATTENTION = ("attn1.to_q", "attn2.to_k", "proj_in", "in_layers.2", "skip_connection")


def with_lora(model, quantized, strength=0.7, include=ATTENTION, **options):
    """``(layers, quantized MODEL with them on it)``."""
    from quanttune.host.apply_lora import apply_lora
    from quanttune.host.lora_file import export_lora

    layers = lora_models.random_layers(model, include=include, **options)
    lora = export_lora(layers, model)
    return layers, apply_lora(quantized, None, lora, strength, 0.0)[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("range", ["minmax", "mse"])
def test_integers_are_those_of_the_exact_sum(bits, range):
    from quanttune.host.merge_lora import merge_lora
    from quanttune.quant import QuantizedWeight, QuantSpec

    model = models.small_model()
    quantized, _ = quantize(model, bits)
    layers, patched = with_lora(model, quantized)
    merged, report = merge_lora(patched, range=range)
    before = models.quantized_model(quantized).checkpoint.layers
    after = models.quantized_model(merged).checkpoint.layers
    assert before.keys() == after.keys()
    error = norm = change = kept = 0.0
    for name, weight in after.items():
        layer = layers.get(f"diffusion_model.{name}")
        if layer is None:
            assert weight is before[name]
            continue
        base = before[name].dequantize()
        exact = base + 0.7 * layer.delta()
        expected = QuantizedWeight.quantize(exact, QuantSpec(bits, range=range), before[name].split)
        assert weight.split == before[name].split
        assert torch.allclose(weight.scale, expected.scale, rtol=1e-4)
        got = weight.dequantize()
        error += float((got - exact).square().sum())
        norm += float(exact.square().sum())
        change += float((exact - base).square().sum())
        kept += float(((got - base) * (exact - base)).sum())
    assert len(report.layers) == len(layers) and not merged.patches
    assert report.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert report.relative_change == pytest.approx((change / norm) ** 0.5, rel=1e-3)
    assert report.survived == pytest.approx(kept / change, rel=1e-3)
    assert f"{len(layers)} layers merged and rounded to {bits} bits" in str(report)


@pytest.mark.parametrize("bits,tolerance", [(8, 0.03), (4, 0.5)])
def test_it_answers_as_with_the_lora_beside_the_integers(bits, tolerance):
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model, bits)
    _, patched = with_lora(model, quantized)
    arguments = models.inputs(quantized)
    base, expected = models.forward(quantized, arguments), models.forward(patched, arguments)
    merged, report = merge_lora(patched)
    assert models.relative(models.forward(merged, arguments), expected) < tolerance
    assert models.relative(expected, base) > 2 * tolerance or bits == 4
    # The source, its integers and its LoRA are as they were.
    assert torch.equal(models.forward(quantized, arguments), base)
    assert torch.equal(models.forward(patched, arguments), expected)
    assert 0.9 < report.survived < 1.1


def test_more_bits_for_what_changes_only():
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model, 4)
    layers, patched = with_lora(model, quantized)
    four, eight = merge_lora(patched)[1], merge_lora(patched, 8)
    assert eight[1].relative_error < four.relative_error / 8
    for name, weight in models.quantized_model(eight[0]).checkpoint.layers.items():
        assert weight.bits == (8 if f"diffusion_model.{name}" in layers else 4)
    assert "rounded to 8 bits" in str(eight[1])


def test_symmetric_layers_stay_symmetric():
    from quanttune.host.merge_lora import merge_lora
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec

    model = models.small_model()
    quantized, _ = quantize_model(model, QuantSpec(8, symmetric=True))
    merged, _ = merge_lora(with_lora(model, quantized)[1])
    assert all(w.symmetric for w in models.quantized_model(merged).checkpoint.layers.values())


def test_a_lora_smaller_than_the_rounding_says_so():
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model, 3)
    _, patched = with_lora(model, quantized, 0.01)
    assert "Rounding loses most of the LoRA" in str(merge_lora(patched)[1])
    assert "loses most" not in str(merge_lora(with_lora(model, quantized)[1], 8)[1])


def test_several_loras_and_merges_of_any_loader():
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model, 8)
    _, one = with_lora(model, quantized)
    _, two = with_lora(model, one, -0.4, seed=9, include=("attn1.to_q",))
    other = models.small_model(seed=7)
    key = "diffusion_model.middle_block.1.proj_in.weight"
    two.add_patches({key: other.get_key_patches("diffusion_model.")[key]}, 0.3, 0.7)
    arguments = models.inputs(quantized)
    merged, _ = merge_lora(two)
    assert models.relative(models.forward(merged, arguments),
                           models.forward(two, arguments)) < 0.03


def test_float_layers_and_biases_are_merged_in_float():
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model, keep="first_last")
    patched = quantized.clone()
    patched.add_patches({"diffusion_model.out.2.weight": ("diff", (torch.ones(4, 32, 3, 3),)),
                         "diffusion_model.out.0.bias": ("diff", (torch.ones(32),))}, 0.1)
    arguments = models.inputs(quantized)
    expected = models.forward(patched, arguments)
    merged, report = merge_lora(patched)
    assert report.floats == 2 and not report.layers
    assert "2 tensors merged in float, no integers changed" in str(report)
    assert models.relative(models.forward(merged, arguments), expected) < 1e-6


def test_dora_is_merged_as_the_host_applies_it():
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model, 8)
    _, patched = with_lora(model, quantized, 1.0, dora=True, amount=0.05)
    arguments = models.inputs(quantized)
    merged, _ = merge_lora(patched)
    assert models.relative(models.forward(merged, arguments),
                           models.forward(patched, arguments)) < 0.05


def test_saved_and_loaded_it_is_the_same(host_folders):
    from quanttune.host.build import load_model
    from quanttune.host.merge_lora import merge_lora
    from quanttune.host.save import save_model

    model = models.small_model()
    quantized, _ = quantize(model)
    merged, _ = merge_lora(with_lora(model, quantized)[1])
    arguments = models.inputs(quantized)
    path, _ = save_model(merged, "merged")
    loaded = load_model(path)
    assert torch.equal(models.forward(loaded, arguments), models.forward(merged, arguments))
    own = models.quantized_model
    assert own(loaded).fingerprint == own(merged).fingerprint != own(quantized).fingerprint
    facts = own(loaded).checkpoint.metadata.provenance
    assert facts["merged_lora"]["layers"] > 10 and facts["source"] == "model"


def test_scales_stay_applied():
    from quanttune.host.merge_lora import merge_lora, notes
    from quanttune.host.routing import OPTION, apply_scale_set

    model = models.small_model()
    quantized, _ = quantize(model, 8)
    routed, _ = apply_scale_set(quantized, models.random_scales(quantized), 1.0)
    _, patched = with_lora(model, routed)
    merged, _ = merge_lora(patched)
    arguments = models.inputs(quantized)
    expected = models.forward(patched, arguments)
    assert models.relative(models.forward(merged, arguments), expected) < 0.03
    assert merged.model_options["transformer_options"][OPTION].model is merged.model
    assert "stay applied" in notes(patched)[0]
    plain = merge_lora(with_lora(model, quantized)[1])[0]
    assert models.relative(models.forward(plain, arguments), expected) > 0.05
    assert not notes(quantized)


def test_integer_products_go_on_without_calibrated_ranges():
    from quanttune.host.dynamic_int8 import dynamic_int8
    from quanttune.host.int8 import OPTION, Int8Mode
    from quanttune.host.merge_lora import merge_lora, notes
    from quanttune.quant.int8 import ActivationRanges

    model = models.small_model()
    quantized, _ = quantize(model, 8)
    layer = "middle_block.1.proj_in"
    ranges = ActivationRanges({layer: torch.tensor([[[-9.0, 9.0]]])})
    models.quantized_model(quantized).checkpoint.ranges = ranges
    integers, _ = dynamic_int8(quantized, precision="float32")
    _, patched = with_lora(model, integers)
    options = patched.model_options["transformer_options"]
    options[OPTION] = Int8Mode(frozenset([layer]), None, ranges, quantized.model, "")
    merged, _ = merge_lora(patched)
    mode = merged.model_options["transformer_options"][OPTION]
    assert mode.ranges is None and mode.model is merged.model and mode.layers == {layer}
    assert options[OPTION].ranges is ranges
    checkpoint = models.quantized_model(merged).checkpoint
    assert checkpoint.ranges is None and not checkpoint.metadata.calibration
    assert "run 'Calibrate INT8' again" in notes(patched)[0]
    arguments = models.inputs(model)
    options[OPTION] = mode
    assert models.relative(models.forward(merged, arguments),
                           models.forward(patched, arguments)) < 0.05


def test_stopping_leaves_everything_as_it_was(monkeypatch):
    import comfy.model_management as mm

    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model)
    _, patched = with_lora(model, quantized)
    arguments = models.inputs(quantized)
    before = models.forward(patched, arguments)
    count = iter(range(100))

    def interrupt():
        if next(count) == 5:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        merge_lora(patched)
    monkeypatch.undo()
    assert torch.equal(models.forward(patched, arguments), before)


def test_a_lora_of_strength_zero_changes_nothing():
    from quanttune.host.merge_lora import merge_lora

    model = models.small_model()
    quantized, _ = quantize(model)
    _, patched = with_lora(model, quantized)
    patched.patches = {k: [(0.0, *p[1:]) for p in v] for k, v in patched.patches.items()}
    merged, report = merge_lora(patched)
    assert report.unchanged == len(patched.patches) and "changes nothing" in str(report)
    before = models.quantized_model(quantized).checkpoint.layers
    assert all(w is before[n] for n, w in models.quantized_model(
        merged).checkpoint.layers.items())


@pytest.mark.parametrize("case,message", [
    ("float", "is not quantized by QuantTune"), ("bare", "has no LoRA on it"),
    ("bypass", "bypass LoRA, which cannot be merged"), ("nan", "NaN or infinite values of the la"),
    ("bits", "The bit width is 5"), ("range", "The range method is")])
def test_what_cannot_be_merged(case, message):
    import comfy.sd

    from quanttune.host.lora_file import export_lora
    from quanttune.host.merge_lora import merge_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    quantized, _ = quantize(model)
    options = {"bits": {"bits": 5}, "range": {"range": "other"}}.get(case, {})
    if case == "float":
        quantized = with_lora(model, model)[1]
    elif case == "bypass":
        lora = export_lora(lora_models.random_layers(model), model)
        quantized, _ = comfy.sd.load_bypass_lora_for_models(quantized, None, lora, 1.0, 0.0)
    elif case == "nan":
        quantized = quantized.clone()
        quantized.add_patches({"diffusion_model.out.2.weight": (
            "diff", (torch.full((4, 32, 3, 3), float("nan")),))})
    elif case != "bare":
        quantized = with_lora(model, quantized)[1]
    with pytest.raises(QuantTuneError, match=message) as caught:
        merge_lora(quantized, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
