"""The Pareto front of a small MODEL."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_sensitivity import conditioning, measure


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def model():
    return models.small_model()


class Decoder:
    """Stands in for a VAE: the host's IMAGE from the first three channels of a latent."""

    def decode(self, latent):
        pixels = latent[:, :3].movedim(1, -1).sigmoid()
        return pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)


def run(model, vae=None, sensitivity=None, times=None, **candidates):
    from quanttune.host.pareto import Candidates, pareto
    from quanttune.host.sensitivity import SensitivitySettings

    how = SensitivitySettings(forwards=4, samples=8, steps=4)
    return pareto(model, vae, {"samples": torch.zeros(1, 4, 8, 8)}, conditioning(24), [], how,
                  Candidates(**{"bits": (8, 4), "int8": False, "rounds": 1, **candidates}),
                  sensitivity, times=times)


def test_sizes_and_errors(model):
    points = {p.name: p for p in run(model, Decoder(), pictures=2)}
    assert list(points) == ["float", "8 bits", "4 bits"]
    assert points["float"].error == 0 and points["float"].ssim == 1.0
    assert points["8 bits"].error < points["4 bits"].error
    assert points["8 bits"].ssim > points["4 bits"].ssim
    assert 8 < points["8 bits"].bits < 10 and points["float"].bits == 16
    assert all(p.time > 0 for p in points.values())


def test_a_candidate_that_computes_nan_is_a_row(model, monkeypatch):
    from quanttune.host import pareto
    from quanttune.metrics.pareto import chart, csv, front, markdown
    from quanttune.metrics.recommend import recommend

    make = pareto.quantize_model

    def breaking(patcher, spec, **options):
        made, report = make(patcher, spec, **options)
        if spec.bits == 8:
            norm = made.model.diffusion_model.out[0]
            norm.bias = torch.nn.Parameter(torch.full_like(norm.bias, float("nan")), False)
        return made, report

    monkeypatch.setattr(pareto, "quantize_model", breaking)
    points = run(model, Decoder(), pictures=1)
    broken, sound = points[1:]
    assert broken.name == "8 bits" and broken.error != broken.error and broken.ssim is None
    assert sound.error < 1 and 0 < sound.ssim < 1
    assert broken not in front(points) and "| nan% |  |" in markdown(points)
    assert ",nan,," in csv(points) and chart(points).width
    assert "Unusable: 8 bits" in recommend(points)[-1]


class Dark(Decoder):
    """Gives NaN after ``good`` pictures."""

    def __init__(self, good):
        self.good = good

    def decode(self, latent):
        self.good -= 1
        return super().decode(latent) * (1.0 if self.good >= 0 else float("nan"))


def test_pictures_of_nan_alone(model):
    from quanttune.quant import QuantTuneError

    points = run(model, Dark(2), pictures=1)
    assert points[1].ssim is not None and points[1].error < 1
    assert points[2].ssim is None and points[2].error != points[2].error
    with pytest.raises(QuantTuneError, match="float MODEL hold NaN"):
        run(model, Dark(0), pictures=1)


def test_searched_plans_beat_uniform_bits_of_their_size(model):
    found = measure(model, precisions=("8", "4", "2"))
    uniform = {p.name: p for p in run(model)}["4 bits"]
    plan = {p.name: p for p in run(model, sensitivity=found,
                                   budgets=(uniform.bits,))}[f"plan {uniform.bits:g}"]
    assert plan.bits <= uniform.bits and plan.error < uniform.error


@pytest.mark.parametrize("text,expected", [("", ()), ("3, 4 5,3", (3.0, 4.0, 5.0)), ("8", (8.0,))])
def test_budgets(text, expected, comfy_inprocess):
    from quanttune.host.pareto import budgets_of

    assert budgets_of(text) == expected


@pytest.mark.parametrize("options,match", [
    ({"budgets": (4.0,)}, "need a sensitivity"), ({"pictures": 1}, "need a VAE"),
    ({"bits": ()}, "nothing to compare"),
])
def test_refusals(model, options, match):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=match):
        run(model, **options)


@pytest.mark.parametrize("word", ["x", "0", "nan", "17"])
def test_bad_budgets(word):
    from quanttune.host.pareto import budgets_of
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=f"'{word}' among the budgets"):
        budgets_of(f"4, {word}")


def test_a_budget_that_quantizes_nothing_is_told_first(model):
    from quanttune.quant import QuantTuneError

    found = measure(model, precisions=("4",), unit="group")
    with pytest.raises(QuantTuneError, match="16 bits leaves every layer in float"):
        run(model, sensitivity=found, budgets=(5.0, 16.0))


def test_a_quantized_model_is_refused(model):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="quantized already"):
        run(quantize(model)[0])


@pytest.mark.parametrize("word", ["x", "0", "1.5"])
def test_bad_time_budgets(word):
    from quanttune.host.pareto import time_budgets_of
    from quanttune.quant import QuantTuneError

    assert time_budgets_of("0.8, 0.6 0.8") == (0.8, 0.6)
    with pytest.raises(QuantTuneError, match=f"'{word}' among the time budgets"):
        time_budgets_of(f"0.5, {word}")


def test_plans_of_a_time_lie_between_float_and_all_integers(model):
    from quanttune.quant import QuantTuneError
    from quanttune.tests.host.test_layer_times import times_by_size

    found, times = measure(model, precisions=("int8",)), times_by_size(model)
    with pytest.raises(QuantTuneError, match="connect 'Layer Times'"):
        run(model, sensitivity=found, time_budgets=(0.8,))
    with pytest.raises(QuantTuneError, match="need a sensitivity"):
        run(model, times=times, time_budgets=(0.8,))
    with pytest.raises(QuantTuneError, match="budget of 1 leaves every layer in float"):
        run(model, sensitivity=found, times=times, time_budgets=(0.8, 1.0))
    points = {p.name: p for p in run(model, sensitivity=found, times=times, bits=(), int8=True,
                                     time_budgets=(0.9, 0.8))}
    # What is float beside integers, where that differs from the model, is a point of its own.
    assert [n for n in points if not n.startswith("float, ")] == [
        "float", "time plan 0.9", "time plan 0.8", "INT8 products"]
    assert [p.quantized for p in points.values()] == [not n.startswith("float") for n in points]
    assert 0 < points["time plan 0.9"].error < points["time plan 0.8"].error
    assert points["time plan 0.8"].size < points["time plan 0.9"].size < points["float"].size
