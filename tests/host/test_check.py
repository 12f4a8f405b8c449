"""Check Quantized Model: what it says of good models, bad ones and broken ones."""

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def starter(comfy_inprocess):
    with torch.inference_mode():
        return run_node(pack_nodes()["QuantTuneLoadStarterModel"]).args


def quantized(starter, bits, **options):
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec

    return quantize_model(starter[0], QuantSpec(bits), **options)[0]


def check(model, starter, **options):
    from quanttune.host.check import check_model
    from quanttune.host.pictures import SamplingSettings

    return check_model(model, *starter[1:], "a red star on a blue background",
                       SamplingSettings(64, 64, 2), **options)


def test_a_good_model(starter):
    found = check(quantized(starter, 8), starter, reference=starter[0])
    assert found.faults == [] and found.report.startswith("The model is usable.")
    assert "120 layers in 8 bits" in found.report and "as good as float" in found.report
    assert found.picture.shape == (1, 64, 64, 3) and "MiB above them" in found.report


def test_two_bits_are_not_usable_beside_float(starter):
    model = quantized(starter, 2)
    found = check(model, starter, reference=starter[0])
    assert "NOT usable" in found.report and "away from the float model's" in found.report
    assert found.picture is None
    alone = check(model, starter)
    assert alone.faults == [] and alone.verdict == (
        "The model computes; how good it is was not measured (connect the float model as "
        "reference).")


def test_damaged_tensors_are_named(starter):
    from quanttune.host.build import quantized_model

    model = quantized(starter, 8)
    layers = quantized_model(model).checkpoint.layers
    names = sorted(layers)[:2]
    layers[names[0]].scale[0] = float("nan")
    layers[names[1]].zero_point[0] = 1e6
    report = check(model, starter).report
    assert f"layer {names[0]} has scales" in report and f"layer {names[1]} has zero" in report


def test_a_model_that_computes_nan(starter):
    model = quantized(starter, 8)
    norm = model.model.diffusion_model.out[0]
    # In place of the bias, which the float model shares.
    norm.bias = torch.nn.Parameter(torch.full_like(norm.bias, float("nan")), False)
    found = check(model, starter)
    assert "NaN or infinite at 98%" in found.report and found.picture is None


def test_a_reference_that_computes_nan_measures_nothing(starter):
    reference = starter[0].clone()
    reference.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * float("nan"))
    found = check(quantized(starter, 8), starter, reference=reference)
    assert found.faults == [] and found.verdict.endswith(
        "was not measured (the reference computes NaN or infinite values itself).")


@pytest.mark.parametrize("plain,faults,told", [
    ((True, False), ["its picture is of one colour, and the float model's is not"], ""),
    ((True, True), [], "of one colour, as the float model's is"), ((False, True), [], "look at it"),
])
def test_a_plain_picture_is_a_fault_where_floats_is_not(starter, monkeypatch, plain, faults, told):
    from quanttune.host import check as module

    model, sample = quantized(starter, 8), module.sample_pictures

    def painted(patcher, *args):
        picture = sample(patcher, *args)
        # Of one colour, not of one grey: its channels differ.
        colour = torch.tensor([1.0, 0.0, 0.3]).expand_as(picture)
        return colour if plain[patcher is not model] else picture

    monkeypatch.setattr(module, "sample_pictures", painted)
    found = check(model, starter, reference=starter[0])
    assert found.faults == faults and told in found.report


def test_a_plain_picture_alone_is_no_fault(starter, monkeypatch):
    from quanttune.host import check as module

    monkeypatch.setattr(module, "sample_pictures", lambda *args: torch.ones(1, 64, 64, 3))
    found = check(quantized(starter, 8), starter)
    assert found.faults == [] and "look whether the prompt asks for that" in found.report


def test_the_node(starter, host_folders):
    nodes = pack_nodes()
    output = run_node(nodes["QuantTuneCheckModel"], model=quantized(starter, 8), clip=starter[1],
                      vae=starter[2], size=64, steps=2)
    report, usable, picture = output.args
    assert usable is True and report.startswith("The model computes; how good it is was not mea")
    assert picture.shape == (1, 64, 64, 3) and {"images", "text"} <= set(output.ui)


def test_refusals(starter):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="not quantized"):
        check(starter[0], starter)
    model = quantized(starter, 8)
    with pytest.raises(QuantTuneError, match="reference is quantized"):
        check(model, starter, reference=model)
