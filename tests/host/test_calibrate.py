"""Calibrate INT8 on a MODEL: ranges, buckets, rounding, resuming, files, and what it refuses."""

import json

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_dynamic_int8 import (  # noqa: F401
    _inference,
    error,
    models_layers,
    needs_a_backend,
)
from quanttune.tests.host.test_lora import lora_file, with_lora

FEW = {"samples": 4, "steps": 2, "precision": "float32", "timestep_buckets": 4}


def prompts(model, count=2, seed=5):
    """CONDITIONING of random prompts, as a text encoder would give it."""
    config = model.model.model_config.unet_config
    generator = torch.Generator().manual_seed(seed)
    width = config.get("adm_in_channels")
    extra = {"pooled_output": torch.randn(1, 1280, generator=generator)} if width else {}
    return [[torch.randn(1, 7, config["context_dim"], generator=generator), extra]
            for _ in range(count)]


def calibrated(model, latent=None, **settings):
    """``(MODEL, report)``."""
    from quanttune.host.calibrate import Calibration, calibrate

    latent = torch.zeros(1, 4, 16, 16) if latent is None else latent
    return calibrate(model, {"samples": latent}, prompts(model), (),
                     Calibration(**{**FEW, **settings}))


def ranges_of(model):
    return models.quantized_model(model).checkpoint.ranges


def output_error(report):
    """The error that the report states for static ranges."""
    line = next(s for s in report.splitlines() if s.startswith("Output error"))
    return float(line.partition("forwards: ")[2].partition("%")[0]) / 100


@pytest.mark.parametrize("family", ["SD15", "SD20"])
def test_a_float_model_gets_static_ranges(family):
    source = models.small_model(family)
    model, report = calibrated(source, dynamic_cross_attention=False)
    arguments = models.inputs(source)
    expected = models.forward(source, arguments)
    assert error(models.forward(model, arguments), expected) < 0.15
    layers = models_layers(model)
    static = {n for n, m in layers.items() if m.int8 is not None and m.int8.layer.static}
    assert len(static) == len(layers) - 2, "all but the convolutions of 4 channels"
    assert f"{len(layers)} of {len(layers)} layers have static ranges" in report
    assert output_error(report) < 0.03


@pytest.mark.parametrize(("samples", "told"), [(4, "Only 1 of 3 prompts"), (12, None)])
def test_says_which_prompts_had_no_turn(samples, told):
    from quanttune.host.calibrate import Calibration, calibrate

    model = models.small_model()
    _, report = calibrate(model, {"samples": torch.zeros(1, 4, 8, 8)}, 3 * prompts(model)[:1], (),
                          Calibration(**{**FEW, "samples": samples, "steps": 4}))
    assert f"with {1 if told else 3} prompts" in report
    assert ("samples = 12 would use all" in report) is bool(told)
    assert told is None or told in report


def test_ranges_that_follow_the_noise_level_are_closer():
    errors = [output_error(calibrated(models.small_model(), timestep_buckets=n)[1])
              for n in (1, 4)]
    assert errors[1] < 0.5 * errors[0]


def test_cross_attention_stays_dynamic_unless_asked():
    model, _ = calibrated(models.small_model())
    names = ranges_of(model).layers
    assert names and not any("attn2" in n for n in names)
    models.forward(model, models.inputs(model))
    layer = next(m for n, m in models_layers(model).items() if n.endswith("attn2.to_k"))
    assert layer.int8 is not None and layer.int8.layer.static is None


def test_every_bucket_has_the_ranges_of_its_own_timesteps():
    model, _ = calibrated(models.small_model(), samples=8, steps=8, timestep_buckets=4,
                          estimator="minmax")
    ranges = ranges_of(model)
    assert ranges.num_buckets == 4
    assert any(not torch.equal(r[0], r[3]) for r in ranges.layers.values())
    layers = models_layers(model)
    name = next(iter(ranges.layers.keys() - {"input_blocks.0.0"}))
    seen = []
    for timestep in (10.0, 300.0, 999.0):
        models.forward(model, models.inputs(model, (timestep,)))
        seen.append(layers[name].int8.layer.static)
    assert seen == [ranges.select((b,))[name] for b in (0, 1, 3)]
    models.forward(model, models.inputs(model, (10.0, 999.0)))
    assert layers[name].int8.layer.static == ranges.select((0, 3))[name]


def test_a_bucket_without_steps_takes_the_nearest():
    model, _ = calibrated(models.small_model(), samples=2, steps=2, timestep_buckets=50)
    ranges = ranges_of(model)
    assert all(bool((r[..., 1] > r[..., 0]).all()) for r in ranges.layers.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_model_keeps_its_integers(bits):
    quantized, _ = quantize(models.small_model(), bits)
    before = models.quantized_model(quantized).checkpoint
    model, _ = calibrated(quantized)
    after = models.quantized_model(model).checkpoint
    assert after.layers is before.layers and before.ranges is None and after.ranges is not None
    assert models.quantized_model(model).fingerprint == models.quantized_model(
        quantized).fingerprint
    models.forward(quantized, models.inputs(quantized))
    assert all(m.int8 is None for m in models_layers(quantized).values()), "source unchanged"


@pytest.mark.parametrize("bits", [4, 3])
def test_error_feedback_brings_the_output_nearer(bits):
    from quanttune.starter.load import load_starter

    model, clip, _ = load_starter()
    from quanttune.host.calibrate import Calibration, calibrate
    from quanttune.host.samples import conditioning_of

    positive, negative = conditioning_of(
        clip, "a red striped star on a blue background\na small green circle, white background",
        None, None)
    errors = {}
    for rounding in ("nearest", "gptq"):
        _, report = calibrate(model, {"samples": torch.zeros(1, 4, 16, 16)}, positive, negative,
                              Calibration(samples=20, steps=10, cfg=5.0, bits=bits,
                                          rounding=rounding, precision="float32"))
        errors[rounding] = output_error(report)
    assert errors["gptq"] < 0.75 * errors["nearest"]


def test_static_is_close_to_dynamic_on_the_starter():
    from quanttune.host.calibrate import Calibration, calibrate
    from quanttune.host.samples import conditioning_of
    from quanttune.starter.load import load_starter

    model, clip, _ = load_starter()
    positive, negative = conditioning_of(clip, "a red striped star on a blue background", None,
                                         None)
    _, report = calibrate(model, {"samples": torch.zeros(1, 4, 16, 16)}, positive, negative,
                          Calibration(samples=20, cfg=5.0, precision="float32",
                                      timestep_buckets=4))
    assert output_error(report) < 0.03


def test_latents_of_pictures_are_noised_over_the_whole_schedule():
    model = models.small_model()
    latent = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    model, report = calibrated(model, latent, samples=12, timestep_buckets=4, estimator="minmax")
    assert "12 noised latents" in report
    ranges = ranges_of(model).layers["input_blocks.0.0"]
    assert len({tuple(r.flatten().tolist()) for r in ranges}) == 4, "every interval was met"


def test_saved_and_loaded_it_multiplies_integers_at_once(tmp_path):
    import folder_paths

    from quanttune.host.dynamic_int8 import load_ready
    from quanttune.host.save import save_model

    folder_paths.set_output_directory(str(tmp_path))
    model, _ = calibrated(models.small_model(), timestep_buckets=2)
    path, _ = save_model(model, "quanttune/static")
    loaded = load_ready(path, "static")
    arguments = models.inputs(model)
    assert torch.equal(models.forward(loaded, arguments).float(),
                       models.forward(with_precision(model, loaded), arguments).float())
    facts = models.quantized_model(loaded).checkpoint.metadata.calibration
    assert facts["timestep_buckets"] == 2 and facts["estimator"] == "mse"
    assert json.dumps(facts)


def test_loaded_it_is_what_was_calibrated(tmp_path):
    import folder_paths

    from quanttune.host.dynamic_int8 import load_ready
    from quanttune.host.save import save_model

    folder_paths.set_output_directory(str(tmp_path))
    quantized, _ = quantize(models.small_model(), 8)
    model, _ = calibrated(quantized, layers="convolutions", precision="float32")
    arguments = models.inputs(model)
    expected = models.forward(model, arguments)
    path, _ = save_model(model, "quanttune/static")
    loaded = load_ready(path, "static")
    assert torch.equal(models.forward(loaded, arguments), expected)
    counts = [sum(m.int8 is not None for m in models_layers(m_).values()) for m_ in (model, loaded)]
    assert counts[0] == counts[1] > 0


def test_scales_that_calibration_did_not_see_take_ranges_of_the_moment():
    from quanttune.host.dynamic_int8 import dynamic_int8
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model(), 8)
    scales = models.random_scales(quantized, num_experts=2, amount=0.3)
    static, _ = calibrated(quantized, dynamic_cross_attention=False)
    arguments = models.inputs(static)

    def run(model):
        output = models.forward(model, arguments)
        return output, any(m.int8 is not None and m.int8.layer.static
                           for m in models_layers(model).values())

    routed, uses_ranges = run(apply_scale_set(static, scales, 1.0)[0])
    moment, _ = run(apply_scale_set(dynamic_int8(static, precision="float32",
                                                 ranges="dynamic")[0], scales, 1.0)[0])
    assert not uses_ranges and torch.equal(routed, moment)
    assert run(static)[1], "without them it takes its own again"
    seen, _ = calibrated(apply_scale_set(quantized, scales, 1.0)[0], dynamic_cross_attention=False)
    assert run(seen)[1], "scales that were there keep the ranges"


@pytest.mark.parametrize("bits", [8, None], ids=["quantized", "float"])
def test_a_lora_that_calibration_did_not_see_takes_ranges_of_the_moment(bits):
    from quanttune.host.dynamic_int8 import dynamic_int8

    source = models.small_model()
    lora = lora_file(source)
    base = source if bits is None else quantize(source, bits)[0]
    static, _ = calibrated(base, dynamic_cross_attention=False)
    arguments = models.inputs(static)

    def run(model):
        output = models.forward(model, arguments)
        return output, any(m.int8 is not None and m.int8.layer.static
                           for m in models_layers(model).values())

    moment, _ = run(with_lora(dynamic_int8(static, precision="float32", ranges="dynamic")[0], lora))
    changed, uses_ranges = run(with_lora(static, lora))
    assert not uses_ranges and torch.equal(changed, moment)
    assert run(static)[1], "without it takes its own again"
    assert not run(with_lora(static, lora))[1] and run(static)[1], "at every change"
    seen, _ = calibrated(with_lora(base, lora), dynamic_cross_attention=False)
    assert run(seen)[1], "a LoRA that was there keeps the ranges"
    assert not run(with_lora(seen, lora_file(source, seed=6)))[1], "another one beside it"
    assert not run(with_lora(static, lora, bypass=True))[1] and run(static)[1], "a bypass LoRA"


def with_precision(model, like):
    from quanttune.host.dynamic_int8 import dynamic_int8

    dtype = like.model.manual_cast_dtype or like.model.get_dtype()
    return dynamic_int8(model, precision=str(dtype).removeprefix("torch."))[0]


def test_dynamic_int8_after_it_chooses_the_ranges():
    from quanttune.host.dynamic_int8 import dynamic_int8

    model, _ = calibrated(models.small_model())
    moment, note = dynamic_int8(model, precision="float32", ranges="dynamic")
    again, static_note = dynamic_int8(model, precision="float32")
    assert "calibrated ranges" in static_note and "calibrated ranges" not in note
    arguments = models.inputs(model)
    assert torch.equal(models.forward(again, arguments), models.forward(model, arguments))
    assert not torch.equal(models.forward(moment, arguments), models.forward(model, arguments))
    models.forward(moment, arguments)
    layers = models_layers(moment)
    assert any(m.int8 is not None for m in layers.values())
    assert not any(m.int8 is not None and m.int8.layer.static for m in layers.values())


def test_interrupted_it_goes_on_and_finds_the_same(tmp_path, monkeypatch):
    import folder_paths

    from quanttune.host import calibration_run as module

    folder_paths.set_output_directory(str(tmp_path))
    source = models.small_model()
    settings = {"samples": 6, "steps": 2, "bits": 4, "rounding": "gptq"}
    whole, _ = calibrated(source, **settings)
    run, runs = module.Samples.run, []

    def failing(self, patcher, index, callback=None):
        runs.append(index)
        if len(runs) == 5:
            raise KeyboardInterrupt
        run(self, patcher, index, callback)

    monkeypatch.setattr(module.Samples, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, **settings)
    (state,) = (tmp_path / "quanttune_runs" / ".calibration").iterdir()
    resumed, report = calibrated(source, **settings)
    # Three samples for the weights and one for ranges before the interrupt, two after it, and the
    # forwards that are compared had been lost with the process.
    assert runs[:5] == [0, 1, 2, 0, 1] and runs[5:] == [1, 2]
    assert not state.exists(), "nothing is left when it is done"
    for name, ranges in ranges_of(whole).layers.items():
        assert torch.equal(ranges, ranges_of(resumed).layers[name])
    assert models.quantized_model(whole).fingerprint == models.quantized_model(resumed).fingerprint
    assert 0 < output_error(report) < 1


def test_a_damaged_state_is_done_again(tmp_path, monkeypatch):
    import folder_paths

    from quanttune.host import calibration_run as module

    folder_paths.set_output_directory(str(tmp_path))
    source, key = models.small_model(), []
    monkeypatch.setattr(module.CalibrationRun, "forget", lambda self: key.append(self.folder))
    calibrated(source)
    key[0].mkdir(parents=True)
    (key[0] / "checkpoint.pt").write_bytes(b"not a state")
    model, _ = calibrated(source)
    assert ranges_of(model).layers


@pytest.mark.parametrize("state", [
    {}, {"done": "x", "observers": None, "weights": {}},
    {"done": 1, "observers": {}, "weights": {}}, {"done": 1, "observers": None, "weights": {}},
    {"done": 0, "observers": None, "weights": {"a": {}}},
])
def test_a_state_of_wrong_content_is_done_again(state, tmp_path, monkeypatch):
    import folder_paths

    from quanttune.host import calibration_run as module
    from quanttune.training.state import save_state

    folder_paths.set_output_directory(str(tmp_path))
    source, key = models.small_model(), []
    with monkeypatch.context() as patch:
        patch.setattr(module.CalibrationRun, "forget", lambda self: key.append(self.folder))
        clean, _ = calibrated(source)
    save_state(key[0], state)
    model, _ = calibrated(source)
    for name, ranges in ranges_of(clean).layers.items():
        assert torch.equal(ranges, ranges_of(model).layers[name])


def test_what_changes_the_observations_changes_the_state(tmp_path):
    from quanttune.host.calibrate import Calibration
    from quanttune.host.identity import identity_of
    from quanttune.host.samples import Samples

    source = models.small_model()
    other = source.clone()
    sampling = source.model.model_sampling
    changed = type(sampling)(source.model.model_config)
    changed.set_sigmas(sampling.sigmas * 2)
    other.add_object_patch("model_sampling", changed)
    assert identity_of(other) != identity_of(source)
    keys = set()
    for pooled in (0.0, 5.0):
        entry = [torch.zeros(1, 7, 24), {"pooled_output": torch.full((1, 8), pooled)}]
        samples = Samples({"samples": torch.zeros(1, 4, 8, 8)}, [entry], (), Calibration())
        keys.add(repr(samples.key()))
    assert len(keys) == 2


@pytest.mark.parametrize("shape", [(1, 4, 3, 16, 16), (4, 16, 16), (1, 3, 16, 16)])
@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_latents_of_another_shape(shape, fill):
    if fill == 0.0 and shape[:2] == (1, 3):
        calibrated(models.small_model(), torch.full(shape, fill))  # the host fills in channels
        return
    with pytest.raises(QuantTuneError, match="shape"):
        calibrated(models.small_model(), torch.full(shape, fill))


def test_conditioning_of_another_width():
    from quanttune.host.calibrate import Calibration, calibrate

    with pytest.raises(QuantTuneError, match="conditioning"):
        calibrate(models.small_model(), {"samples": torch.zeros(1, 4, 16, 16)},
                  [[torch.zeros(1, 7, 33), {}]], (), Calibration(**FEW))


def test_a_lora_is_part_of_what_is_observed():
    source = models.small_model()
    patched = with_lora(source, lora_file(source))
    model, report = calibrated(patched, estimator="minmax")
    assert model.patches, "the LoRA is still there"
    plain, _ = calibrated(source, estimator="minmax")
    assert any(not torch.equal(r, ranges_of(plain).layers[n])
               for n, r in ranges_of(model).layers.items())
    assert output_error(report) < 0.06
    arguments = models.inputs(source)
    assert error(models.forward(model, arguments), models.forward(patched, arguments)) < 0.15


def test_input_scales_are_part_of_what_is_observed():
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model(), 8)
    scales = models.random_scales(quantized, num_experts=2, amount=0.3)
    routed, _ = apply_scale_set(quantized, scales, 1.0)
    model, report = calibrated(routed, dynamic_cross_attention=False)
    assert output_error(report) < 0.06


def test_a_model_that_multiplies_integers_already():
    from quanttune.host.dynamic_int8 import dynamic_int8

    fast, _ = dynamic_int8(models.small_model(), precision="float32")
    model, report = calibrated(fast)
    assert ranges_of(model) and output_error(report) < 0.06


def test_nan_is_refused_and_says_where():
    source = models.small_model()
    with torch.no_grad():
        source.model.diffusion_model.input_blocks[1][0].in_layers[2].bias[3] = float("nan")
    with pytest.raises(QuantTuneError, match="Layer '.*' cannot be calibrated: .*NaN"):
        calibrated(source)


def test_refusals():
    from quanttune.host.calibrate import Calibration, calibrate
    from quanttune.host.samples import conditioning_of

    source = models.small_model()
    zeros = {"samples": torch.zeros(1, 4, 16, 16)}
    with pytest.raises(QuantTuneError, match="no prompt"):
        calibrate(source, zeros, [])
    with pytest.raises(QuantTuneError, match="no latent"):
        calibrate(source, {"samples": torch.zeros(0, 4, 16, 16)}, prompts(source))
    with pytest.raises(QuantTuneError, match="NaN"):
        calibrate(source, {"samples": torch.full((1, 4, 8, 8), float("nan"))}, prompts(source))
    quantized, _ = quantize(source, 4)
    with pytest.raises(QuantTuneError, match="quantized already"):
        calibrated(quantized, rounding="gptq")
    with pytest.raises(QuantTuneError, match="need a CLIP"):
        conditioning_of(None, "a star", None, None)
    for wrong in ({"samples": 0}, {"bits": 5}, {"rounding": "up"}, {"timestep_buckets": 0},
                  {"percentile": 20.0}):
        with pytest.raises(QuantTuneError):
            Calibration(**wrong)
    with pytest.raises(QuantTuneError, match="no sampler 'nope'"):
        calibrated(source, sampler="nope")
    with pytest.raises(QuantTuneError, match="layers is"):
        calibrated(source, layers="some")
