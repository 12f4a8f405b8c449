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
    assert check(model, starter).faults == [], "alone it computes, and the picture tells"


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


def test_the_node(starter, host_folders):
    nodes = pack_nodes()
    output = run_node(nodes["QuantTuneCheckModel"], model=quantized(starter, 8), clip=starter[1],
                      vae=starter[2], size=64, steps=2)
    report, usable, picture = output.args
    assert usable is True and report.startswith("The model is usable")
    assert picture.shape == (1, 64, 64, 3) and {"images", "text"} <= set(output.ui)


def test_refusals(starter):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="not quantized"):
        check(starter[0], starter)
    model = quantized(starter, 8)
    with pytest.raises(QuantTuneError, match="reference is quantized"):
        check(model, starter, reference=model)
