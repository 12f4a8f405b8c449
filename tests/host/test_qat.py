"""Train QAT on a MODEL: it learns, gives true integers, stops, resumes, and refuses."""

import dataclasses

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import models
from quanttune.tests.host.test_calibrate import calibrated, prompts
from quanttune.tests.host.test_dynamic_int8 import (  # noqa: F401
    _inference,
    error,
    models_layers,
    needs_a_backend,
)
from quanttune.tests.host.test_lora import lora_file, with_lora

HOW = {"samples": 16, "steps": 4, "seed": 50}


@pytest.fixture(autouse=True)
def output_folder(tmp_path):
    import folder_paths

    folder_paths.set_output_directory(str(tmp_path))
    return tmp_path


def train(model, source, name="run", latent=None, **settings):
    from quanttune.host.calibrate import Calibration
    from quanttune.host.qat import train_qat
    from quanttune.training.qat import QatTraining

    latent = torch.zeros(1, 4, 16, 16) if latent is None else latent
    config = QatTraining(**{"steps": 6, "warmup_steps": 1, "save_every": 2, "precision": "fp32",
                            **settings})
    return train_qat(model, source, {"samples": latent}, prompts(source), (), Calibration(**HOW),
                     config, name)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_weights_of_a_shifted_flow_model(shift):
    from types import SimpleNamespace

    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    from quanttune.host.qat import HostStudent

    class Sampling(ModelSamplingDiscreteFlow, CONST):
        pass

    sampling = Sampling()
    sampling.set_parameters(shift=shift)
    student = object.__new__(HostStudent)
    student.patcher = SimpleNamespace(model=SimpleNamespace(model_sampling=sampling))
    for sigma in (0.05, 0.3, 0.9):
        given = sampling.timestep(torch.tensor([sigma]))
        student.train, student.record = [0], SimpleNamespace(timesteps=lambda _, t=given: t)
        assert abs(student.weight(0) - sigma**2 / (1 + sigma**2)) < 0.005


@pytest.mark.parametrize("family", ["SD15", "SD20"])
def test_nearly_clean_steps_weigh_little(family):
    from types import SimpleNamespace

    from quanttune.host.qat import HostStudent

    model = models.small_model(family)
    sampling = model.model.model_sampling
    student = object.__new__(HostStudent)
    student.patcher, student.train = model, list(range(1000))
    student.record = SimpleNamespace(timesteps=lambda t: torch.tensor([float(t)]))
    noise = sampling.sigma(torch.tensor([0.0, 300.0, 600.0, 999.0])).square()
    share = noise / (1 + noise)  # of noise in what the model sees
    predicts_noise = model.model.model_type.name == "EPS"
    expected = share if predicts_noise else share * (1 - share)
    found = torch.tensor([student.weight(t) for t in (0, 300, 600, 999)])
    assert torch.allclose(found, expected, rtol=1e-4)
    assert found[0] < 0.01


def test_the_weighting_is_an_option():
    source = models.small_model()
    model, _ = calibrated(source, bits=3, samples=8, steps=4)
    layers = [models.quantized_model(train(model, source, name, weighting=name).model)
              .checkpoint.layers for name in ("picture", "even")]
    assert any(not torch.equal(w.scale, layers[1][n].scale) for n, w in layers[0].items())


def errors(report):
    """Before and after, as the report states them."""
    line = report.splitlines()[1]
    return [float(part.rpartition(" ")[2]) / 100 for part in line.split("%")[:2]]


@pytest.mark.parametrize("settings", [
    {"steps": 20, "learning_rate": 2e-3, "weight_learning_rate": 2e-2},
    {"steps": 20, "learning_rate": 5e-3, "weight_learning_rate": 0.0},
], ids=["weights", "scales"])
def test_the_error_goes_down_with_true_integers(settings):
    source = models.small_model()
    model, _ = calibrated(source, bits=3, samples=8, steps=4)
    outcome = train(model, source, checkpointing=False, **settings)
    before, after = errors(outcome.report)
    assert after < 0.95 * before and outcome.finished
    layers = models.quantized_model(model).checkpoint.layers
    learnt = models.quantized_model(outcome.model).checkpoint.layers
    same = [torch.equal(w.packed, learnt[n].packed) for n, w in layers.items()]
    assert all(same) if not settings["weight_learning_rate"] else not all(same[5:])
    assert not any(torch.equal(w.scale, learnt[n].scale) for n, w in layers.items()
                   if n != "input_blocks.0.0" and n != "out.2")
    models.forward(outcome.model, models.inputs(source))
    multiply = [m for m in models_layers(outcome.model).values() if m.int8 is not None]
    assert len(multiply) == len(layers) - 2


def test_the_source_and_the_reference_stay_as_they_were():
    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    arguments = models.inputs(source)
    expected = [models.forward(m, arguments) for m in (source, model)]
    train(model, source)
    for m, before in zip((source, model), expected):
        assert torch.equal(models.forward(m, arguments), before)
    assert all(m.fake_quant is None for m in models_layers(model).values())


def test_each_layer_of_integers_computes_what_was_trained():
    """One at a time: together, a code that falls on the other side of a half changes all the
    codes after it, and the outputs differ by as much as rounding does."""
    import comfy.model_management

    from quanttune.host import qat
    from quanttune.host.calibrate import Calibration
    from quanttune.host.int8 import OPTION
    from quanttune.host.samples import Samples
    from quanttune.host.training import training_copy

    source = models.small_model()
    model, _ = calibrated(source, bits=4, dynamic_cross_attention=False)
    options = model.model_options["transformer_options"]
    mode = options[OPTION]
    record, _ = qat._recorded(source, Samples({"samples": torch.zeros(1, 4, 16, 16)},
                                              prompts(source), (), Calibration(**HOW)))
    with training_copy(model, "fp32") as denoiser, torch.no_grad():
        student = qat.HostStudent(denoiser, mode, record, range(len(record.calls)),
                                  qat._float_weights(source, mode))
        fakes, layers = dict(student.layers), models_layers(student.patcher)
        assert len(fakes) == len(layers) - 2
        comfy.model_management.load_models_gpu([model])
        for name in [None, *list(fakes)[::6]]:
            for other in fakes:
                layers[other].__dict__.pop("fake_quant", None)
            if name is not None:
                layers[name].__dict__["fake_quant"] = fakes[name]
            fake, _ = student.answer(0, False)
            own = {**options, OPTION: dataclasses.replace(mode, layers=frozenset({name})),
                   "wrappers": {}}
            true = record.again(student.train[0], model, own)
            assert error(fake, true) < 2e-4, name


def test_stopped_and_resumed_it_is_the_same(monkeypatch, output_folder):
    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    whole = train(model, source, "whole")

    from quanttune.host import qat

    with monkeypatch.context() as patch:
        patch.setattr(qat.comfy.model_management, "throw_exception_if_processing_interrupted",
                      lambda: None)
        update = qat.Watcher.__call__

        def stopping(self, progress):
            return update(self, progress) or progress.record.step == 3

        patch.setattr(qat.Watcher, "__call__", stopping)
        stopped = train(model, source, "cut")
    assert not stopped.finished and "queue again" in stopped.report
    assert models.quantized_model(stopped.model).checkpoint.ranges is not None
    resumed = train(model, source, "cut")
    assert resumed.finished
    a, b = ((output_folder / "quanttune_runs" / n / "loss.csv").read_text()
            for n in ("whole", "cut"))
    assert a == b, "the same losses to the last digit"
    assert models.quantized_model(whole.model).fingerprint == models.quantized_model(
        resumed.model).fingerprint


def test_another_calibration_does_not_go_on_with_a_run():
    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    train(model, source, "r", steps=2)
    for settings in ({"timestep_buckets": 2}, {"estimator": "minmax"},
                     {"dynamic_cross_attention": False}):
        other, _ = calibrated(source, bits=4, **settings)
        with pytest.raises(QuantTuneError, match="another base model"):
            train(other, source, "r", steps=2)


def test_a_run_that_another_program_trains_is_left_alone(output_folder):
    from quanttune.training.run_lock import alone

    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    with alone(output_folder / "quanttune_runs" / "r"):
        with pytest.raises(QuantTuneError, match="'r' in .* by another program"):
            train(model, source, "r", steps=2)
    assert not (output_folder / "quanttune_runs" / "r").exists()


def test_a_damaged_state_says_so(output_folder):
    from quanttune.training.state import FILE, load_state, save_state

    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    train(model, source, "r", steps=2)
    folder = output_folder / "quanttune_runs" / "r"
    good = load_state(folder)
    for change in ({"parameters": good["parameters"][:1]}, {"step": None}, {"history": [[1]]},
                   {"origin": []}):
        save_state(folder, {**good, **change})
        with pytest.raises(QuantTuneError, match="damaged.*delete it"):
            train(model, source, "r", steps=2)
    assert (folder / FILE).exists()


@pytest.mark.parametrize(("owners", "held_out"), [
    ([0, 0], 1), ([0, 0, 0], 1), ([i // 20 for i in range(160)], 20),
    ([i // 20 for i in range(60)], 20), ([i % 3 for i in range(9)], 3), ([0] * 80, 10),
], ids=["two steps", "three steps", "eight pictures", "three pictures", "given latents", "one"])
def test_what_is_held_out_is_never_trained_on(owners, held_out):
    from quanttune.host import qat

    train, held = qat._divided(owners)
    assert sorted(train + held) == list(range(len(owners))) and len(held) == held_out
    if len(set(owners)) > 1:
        assert {owners[i] for i in held}.isdisjoint(owners[i] for i in train)
    elif len(owners) == 80:
        assert len({i % 8 for i in held}) > 4, "every step of the sampler is judged"


def test_latents_of_one_picture_are_held_out_together():
    from quanttune.host import qat
    from quanttune.host.calibrate import Calibration
    from quanttune.host.samples import Samples

    source = models.small_model()
    latent = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = Samples({"samples": latent}, prompts(source), (), Calibration(samples=7))
    record, owners = qat._recorded(source, samples)
    assert owners == [0, 1, 2, 0, 1, 2, 0] and len(record.calls) == 7


def test_says_so_when_training_did_not_help():
    source = models.small_model()
    model, _ = calibrated(source, bits=8)
    worse = train(model, source, steps=3, learning_rate=1.0, weight_learning_rate=1.0)
    assert "did not lower it" in worse.report
    before, after = errors(worse.report)
    assert after > before


def test_saved_and_loaded(output_folder):
    from quanttune.host.dynamic_int8 import load_ready
    from quanttune.host.save import save_model

    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    outcome = train(model, source)
    path, _ = save_model(outcome.model, "quanttune/qat")
    loaded = load_ready(path, "qat")
    assert models.quantized_model(loaded).checkpoint.metadata.calibration["trained"] is True
    assert models.quantized_model(loaded).fingerprint == models.quantized_model(
        outcome.model).fingerprint != models.quantized_model(model).fingerprint


def test_latents_of_pictures_teach_too():
    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    latent = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert train(model, source, latent=latent, checkpointing=False).finished


def test_refusals():
    from quanttune.host.dynamic_int8 import dynamic_int8
    from quanttune.host.routing import apply_scale_set
    from quanttune.training.qat import QatTraining

    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    dynamic, _ = dynamic_int8(source, precision="float32")
    for wrong in (source, dynamic):
        with pytest.raises(QuantTuneError, match="needs a MODEL with static ranges"):
            train(wrong, source)
    with pytest.raises(QuantTuneError, match="reference is a quantized"):
        train(model, model)
    with pytest.raises(QuantTuneError, match="LoRA"):
        train(with_lora(model, lora_file(source)), source)
    scaled, _ = apply_scale_set(model, models.random_scales(model), 1.0)
    with pytest.raises(QuantTuneError, match="scales applied already"):
        train(scaled, source)
    with pytest.raises(QuantTuneError, match="does not belong"):
        train(model, models.small_model("SD20"))
    for settings in ({"steps": 0}, {"learning_rate": -1.0}, {"batch_size": 0},
                     {"learning_rate": 0.0, "weight_learning_rate": 0.0}):
        with pytest.raises(QuantTuneError):
            QatTraining(**settings)
    train(model, source, "taken")
    with pytest.raises(QuantTuneError, match="learning_rate = 0.001, and now it is 0.002"):
        train(model, source, "taken", learning_rate=2e-3)


def test_a_reference_that_computes_nan_is_refused():
    source = models.small_model()
    model, _ = calibrated(source, bits=4)
    with torch.no_grad():
        source.model.diffusion_model.out[2].bias[0] = float("nan")
    with pytest.raises(QuantTuneError, match="reference computes NaN"):
        train(model, source)
