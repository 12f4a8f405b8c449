"""The LoRA training loop: it learns, and it goes on where it was stopped, to the last bit."""

import csv
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.training.lora_toy import LoraToyDenoiser, trainer
from quanttune.tests.training.test_trainer import start_script, two_ranks
from quanttune.tests.training.toy import toy_set
from quanttune.training.lora_trainer import LoraTrainer
from quanttune.training.sampling import ExampleOrder


def losses(folder):
    with open(folder / "loss.csv") as file:
        return [float(r["loss"]) for r in csv.DictReader(file)]


def fixed_loss(denoiser):
    """Of the model as it is, over fixed draws."""
    generator, total = torch.Generator().manual_seed(5), 0.0
    clean, conditions = toy_set().batch(range(5))
    with torch.no_grad():
        for t in torch.linspace(5, 995, 20):
            noise = torch.randn(clean.shape, generator=generator)
            sigma = denoiser.sigma(t.expand(5))
            out = denoiser.denoise(denoiser.noised(clean, noise, sigma), sigma, conditions, {})
            total += float((out - clean).square().mean() / sigma[0] ** 2)
    return total


@pytest.mark.parametrize("dora", [False, True])
def test_it_learns(dora, tmp_path):
    denoiser = LoraToyDenoiser()
    with trainer(tmp_path, denoiser=denoiser, steps=120, dora=dora, save_every=0) as run:
        before = fixed_loss(denoiser)
        result = run.run()
        after = fixed_loss(denoiser)
    assert result.finished and after < 0.9 * before
    assert result.num_parameters == sum(p.numel() for p in run.parameters)


VARIANTS = {"plain": {}, "dropout": {"dropout": 0.3}, "8-bit": {"optimizer": "adamw8bit"},
            "lion": {"optimizer": "lion8bit"}, "DoRA": {"dora": True},
            "accumulated": {"gradient_accumulation": 2, "caption_dropout": 0.5},
            "prior": {"prior_weight": 0.5}}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("stop", [3, 7])
def test_stopping_and_resuming_changes_no_bit(variant, stop, tmp_path):
    options = {**VARIANTS[variant], "data": toy_set(5, prior=3 if variant == "prior" else 0)}
    with trainer(tmp_path / "whole", **options) as run:
        whole = run.run()
    with trainer(tmp_path / "cut", **options) as run:
        stopped = run.run(lambda p: p.record.step == stop)
        assert not stopped.finished and len(stopped.history) == stop
    torch.rand(3)
    with trainer(tmp_path / "cut", **options) as run:
        assert run.step == stop
        resumed = run.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    for name, layer in whole.layers["diffusion_model"].items():
        other = resumed.layers["diffusion_model"][name]
        assert torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up)


def test_kill_9_resumes_the_same_curve(tmp_path, one_thread):
    with trainer(tmp_path / "whole") as run:
        run.run()
    process = start_script(tmp_path / "killed", "--kill-at", 13, "--lora")
    errors = process.communicate(timeout=550)[1]
    assert process.returncode == -signal.SIGKILL, errors
    with trainer(tmp_path / "killed") as run:
        assert run.step == 10, "the state of the last interval of five"
        run.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    ranks = two_ranks(lambda rank: tmp_path / "two", "--lora")
    errors = [process.communicate(timeout=550)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    with trainer(tmp_path / "one", batch_size=4) as run:
        run.run()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_dropout_leaves_the_generator_alone(tmp_path):
    with trainer(tmp_path, dropout=0.5) as run:
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        run.one_step()
        assert torch.equal(torch.rand(2), expected)


def test_a_text_encoder_needs_captions(tmp_path):
    with trainer(tmp_path) as run:
        mute = replace(run.data, captions=("",) * 5)
        with pytest.raises(QuantTuneError, match="needs captions"):
            LoraTrainer(run.denoiser, run.learns, mute, run.config, tmp_path, reader=object())


@pytest.mark.parametrize("damage", ["moments", "shapes", "nan"])
def test_a_state_of_other_contents_is_damaged(damage, tmp_path):
    with trainer(tmp_path) as run:
        run.run(lambda p: p.record.step == 3)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    moments = state["optimizer"]["state"]
    if damage == "moments":
        state["optimizer"]["state"] = {}
    elif damage == "shapes":
        moments[0]["exp_avg"] = torch.zeros(7)
    else:
        state["parameters"][0][0] = float("nan")
    torch.save(state, path)
    with pytest.raises(QuantTuneError, match="damaged"):
        with trainer(tmp_path):
            pass


@pytest.mark.parametrize("change,match", [
    ({"rank": 2}, "rank = 4"), ({"data": toy_set(4)}, "another set of images"),
    ({"targets": "attention"}, "targets = 'all layers'"), ({"start": "x"}, "LoRA to begin with"),
    ({"learning_rate": 1e-3}, "learning_rate = 0.03"),
])
def test_a_run_goes_on_with_its_own_settings_only(change, match, tmp_path):
    with trainer(tmp_path) as run:
        run.run(lambda p: p.record.step == 3)
    with pytest.raises(QuantTuneError, match=match):
        with trainer(tmp_path, **change):
            pass


def test_a_damaged_state_says_so(tmp_path):
    with trainer(tmp_path) as run:
        run.run(lambda p: p.record.step == 3)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(QuantTuneError, match="damaged"):
        with trainer(tmp_path):
            pass


def test_what_was_learnt_before_nan_is_kept(tmp_path):
    kept = []

    class Poisoned(LoraToyDenoiser):
        def denoise(self, *args, **kwargs):
            out = super().denoise(*args, **kwargs)
            return out * float("nan") if len(self.seen) >= 3 else (self.seen.append(1), out)[1]

    with trainer(tmp_path, denoiser=Poisoned(), batch_size=1) as run:
        run.keep = lambda path, layers: kept.append((path, layers))
        with pytest.raises(QuantTuneError, match="loss of step 4 is nan; what was learnt in 3"):
            run.run()
    (path, layers), = kept
    assert path.name == "lora-before-the-error.safetensors"
    assert all(v.up.isfinite().all() and v.up.any()
               for v in layers["diffusion_model"].values())


def test_a_dropped_caption_leaves_the_size_of_the_picture(tmp_path):
    """What goes with an empty caption may depend on the shape of the latents."""
    class Watched(LoraToyDenoiser):
        def denoise(self, noised, sigma, conditions, *args, **kwargs):
            sides = noised.shape[-2] * noised.shape[-1]
            assert bool((conditions["c_crossattn"] == sides).all())
            self.seen.append(sides)
            return super().denoise(noised, sigma, conditions, *args, **kwargs)

    data, seen = toy_set(6, sizes=((8, 8), (8, 16))), Watched()
    with trainer(tmp_path, data, seen, caption_dropout=1.0, steps=6) as run:
        for shape in run.empty:
            run.empty[shape] = {"c_crossattn": torch.full((1, 3, 6), float(shape[1] * shape[2]))}
        run.run()
    assert set(seen.seen) == {64, 128}


def test_epochs_count_the_subject_alone():
    assert toy_set(5).steps(3, 2) == 9
    assert toy_set(5, prior=4).steps(3, 2) == 9
    assert toy_set(5, sizes=((8, 8), (8, 16))).steps(2, 2) == 6


@pytest.mark.parametrize("batch_size,accumulation", [(1, 1), (1, 8), (3, 2), (2, 5)])
def test_epochs_are_how_often_every_example_is_seen(batch_size, accumulation):
    """Whatever the number of shapes; a step may reach from one epoch into the next."""
    data = toy_set(10, sizes=((8, 8), (8, 16), (16, 8)))
    order, seen = ExampleOrder(data.buckets(), batch_size, seed=0), Counter()
    steps = data.steps(6, batch_size, accumulation)
    for number in range(steps * accumulation):
        seen.update(order.batch(number))
    assert min(seen.values()) >= 6
    extra = accumulation - 1  # batches of the last step that are over
    per_epoch = sum(-(-len(b) // batch_size) for b in data.buckets())
    assert 6 * per_epoch <= steps * accumulation <= 6 * per_epoch + extra
    assert batch_size > 1 or sum(seen.values()) <= 6 * 10 + extra
