"""Messages to the page: losses under their experts, timesteps of samplings, experts of files."""

import types

import pytest
import torch

from quanttune.training.history import StepRecord
from quanttune.training.loop import Progress


@pytest.fixture
def told(comfy_inprocess, monkeypatch):
    """What the page is told: ``(event, message)``."""
    from quanttune.host import expert_feed, loss_feed

    messages = []
    for module in (loss_feed, expert_feed):
        monkeypatch.setattr(module, "tell_page", lambda *told: messages.append(told))
        monkeypatch.setattr(module, "PAUSE", -1.0)  # two looks at a clock may be equal
    return messages


def records(*rows):
    return [StepRecord(step, loss, 0.1, expert, 1.0) for step, loss, expert in rows]


def trainer(history=(), mixed=None):
    return types.SimpleNamespace(history=list(history), mixed=mixed or {})


def feed(steps=8, experts=2, **options):
    from quanttune.host.loss_feed import LossFeed

    return LossFeed("5", "run", steps, experts, **options)


def add(to, who, record):
    to.add(Progress(record, 8, 0.1, who))


def test_a_message_holds_what_is_new_and_the_last_one_all(told):
    to, who = feed(), trainer(mixed={3: {0: 0.5, 1: 0.75}})
    to.begin(who)
    for record in records((1, 0.125, 1), (2, 0.25, 0), (3, 0.6, -1), (8, 1.0, 0)):
        add(to, who, record)
    points = [m["points"] for _, m in told]
    assert points[0] == [[], []] and told[0][1]["whole"]
    assert points[1:4] == [[[], [[1, 0.125]]], [[[2, 0.25]], []], [[[3, 0.5]], [[3, 0.75]]]]
    everything = [[[2, 0.25], [3, 0.5], [8, 1.0]], [[1, 0.125], [3, 0.75]]]
    assert points[-1] == everything == to.end()["points"]
    assert [m["whole"] for _, m in told] == [True, False, False, False, True]


def test_a_run_that_goes_on_begins_with_what_it_has(told):
    who = trainer(records((1, 0.5, 0), (2, 0.25, -1)), mixed={2: {1: 0.125}})
    feed().begin(who)
    assert told[0][1]["points"] == [[[1, 0.5]], [[2, 0.125]]] and told[0][1]["step"] == 2


def test_a_mixed_step_of_an_earlier_version_is_left_out(told):
    feed().begin(trainer(records((1, 0.5, -1), (2, 0.25, 1))))
    assert told[0][1]["points"] == [[], [[2, 0.25]]]


def test_without_experts_every_step_counts(told):
    feed(experts=1).begin(types.SimpleNamespace(history=records((1, 0.5, -1), (2, 0.25, 0))))
    assert told[0][1]["points"] == [[[1, 0.5], [2, 0.25]]]


def test_messages_are_few_and_small_however_fast_and_long_the_training(told, monkeypatch):
    from quanttune.host import loss_feed

    monkeypatch.setattr(loss_feed, "PAUSE", 3600.0)
    to, who, steps = feed(20_000, experts=4), trainer(), 20_000
    for step in range(1, steps + 1):
        add(to, who, StepRecord(step, step / steps, 0.1, step % 4, 1.0))
    # The first one, as the clock starts, and the last.
    assert len(told) <= 2 and told[-1][1]["whole"]
    for expert, points in enumerate(told[-1][1]["points"]):
        assert 32 <= len(points) <= loss_feed.POINTS // 4
        assert all(abs(loss - step / steps) < 1e-3 for step, loss in points)
        assert points == sorted(points) and abs(points[0][0] - points[0][1] * steps) < 20
        assert len(points) * to.curves[expert].width > steps / 4 - 2 * to.curves[expert].width


def test_points_that_join_are_sent_anew(told):
    to, who = feed(10**6, experts=64), trainer()  # eight points each
    for step in range(1, 9):
        add(to, who, StepRecord(step, 1.0, 0.1, 0, 1.0))
    assert told[-1][1]["whole"] and told[-1][1]["points"][0] == [
        [1.5, 1.0], [3.5, 1.0], [5.5, 1.0], [7.5, 1.0]]


def test_no_node_no_message(told):
    from quanttune.host.loss_feed import LossFeed

    LossFeed(None, "run", 8).begin(trainer())
    assert told == []


def units(sampling):
    return (lambda t: t), 1000


SAMPLING = types.SimpleNamespace(timestep=lambda sigma: sigma * 100)


def at(to, timestep, sigmas=None, options=None):
    to.seen(torch.tensor([timestep]), {"sample_sigmas": sigmas} if options is None else options,
            SAMPLING, units)


def test_a_sampling_tells_its_steps_once_and_then_where_it_is(told):
    from quanttune.host.expert_feed import ExpertFeed

    to, sigmas = ExpertFeed(("6", "7")), torch.tensor([9.0, 5.0, 1.0, 0.0])
    for timestep in (900.0, 900.0, 500.0, 100.0):  # the second is the other half of guidance
        at(to, timestep, sigmas)
    messages = [m for _, m in told]
    assert [m["at"] for m in messages] == [0.9, 0.5, 0.1]
    assert messages[0]["steps"] == [0.9, 0.5, 0.1] and messages[0]["nodes"] == ["6", "7"]
    assert not any("steps" in m for m in messages[1:])
    at(to, 900.0, sigmas.clone())
    assert told[-1][1]["steps"] == [0.9, 0.5, 0.1]


def test_what_fails_stops_no_sampling(told):
    from quanttune.host.expert_feed import ExpertFeed

    for options in ({"sample_sigmas": "no tensor"}, {"sample_sigmas": torch.tensor(1.0)}):
        to = ExpertFeed(("6",))
        at(to, 900.0, options=options)
        assert told == [] and not to
    assert not ExpertFeed()


def test_files_tell_their_experts_by_their_headers_alone(host_folders, tmp_path):
    from quanttune.host.folders import register_folders
    from quanttune.host.live import experts_in
    from quanttune.quant import LayerScales, ScaleMetadata, ScaleSet, save_scale_set

    folder = host_folders / "models" / "quanttune_scales"
    folder.mkdir(parents=True, exist_ok=True)
    register_folders()
    scales = ScaleSet({"a": LayerScales(torch.ones(3, 4), None)}, 3, 500, ScaleMetadata())
    for path in (folder / "three.safetensors", tmp_path / "outside.safetensors"):
        save_scale_set(path, scales)
    whole = (folder / "three.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 3])
    (folder / "huge.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + whole[8:])
    (folder / "other.safetensors").write_bytes(b"no header at all")
    (folder / "many.safetensors").write_bytes(
        whole.replace(b'num_experts\\": 3', b'num_experts\\":-3'))
    assert experts_in("three.safetensors") == {"experts": 3, "timesteps": 500}
    outside = tmp_path / "outside.safetensors"
    for name in ("cut.safetensors", "huge.safetensors", "other.safetensors", "many.safetensors",
                 str(outside), "../../outside.safetensors", "", "none.safetensors", "\0"):
        assert experts_in(name) is None, name


@pytest.mark.parametrize("count,text", [
    (0.4002 * 2**30, "0.40 GiB"), (3.2 * 2**30, "3.20 GiB"), (20.5 * 2**20, "20.5 MiB"),
    (101.9 * 2**20, "102 MiB"), (3.29 * 2**20, "3.29 MiB"), (10 * 2**10, "10.0 KiB")])
def test_sizes_in_three_figures(comfy_inprocess, count, text):
    from quanttune.host.badge import size_text

    assert size_text(count) == text


def test_badges_tell_bits_and_size(comfy_inprocess):
    from quanttune.host.badge import badge_of, size_text
    from quanttune.tests.host import models

    with torch.inference_mode():
        model = models.small_model()
        quantized, _ = models.quantize(model)
        assert badge_of(model) == f"fp32 · {size_text(model.model_size())}"
        bits = {w.bits for w in models.quantized_model(quantized).checkpoint.layers.values()}
        assert badge_of(quantized) == f"{bits.pop()}-bit · {size_text(quantized.model_size())}"


@pytest.mark.parametrize("folder, told", [
    ("ComfyUI-QuantTune", False), ("comfyui_quanttune.v1.0", False), ("quanttune@1.0.0", False),
    ("Quant Tune v1.0", True), ("量子化", True), ("a%20b", True), ("a#b", True)])
def test_a_folder_that_the_host_cannot_serve_is_told(comfy_inprocess, caplog, folder, told):
    from quanttune.host.live import warn_of_name

    warn_of_name(folder)
    assert [folder in record.message for record in caplog.records] == [True] * told
