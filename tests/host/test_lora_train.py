"""LoRA training in the host: what it trains on, what it leaves, and that stock loaders agree."""

import contextlib

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import models

BASES = {"float": (None, "as it is"), "8 bits": (8, "as it is"), "4 bits": (4, "as it is"),
         "NF4": (None, "NF4")}


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def output_folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def base_of(name, family="SD15"):
    """``(MODEL, base)``."""
    bits, base = BASES[name]
    model = models.small_model(family)
    return (model if bits is None else models.quantize(model, bits)[0]), base


def examples(model, count=4, captions=False):
    from quanttune.training.data import TrainingSet

    generator = torch.Generator().manual_seed(2)
    config = model.model.model_config.unet_config
    with torch.inference_mode(False):
        latents = tuple(torch.randn(4, 16, 16, generator=generator) for _ in range(count))
        conditions = []
        for _ in range(count):
            own = {"c_crossattn": torch.randn(1, 7, config["context_dim"], generator=generator)}
            if config.get("adm_in_channels"):
                own["y"] = torch.randn(1, config["adm_in_channels"], generator=generator)
            conditions.append(own)
    return TrainingSet(latents, tuple(conditions), (False,) * count,
                       tuple(f"caption {i}" for i in range(count)) if captions else ("",) * count,
                       f"set-{count}")


def settings(**changes):
    from quanttune.training.lora_config import LoraTraining

    return LoraTraining(**{"steps": 5, "batch_size": 2, "learning_rate": 2e-2, "rank": 4,
                           "warmup_steps": 0, "scheduler": "constant", "save_every": 2,
                           "preview_every": 0, **changes})


def some_lora(model, seed=5, dora=False):
    """A LORA_MODEL for a float or quantized MODEL of the small SD15."""
    from quanttune.host.lora_file import export_lora
    from quanttune.tests.host.lora_models import random_layers

    source = models.small_model()
    return export_lora(random_layers(source, seed=seed, amount=0.1, dora=dora), source)


def train(model, base="as it is", name="run", data=None, **changes):
    from quanttune.host.lora_train import train_lora

    own = {k: changes.pop(k) for k in ("clip", "start", "anew", "validation") if k in changes}
    return train_lora(model, data or examples(model), settings(**changes), name, base, **own)


def answer(model, seed=1):
    """The MODEL's diffusion model on a fixed input, as samplers call it."""
    import comfy.model_management

    arguments = models.inputs(model, seed=seed)
    comfy.model_management.load_models_gpu([model])
    options = model.model_options["transformer_options"]
    return model.model.diffusion_model(transformer_options=options, **arguments).clone()


def stock_loaded(model, lora, strength=1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def distance(a, b):
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def trained_in_place(model, base, **changes):
    """The copy that trains, after a few steps, and its LORA_MODEL."""
    from quanttune.host.lora_train import exported_lora, pupil
    from quanttune.training.lora_trainer import LoraTrainer

    config = settings(**changes)
    with pupil(model, config, base) as learner:
        trainer = LoraTrainer(learner.denoiser, learner.learns, examples(model), config,
                              changes.get("folder", "unused"))
        trainer.save = lambda: ""
        for _ in range(3):
            trainer.one_step()
        learner.watch(learning=False)
        with torch.no_grad():
            yield learner, exported_lora(trainer.export(), learner, model, None, config, "x", "",
                                         3)


@pytest.mark.parametrize("family,base,kind", [
    *[("SD15", base, kind) for base in BASES for kind in ("LoRA", "rsLoRA", "DoRA")],
    *[(family, "4 bits", kind) for family in ("SD20", "SDXL") for kind in ("LoRA", "DoRA")]])
def test_stock_load_lora_computes_what_the_training_did(base, family, kind):
    """On the MODEL it was trained on, by the host's own loader: the same to 2e-5 of the output."""
    model, over = base_of(base, family)
    before = answer(model)
    with trained_in_place(model, over, targets="attention + feed-forward + convolutions",
                          rslora=kind == "rsLoRA", dora=kind == "DoRA") as (learner, lora):
        from quanttune.host.lora_file import LoraWeights

        ours = learner.denoiser.base.diffusion_model(
            **models.inputs(model), transformer_options={}).clone()
        assert isinstance(lora, LoraWeights) and distance(ours, before) > 1e-2
    if over != "NF4":
        loaded = answer(stock_loaded(model, lora))
        assert distance(loaded, ours) < 2e-5
        assert not torch.equal(loaded, before)
    assert torch.equal(answer(model), before), "the graph's own MODEL is as it was"


@pytest.mark.parametrize("base", list(BASES))
def test_it_trains_and_reports(base, output_folder):
    model, over = base_of(base)
    outcome = train(model, over, targets="all layers")
    assert outcome.result.finished and len(outcome.result.history) == 5
    assert all(r.loss > 0 and r.gradient_norm > 0 for r in outcome.result.history)
    told = {"float": "float weights", "NF4": "NF4 weights"}.get(base, base.replace(" b", "-b")[:5])
    assert told in outcome.report and "5 of 5 steps" in outcome.report
    assert outcome.lora.metadata["ss_network_dim"] == "4"
    assert outcome.lora.metadata["ss_steps"] == "5"
    assert (output_folder / "quanttune_runs" / "run" / "loss.csv").is_file()


@pytest.mark.parametrize("base", ["float", "4 bits", "NF4"])
def test_dora_with_dropout_in_half_precision(base, output_folder):
    """SD1.x's projections around attention are convolutions."""
    model, over = base_of(base)
    outcome = train(model, over, targets="attention", dora=True, dropout=0.2, precision="bf16",
                    steps=2)
    assert any("proj_in" in name for name in outcome.lora)
    assert outcome.result.finished


@pytest.mark.parametrize("bits", [None, 4])
def test_dora_on_weights_of_eight_bit_floats(bits, output_folder):
    model = models.small_model(kept=torch.float8_e4m3fn)
    if bits:
        model = models.quantize(model, bits)[0]
    outcome = train(model, targets="all layers", dora=True, dropout=0.2, steps=2)
    assert outcome.result.finished and all(v.isfinite().all() for v in outcome.lora.values())


@pytest.mark.parametrize("base", ["float", "4 bits", "NF4"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"dora": True}],
                         ids=["plain", "dropout", "DoRA"])
def test_recomputing_activations_changes_no_gradient(base, changes):
    from quanttune.host.lora_train import pupil
    from quanttune.training.lora_trainer import LoraTrainer

    model, over = base_of(base)
    found = []
    for checkpointing in (False, True):
        config = settings(checkpointing=checkpointing, **changes)
        with pupil(model, config, over) as learner:
            trainer = LoraTrainer(learner.denoiser, learner.learns, examples(model), config, "x")
            with torch.no_grad():
                for p in trainer.parameters:
                    p.add_(0.01)
            record = trainer.one_step()
            found.append((record.loss, [p.grad.clone() for p in trainer.parameters]))
    (loss, kept), (again, recomputed) = found
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in kept)


def test_gradients_on_packed_weights_are_those_on_the_same_floats():
    from quanttune.host.lora_train import pupil
    from quanttune.training.lora_trainer import LoraTrainer

    quantized, _ = base_of("4 bits")
    floats = models.dequantized_copy(quantized)
    grads = []
    for model in (quantized, floats):
        config = settings(targets="all layers", checkpointing=False)
        with pupil(model, config) as learner:
            trainer = LoraTrainer(learner.denoiser, learner.learns, examples(model), config, "x")
            with torch.no_grad():
                for p in trainer.parameters:
                    p.add_(0.01)
            trainer.one_step()
            grads.append([p.grad.clone() for p in trainer.parameters])
    # Those of the time embedding's layers are nearly 0: a norm takes their shift away.
    assert all((a - b).norm() < 1e-3 * b.norm() + 1e-6 for a, b in zip(*grads))


@pytest.mark.parametrize("base", ["float", "4 bits"])
def test_stopped_and_resumed_it_is_the_same(base, output_folder, monkeypatch):
    from quanttune.host import run

    model, over = base_of(base)
    whole = train(model, over, "whole", dropout=0.2)
    with monkeypatch.context() as patch:
        update = run.Watcher.__call__
        patch.setattr(run.Watcher, "__call__",
                      lambda self, p: update(self, p) or p.record.step == 3)
        stopped = train(model, over, "cut", dropout=0.2)
    assert not stopped.result.finished and "queue again" in stopped.report
    assert stopped.lora, "what was learnt so far comes out"
    resumed = train(model, over, "cut", dropout=0.2)
    a, b = ((output_folder / "quanttune_runs" / n / "loss.csv").read_text()
            for n in ("whole", "cut"))
    assert a == b, "the same losses to the last digit"
    assert whole.lora.keys() == resumed.lora.keys()
    assert all(torch.equal(whole.lora[k], resumed.lora[k]) for k in whole.lora)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"rslora": True, "alpha": 3.0}],
                         ids=["LoRA", "DoRA", "rsLoRA"])
def test_training_goes_on_from_a_file(changes, output_folder, tmp_path):
    from quanttune.host.lora_file import read_lora, save_lora
    from quanttune.host.lora_train import pupil

    model, _ = base_of("4 bits")
    first = train(model, name="first", **changes)
    path = save_lora(tmp_path / "first.safetensors", first.lora)
    start = read_lora(path)
    with pupil(model, settings(**changes), start=start) as learner:
        learner.watch(learning=False)
        with torch.no_grad():
            ours = learner.denoiser.base.diffusion_model(**models.inputs(model),
                                                         transformer_options={}).clone()
    assert distance(answer(stock_loaded(model, first.lora)), ours) < 2e-5
    second = train(model, name="second", start=start, **changes)
    assert any(not torch.equal(second.lora[k], first.lora[k]) for k in first.lora)
    with pytest.raises(QuantTuneError, match="LoRA to begin with"):
        train(model, name="second", **changes)


@pytest.mark.parametrize("base", list(BASES))
def test_a_lora_beneath_stays_when_the_host_makes_room(base, output_folder, monkeypatch):
    """As on a small card: the copy is unloaded for the previews' decoder and loaded again."""
    import comfy.model_management as management

    from quanttune.host import run
    from quanttune.host.pictures import SamplingSettings

    model, over = base_of(base)
    under = stock_loaded(model, some_lora(model))
    quiet = train(under, over, "quiet").result.history
    looks = []

    def evicting(copy, *args):
        looks.append(answer(copy))
        management.unload_all_models()
        return torch.zeros(1, 8, 8, 3)

    monkeypatch.setattr(run, "sample_pictures", evicting)
    look = run.Validation(["x"], SamplingSettings(64, 64), None, None)
    watched = train(under, over, "watched", validation=look, preview_every=2).result.history
    assert [r.loss for r in watched] == [r.loss for r in quiet]
    assert len(looks) == 4
    bare = train(model, over, "bare").result.history
    assert quiet[0].loss != bare[0].loss, "it trains on the MODEL with its LoRA"


@pytest.mark.parametrize("base", ["float", "4 bits"])
def test_a_run_goes_on_over_the_same_lora_and_no_other(base, output_folder, monkeypatch):
    from quanttune.host import run

    model, over = base_of(base)
    with monkeypatch.context() as patch:
        patch.setattr(run.Watcher, "__call__", lambda self, p: p.record.step == 3)
        train(stock_loaded(model, some_lora(model)), over)
    with pytest.raises(QuantTuneError, match="another base model"):
        train(stock_loaded(model, some_lora(model, seed=6)), over)
    with pytest.raises(QuantTuneError, match="another base model"):
        train(model, over)
    rest = train(stock_loaded(model, some_lora(model)), over)
    assert len(rest.result.history) == 5, "loaded again, as after a restart"


def test_what_nothing_can_be_trained_on(output_folder):
    import comfy.sd

    for bits in (None, 4):
        model = models.small_model() if bits is None else models.quantize(models.small_model())[0]
        bypass = comfy.sd.load_bypass_lora_for_models(model, None, some_lora(model), 1.0, 0)[0]
        with pytest.raises(QuantTuneError, match="bypass LoRA.*before the training"):
            train(bypass)
    with pytest.raises(QuantTuneError, match="DoRA cannot be trained"):
        train(stock_loaded(model, some_lora(model)), dora=True)
    with pytest.raises(QuantTuneError, match="no plain LoRA"):
        train(stock_loaded(model, some_lora(model, dora=True)))
    assert answer(model).isfinite().all()


def starter():
    from quanttune.starter.load import load_starter

    return load_starter()


def test_the_text_encoder_learns_too_and_stock_loads_it(output_folder):
    import comfy.sd

    from quanttune.host.encode import encode
    from quanttune.host.images import read_folder
    from quanttune.host.lora_train import exported_lora, pupil
    from quanttune.host.pictures import SamplingSettings, sample_pictures
    from quanttune.training.lora_trainer import LoraTrainer

    model, clip, vae = starter()
    data = encode(read_folder("starter: pip", resolution=128).images, model, clip, vae)
    before = clip.encode_from_tokens(clip.tokenize("a sks character"))
    config = settings(train_text_encoder=True)
    with pupil(model, config, clip=clip) as learner:
        trainer = LoraTrainer(learner.denoiser, learner.learns, data, config, output_folder,
                              reader=learner.reader)
        first = trainer.one_step()
        plain = LoraTrainer(learner.denoiser, learner.learns, data, config, output_folder / "b")
        again = plain._losses(plain.orders[0], 0, 0, plain.draw())[0].mean()
        assert again.isfinite() and first.loss > 0
        for _ in range(3):
            trainer.one_step()
        text = learner.learns["text_encoder"]
        assert len(text.layers) == 18
        assert all(layer.lora_B["quanttune"].weight.any() for layer in text.layers.values())
        learner.watch(learning=False)
        with torch.inference_mode():
            ours = learner.reader.clip.encode_from_tokens(clip.tokenize("a sks character"))
            look = SamplingSettings(128, 128, 3, 2.0)
            pictures = sample_pictures(learner.denoiser.patcher, learner.reader.clip, vae,
                                       ["a sks character"], look)
        lora = exported_lora(trainer.export(), learner, model, clip, config, "x", "", 4)
    assert distance(ours, before) > 1e-3
    loaded, loaded_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    theirs = loaded_clip.encode_from_tokens(clip.tokenize("a sks character"))
    assert distance(theirs, ours) < 2e-4, "the file is applied to float16 weights"
    shown = sample_pictures(loaded, loaded_clip, vae, ["a sks character"], look)
    assert float((shown - pictures).abs().max()) < 1e-3, "the picture of the training, by stock"
    own = clip.encode_from_tokens(clip.tokenize("a sks character"))
    assert torch.equal(own, before), "the graph's own CLIP is as it was"


def test_the_first_step_with_a_text_encoder_is_that_without(output_folder):
    """Adapters begin at nothing, and live conditions are the encoded ones."""
    from quanttune.host.encode import encode, encode_empty
    from quanttune.host.images import read_folder
    from quanttune.host.lora_train import train_lora

    model, clip, vae = starter()
    data = encode(read_folder("starter: pip", resolution=128).images, model, clip, vae)
    losses = []
    for train_text in (False, True):
        outcome = train_lora(model, data, settings(steps=1, train_text_encoder=train_text,
                                                   caption_dropout=0.5),
                             f"text-{train_text}", clip=clip, empty=encode_empty(model, clip, data))
        losses.append(outcome.result.history[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_half_precision_trains(output_folder):
    for base in ("float", "4 bits", "NF4"):
        model, over = base_of(base)
        wide = train(model, over, f"{base}-32").result.history[0].loss
        half = train(model, over, f"{base}-16", precision="bf16").result.history[0].loss
        assert half == pytest.approx(wide, rel=0.05) and half != wide


@pytest.mark.parametrize("changes,match", [
    ({"base": "NF4", "model": "4 bits"}, "quantized already"),
    ({"base": "INT4"}, "base is 'INT4'"),
    ({"train_text_encoder": True}, "needs a CLIP"),
    ({"rank": 512}, "rank 512 is larger than every layer"),
    ({"targets": "pattern below", "pattern": "nope"}, "name no layer"),
    ({"caption_dropout": 0.5}, "empty caption"),
])
def test_what_a_user_can_mend(changes, match, output_folder):
    changes = dict(changes)
    model, _ = base_of(changes.pop("model", "float"))
    data = examples(model)
    with pytest.raises(QuantTuneError, match=match) as caught:
        train(model, changes.pop("base", "as it is"), data=data, **changes)
    assert "\n" not in str(caught.value)
    assert not list(output_folder.glob("quanttune_runs/*")), "nothing was begun"
    assert answer(model).isfinite().all(), "and the model is in order"


def test_a_lora_of_another_family_is_no_start(output_folder):
    other = train(base_of("float", "SDXL")[0], name="xl").lora
    model, _ = base_of("float")
    with pytest.raises(QuantTuneError):
        train(model, start=other)


def test_a_model_with_scales_is_told(output_folder):
    from quanttune.host.routing import apply_scale_set

    model, _ = base_of("4 bits")
    routed, _ = apply_scale_set(model, models.random_scales(model), 1.0)
    with pytest.raises(QuantTuneError, match="scales applied already"):
        train(routed)
