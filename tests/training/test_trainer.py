"""The loop: that it learns, what it moves, and that a disturbance changes nothing."""

import os
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quanttune.quant import QuantTuneError, ScaleSet, load_scale_set
from quanttune.tests.training.toy import (
    ToyDenoiser,
    evaluate,
    same_sets,
    settings,
    toy_set,
    trainer,
)
from quanttune.training.config import PAPER
from quanttune.training.history import read_losses
from quanttune.training.state import FILE, load_state, save_state
from quanttune.training.trainer import ScaleTrainer

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("experts", [1, 4])
def test_it_learns(experts, tmp_path):
    base = evaluate(ScaleSet.identity(ToyDenoiser().shapes, 1))
    done = trainer(tmp_path, steps=150, num_experts=experts, save_every=0).run()
    assert done.finished and len(done.history) == 150
    assert evaluate(done.scale_set) < 0.8 * base


def test_metadata_and_history(tmp_path):
    done = trainer(tmp_path, seed=3).run()
    assert (done.scale_set.metadata.steps, done.scale_set.metadata.seed) == (24, 3)
    assert [r.step for r in done.history] == list(range(1, 25))
    assert read_losses(tmp_path) == list(done.history), "the file reads back to the last digit"
    assert done.history[0].rate == 0 and max(r.rate for r in done.history) == 2e-2


def test_only_experts_that_were_sampled_move(tmp_path):
    done = trainer(tmp_path, shared_share=0.0, timestep_range=(0.5, 1.0)).run()
    for layer in done.scale_set.layers.values():
        assert (layer.r_out[:2] == 1).all() and (layer.s_in[:2] == 1).all()
        assert (layer.r_out[2:] != 1).all() and (layer.s_in[2:] != 1).all()


def test_one_step_moves_one_expert_only(tmp_path):
    run = trainer(tmp_path, shared_share=0.0, warmup_steps=0)
    for _ in range(8):
        before = run.scales.flat()[0].clone()
        record = run.one_step()
        moved = (run.scales.flat()[0] != before).any(1).nonzero().flatten().tolist()
        assert moved == [record.expert]


def test_the_papers_momentum_moves_experts_that_were_not_sampled(tmp_path):
    run = trainer(tmp_path, shared_share=0.0, separate_experts=False, warmup_steps=0)
    for _ in range(5):
        run.one_step()
    before = run.scales.flat()[0].clone()
    run.one_step()
    assert (run.scales.flat()[0] != before).any(1).all()


def test_the_papers_step_is_absolute(tmp_path):
    """Adam's first step is the learning rate in s_out, whatever s0 is (published code)."""
    denoiser = ToyDenoiser()
    run = ScaleTrainer(denoiser, toy_set(), PAPER.replace(steps=4, num_experts=1), tmp_path)
    run.one_step()
    moved = run.scales.scale_set(1000).layers["conv"].r_out[0] - 1
    step = (moved.double() * denoiser.base_scales["conv"][:, 0]).abs()
    assert torch.allclose(step, torch.full_like(step, 3e-6), rtol=0.1)


def test_experts_train_as_one_in_the_shared_stage(tmp_path):
    run = trainer(tmp_path, shared_share=0.5)
    run.run(lambda p: p.record.step == 12)
    run = trainer(tmp_path, shared_share=0.5)
    assert run.step == 12 and all(r.expert == -1 for r in run.history)
    run.one_step()
    r, s = run.scales.flat()
    moved = run.history[-1:] and [i for i in range(4) if not torch.equal(r[i], r[(i + 1) % 4])]
    assert moved, "the first separate step moves one expert away from the others"
    assert (r != 1).all(), "every expert goes on from what was shared"


def test_peqa_trains_output_scales_alone(tmp_path):
    done = trainer(tmp_path, num_experts=1, train_s_in=False).run()
    assert not done.scale_set.has_s_in and done.scale_set.num_experts == 1


def test_rows_are_one_for_an_expert_and_one_each_for_a_mix(tmp_path):
    denoiser = ToyDenoiser()
    trainer(tmp_path / "a", denoiser, shared_share=0.0, steps=4).run()
    assert {rows["conv"] for _, rows in denoiser.seen} == {1}
    denoiser.seen.clear()
    trainer(tmp_path / "b", denoiser, shared_share=0.0, stratified=False, batch_size=4).run()
    assert {rows["conv"] for _, rows in denoiser.seen} >= {4}


def test_shapes_never_mix_and_class_images_come_beside(tmp_path):
    denoiser, data = ToyDenoiser(), toy_set(4, prior=4, sizes=((8, 8), (8, 12)))
    done = trainer(tmp_path, denoiser, data, steps=6, prior_weight=0.5).run()
    assert len(denoiser.seen) == 12, "one pass for the subject's and one for the class images"
    assert all(r.loss > 0 for r in done.history)


def test_the_weight_of_class_images_counts(tmp_path):
    data = toy_set(4, prior=4)
    losses = [trainer(tmp_path / str(w), data=data, steps=4, prior_weight=w).run().history[0].loss
              for w in (0.0, 1.0, 2.0)]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert losses[1] > losses[0]


def test_accumulated_batches_count_as_one_step(tmp_path):
    denoiser = ToyDenoiser()
    run = trainer(tmp_path, denoiser, toy_set(4), batch_size=1, gradient_accumulation=4,
                  shared_share=0.0, max_grad_norm=0.0)
    record = run.one_step()
    assert [rows for rows, _ in denoiser.seen] == [1, 1, 1, 1]
    parts = [float(run._losses(run.orders[0], 0, i, run.timesteps.timesteps(1, 4))[0].mean())
             for i in range(4)]
    record = run.one_step()
    assert record.loss == pytest.approx(sum(parts) / 4, rel=1e-6)


VARIANTS = {
    "recommended": {}, "8-bit": {"optimizer": "adamw8bit"}, "lion": {"optimizer": "lion"},
    "stacked": {"separate_experts": False, "stratified": False, "shared_share": 0.0},
    "average": {"ema_decay": 0.9}, "accumulated": {"gradient_accumulation": 3},
    "dropout": {"caption_dropout": 0.5}, "absolute": {"absolute": True, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("stop", [3, 6, 13])
def test_stopping_and_resuming_changes_no_bit(variant, stop, tmp_path):
    data = toy_set(4, prior=2)
    whole = trainer(tmp_path / "whole", data=data, **VARIANTS[variant]).run()
    part = trainer(tmp_path / "part", data=data, **VARIANTS[variant]).run(
        lambda p: p.record.step == stop)
    assert not part.finished and len(part.history) == stop
    rest = trainer(tmp_path / "part", data=data, **VARIANTS[variant]).run()
    assert rest.history == whole.history
    assert same_sets(rest.scale_set, whole.scale_set)
    assert (tmp_path / "part" / "loss.csv").read_bytes() == (
        tmp_path / "whole" / "loss.csv").read_bytes()


def test_the_seed_decides(tmp_path):
    one, same, other = (trainer(tmp_path / str(i), seed=s).run() for i, s in enumerate((1, 1, 2)))
    assert same_sets(one.scale_set, same.scale_set)
    assert not same_sets(one.scale_set, other.scale_set)


def start_script(*arguments, launch=(), **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    command = [sys.executable, *launch, str(HERE / "train_toy.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_kill_9_loses_at_most_one_interval_and_resumes_the_same_curve(tmp_path, one_thread):
    whole = trainer(tmp_path / "whole").run()
    process = start_script(tmp_path / "killed", "--kill-at", 13)
    errors = process.communicate(timeout=550)[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert len(read_losses(tmp_path / "killed")) == 13
    again = trainer(tmp_path / "killed")
    assert again.step == 10, "the state of the last interval of five"
    rest = again.run()
    assert rest.history == whole.history and same_sets(rest.scale_set, whole.scale_set)
    assert (tmp_path / "killed" / "loss.csv").read_bytes() == (
        tmp_path / "whole" / "loss.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """On CPUs each process is launched with its rank, as on several machines."""
    ranks = two_ranks(lambda rank: tmp_path / "two")
    errors = [process.communicate(timeout=550)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(
        text[-3000:] for text in errors)
    two = read_losses(tmp_path / "two")
    one = trainer(tmp_path / "one", batch_size=4).run().history
    assert len(two) == len(one)
    for a, b in zip(two, one):
        assert a.loss == pytest.approx(b.loss, rel=1e-4) and a.expert == b.expert


@pytest.mark.slow
def test_machines_that_share_no_disk_go_on_together(tmp_path):
    """The first process's state counts for all; the others have none."""
    def launched(*arguments):
        ranks = two_ranks(lambda rank: tmp_path / f"machine{rank}", *arguments)
        errors = [process.communicate(timeout=550)[1] for process in ranks]
        assert [p.returncode for p in ranks] == [0, 0], "\n".join(e[-3000:] for e in errors)

    launched("--stop-at", 7)
    launched()
    one = trainer(tmp_path / "one", batch_size=4).run().history
    two = read_losses(tmp_path / "machine0")
    assert len(two) == len(one)
    for a, b in zip(two, one):
        assert a.loss == pytest.approx(b.loss, rel=1e-4) and a.expert == b.expert


def two_ranks(folder, *arguments):
    """Two ranks of the toy's training, each with a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--cpu"]
    return [start_script(folder(r), "--batch", 2, *arguments, launch=launch, WORLD_SIZE="2",
                         RANK=str(r), LOCAL_RANK=str(r), MASTER_ADDR="127.0.0.1",
                         MASTER_PORT=port) for r in range(2)]


class Poisoned(ToyDenoiser):
    """NaN from a certain step on."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def denoise(self, *arguments, **options):
        self.left -= 1
        out = super().denoise(*arguments, **options)
        return out * float("nan") if self.left < 0 else out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(QuantTuneError, match="step 8 is nan.*learnt in 7 steps is in") as caught:
        trainer(tmp_path, Poisoned(7), toy_set()).run()
    assert "\n" not in str(caught.value)
    assert load_state(tmp_path)["step"] == 7
    kept = load_scale_set(tmp_path / "scales-before-the-error.safetensors")
    run = trainer(tmp_path / "seven")
    run.run(lambda progress: progress.record.step == 7)
    assert kept.metadata.steps == 7
    for name, layer in run.scale_set().layers.items():
        assert torch.equal(layer.r_out, kept.layers[name].r_out)
        assert torch.equal(layer.s_in, kept.layers[name].s_in)
    whole = trainer(tmp_path / "whole").run()
    assert trainer(tmp_path).run().history == whole.history


def test_scales_that_are_broken_do_not_replace_the_last_good_state(tmp_path):
    run = trainer(tmp_path, Poisoned(7), toy_set())

    def spoil(progress):
        if progress.record.step == 7:
            with torch.no_grad():
                next(iter(run.scales.parameters())).fill_(float("inf"))

    with pytest.raises(QuantTuneError, match="step 8"):
        run.run(spoil)
    assert load_state(tmp_path)["step"] == 5
    assert not (tmp_path / "scales-before-the-error.safetensors").exists()


def test_nan_before_anything_is_learnt_leaves_no_file(tmp_path):
    with pytest.raises(QuantTuneError, match=r"step 1 is nan\. Start it anew"):
        trainer(tmp_path, Poisoned(0), toy_set(), save_every=0).run()
    assert not (tmp_path / "scales-before-the-error.safetensors").exists()


def test_a_finished_run_is_not_written_again(tmp_path):
    trainer(tmp_path).run()
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert trainer(tmp_path).run().finished
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def test_what_a_killed_process_had_begun_to_write_goes(tmp_path):
    part = tmp_path / ".checkpoint.pt.0a1b2c3d.tmp"
    part.write_bytes(b"half")
    trainer(tmp_path).run()
    assert not part.exists()


@pytest.mark.parametrize("change", [
    {"step": -5}, {"step": 10**6}, {"history": []}, {"scales": [torch.ones(1)] * 4},
])
def test_states_that_contradict_themselves_are_refused(change, tmp_path):
    trainer(tmp_path).run(lambda progress: progress.record.step == 5)
    save_state(tmp_path, {**load_state(tmp_path), **change})
    with pytest.raises(QuantTuneError, match="damaged"):
        trainer(tmp_path)


@pytest.mark.parametrize("part", ["average", "average of nothing", "exp_avg", "exp_avg_sq", "type",
                                  "optimizer", "loss", "mixed"])
def test_a_state_of_other_tensors_is_refused(part, tmp_path):
    """torch would stretch and convert what is copied, and take moments of any shape."""
    def run():
        return trainer(tmp_path, num_experts=2, ema_decay=0.5)

    run().run(lambda progress: progress.record.step == 5)
    state = load_state(tmp_path)
    if part == "average":
        state["average"][0] = state["average"][0][..., :1]
    elif part == "average of nothing":
        state["average"] = [None] * len(state["average"])
    elif part.startswith("exp"):
        moments = state["optimizers"][0]["state"][0]
        moments[part] = moments[part][..., :1]
    elif part == "type":
        state["scales"] = [t.half() for t in state["scales"]]
    elif part == "optimizer":
        state["optimizers"] = state["optimizers"][:0]
    elif part == "loss":
        state["history"][2][1] = float("nan")
    else:
        state["mixed"] = [(float("inf"), 0, 0.1)]
    save_state(tmp_path, state)
    with pytest.raises(QuantTuneError, match="damaged"):
        run()


def test_a_packed_state_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    trainer(tmp_path).run(lambda progress: progress.record.step == 5)
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: pytest.fail("unpacked"))
    with pytest.raises(QuantTuneError, match="damaged"):
        trainer(tmp_path)


def test_flipped_bits_are_noticed(tmp_path):
    trainer(tmp_path).run(lambda progress: progress.record.step == 5)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 8)
    # Behind the entry's own header, whose names torch pads.
    at = whole.index(entry.filename.encode(), entry.header_offset) + len(entry.filename) + 80
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
    with pytest.raises(QuantTuneError, match="damaged"):
        trainer(tmp_path)


def test_a_folder_that_cannot_be_made_is_told_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("x")
    run = trainer(tmp_path / "file" / "run")
    with pytest.raises(QuantTuneError, match="cannot be made"):
        run.run()
    assert run.step == 0


def test_a_full_disk_that_torch_does_not_name(tmp_path, monkeypatch):
    """torch.save says 'unexpected pos' when the disk is full."""
    import torch as library

    def fail(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8")

    monkeypatch.setattr(library, "save", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    done = trainer(tmp_path).run()
    assert "no space left" in done.message and "is kept" not in done.message
    assert "4.1 kB are free" in done.message


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    import torch as library

    run, save, calls = trainer(tmp_path), library.save, []

    def fail(state, file):
        calls.append(state["step"])
        if len(calls) > 1:
            file.write(b"half a state")
            raise OSError(28, "No space left on device")
        return save(state, file)

    monkeypatch.setattr(library, "save", fail)
    done = run.run()
    assert done.finished and "no space left" in done.message and str(tmp_path) in done.message
    assert calls == [5, 10, 15, 20, 24]
    assert load_state(tmp_path)["step"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE, "loss.csv"]


@pytest.mark.parametrize("change,match", [
    ({"learning_rate": 1e-3}, "learning_rate"), ({"steps": 30}, "steps"), ({"seed": 9}, "seed"),
])
def test_other_settings_are_not_resumed(change, match, tmp_path):
    trainer(tmp_path).run(lambda p: p.record.step == 6)
    with pytest.raises(QuantTuneError, match=match) as caught:
        trainer(tmp_path, **change)
    assert str(tmp_path) in str(caught.value)


def test_another_base_or_other_images_are_not_resumed(tmp_path):
    trainer(tmp_path).run(lambda p: p.record.step == 6)
    other = ToyDenoiser()
    other.fingerprint = "another"
    with pytest.raises(QuantTuneError, match="another base model"):
        trainer(tmp_path, other)
    with pytest.raises(QuantTuneError, match="another set of images"):
        trainer(tmp_path, data=toy_set(seed=4))


@pytest.mark.parametrize("damage", [b"", b"not a state", b"PK\x03\x04 half a zip"])
def test_a_damaged_state_says_so(damage, tmp_path):
    trainer(tmp_path).run(lambda p: p.record.step == 6)
    (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(QuantTuneError, match="damaged"):
        trainer(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda state: state["scales"][0].view(-1)[0].fill_(float("nan")),
    lambda state: state["optimizers"][0]["state"][0]["exp_avg"].fill_(float("inf")),
    lambda state: state.update(
        scales=[t.view(-1)[:1].clone().expand(t.shape) for t in state["scales"]]),
    lambda state: state.update(more=torch.ones(2).to_sparse()),
])
def test_a_state_with_odd_numbers_is_not_resumed(damage, tmp_path):
    trainer(tmp_path).run(lambda p: p.record.step == 6)
    state = load_state(tmp_path)
    damage(state)
    save_state(tmp_path, state)
    with pytest.raises(QuantTuneError, match="damaged"):
        trainer(tmp_path)


def test_an_exception_of_the_callback_keeps_the_state(tmp_path):
    class Oops(BaseException):
        pass

    def callback(progress):
        if progress.record.step == 7:
            raise Oops

    with pytest.raises(Oops):
        trainer(tmp_path).run(callback)
    assert trainer(tmp_path).step == 7


@pytest.mark.parametrize("data", [toy_set(0), toy_set(0, prior=3)])
def test_nothing_to_train_on(data, tmp_path):
    with pytest.raises(QuantTuneError, match="no image"):
        trainer(tmp_path, data=data)


def test_a_single_image_is_enough(tmp_path):
    assert trainer(tmp_path, data=toy_set(1), batch_size=4).run().finished


def test_tensorboard_gets_the_same_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = ScaleTrainer(ToyDenoiser(), toy_set(), settings(), tmp_path, trackers=["tensorboard"])
    done = run.run()
    events = next(tmp_path.rglob("events.out.tfevents*"))
    board = EventAccumulator(str(events.parent))
    board.Reload()
    logged = [e.value for e in board.Scalars("loss")]
    assert logged == pytest.approx([r.loss for r in done.history], rel=1e-6)


@pytest.mark.parametrize("when", ["opened", "logged", "closed"])
def test_a_tracker_that_cannot_write_ends_no_training(when, tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    method = {"logged": "log", "closed": "finish"}.get(when)
    if method is None:
        (tmp_path / "quanttune").write_text("a file where its folder would be")
    else:
        done = getattr(TensorBoardTracker, method)

        def full(self, *arguments, step=3, **options):
            done(self, *arguments, **options)
            if step == 3:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(TensorBoardTracker, method, full)
    run = ScaleTrainer(ToyDenoiser(), toy_set(), settings(), tmp_path, trackers=["tensorboard"])
    result = run.run()
    assert result.finished and (tmp_path / "checkpoint.pt").is_file()
    assert result.message.startswith("The tracker tensorboard failed (")
    assert "\n" not in result.message and result.message in caplog.text
    without = trainer(tmp_path / "without").run()
    assert [r.loss for r in without.history] == [r.loss for r in result.history]


def test_an_unknown_tracker(tmp_path):
    with pytest.raises(QuantTuneError, match="no tracker 'paper'"):
        ScaleTrainer(ToyDenoiser(), toy_set(), settings(), tmp_path, trackers=["paper"])


def test_the_average_lags_behind(tmp_path):
    last = trainer(tmp_path / "a").run().scale_set
    mean = trainer(tmp_path / "b", ema_decay=0.95).run().scale_set
    norms = [sum(float((t - 1).square().sum()) for t in s.tensors()) for s in (last, mean)]
    assert 0 < norms[1] < norms[0]


def test_records_are_plain_numbers(tmp_path):
    record = trainer(tmp_path, steps=4).run().history[-1]
    assert all(type(v) in (int, float) for v in astuple(record))


def by_hand(run, step, experts):
    """Losses of a step's examples one by one, under the experts of their timesteps."""
    timesteps = run.timesteps.timesteps(step, run.config.batch_size, run.shared)
    losses, _ = run._losses(run.orders[0], 0, 0, timesteps)
    found = {}
    for t, loss in zip(timesteps.tolist(), losses.tolist()):
        found.setdefault(int(t / 1000 * experts), []).append(loss)
    return {e: sum(v) / len(v) for e, v in found.items()}


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_a_mixed_step_keeps_the_loss_of_each_expert(tmp_path, shared):
    run = trainer(tmp_path, num_experts=2, batch_size=5, shared_share=shared)
    for step in range(3):
        run.shared = step < run.shared_steps
        expected = by_hand(run, step, 2)
        record = run.one_step()
        assert record.expert == -1 and set(expected) == {0, 1}
        assert run.mixed[step + 1] == pytest.approx(expected, rel=1e-5)


def test_a_step_of_one_expert_has_its_loss_and_nothing_mixed(tmp_path):
    run = trainer(tmp_path, num_experts=4, batch_size=1, shared_share=0.0)
    for _ in range(4):
        record = run.one_step()
        assert run.by_expert == {record.expert: pytest.approx(record.loss, rel=1e-6)}
    assert run.mixed == {}


def test_losses_of_mixed_steps_outlive_a_stop(tmp_path):
    first = trainer(tmp_path, num_experts=2, batch_size=5, steps=6)
    first.run(lambda progress: progress.record.step == 3)
    assert set(first.mixed) == {1, 2, 3}
    again = trainer(tmp_path, num_experts=2, batch_size=5, steps=6)
    assert again.mixed == first.mixed
