"""Training Images, Class Images and Train Scales as the executor runs them, on the starter."""

import csv

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node

pytestmark = pytest.mark.usefixtures("host_folders")


@pytest.fixture(scope="module")
def starter(comfy_inprocess):
    """Quantized starter UNet, CLIP and VAE."""
    nodes = pack_nodes()
    model, clip, vae = run_node(nodes["QuantTuneLoadStarterModel"]).args
    quantized = run_node(nodes["QuantTuneQuantizeUNet"], model=model, range="minmax").args[0]
    return quantized, clip, vae


@pytest.fixture
def nodes(host_folders):
    return pack_nodes()


@pytest.fixture
def images(nodes):
    return run_node(nodes["QuantTuneTrainingImages"], folder="starter: pip",
                    resolution=128).args[0]


def train(nodes, starter, images=None, **options):
    model, clip, vae = starter
    return run_node(nodes["QuantTuneTrainScales"], **{
        "model": model, "clip": clip, "vae": vae, "images": images, "run_name": "run",
        "steps": 6, "batch_size": 2, "save_every": 2, "preview_every": 3, "num_experts": 2,
        "validation_size": 128, "validation_steps": 2, **options})


def test_scales_pictures_losses_and_a_report_come_out(nodes, starter, images, host_folders):
    prompts = "a sks character on a red background\n\na red star"
    output = train(nodes, starter, images, validation_prompts=prompts)
    scales, grid, chart, loss_file, report = output.args
    assert scales.num_experts == 2 and scales.metadata.steps == 6
    assert scales.metadata.subject == "a sks character"
    assert scales.metadata.base_fingerprint and scales.metadata.bits == 4
    assert scales.metadata.extra["mode"] == "TuneQDM, 2 experts"
    assert any((layer.r_out != 1).any() for layer in scales.layers.values())
    assert "6 of 6 steps" in report
    with open(loss_file) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(float(r["loss"]) > 0 for r in rows)
    run = host_folders / "output" / "quanttune_runs" / "run"
    assert sorted(p.name for p in (run / "previews").iterdir()) == [
        f"step-{i:06}.png" for i in (0, 3, 6)]
    assert grid.shape[0] == 1 and grid.shape[2] > 3 * 128 and chart.shape[1:] == (432, 768, 3)
    assert {"images", "text"} <= set(output.ui)
    losses = output.ui["quanttune_losses"][0]
    assert (losses["run"], losses["step"], losses["experts"]) == ("run", 6, 2)
    # Two examples a step: both experts have a part in each, and its loss is their mean.
    assert [[step for step, _ in points] for points in losses["points"]] == [[*range(1, 7)]] * 2
    for row, (_, one), (_, other) in zip(rows, *losses["points"]):
        assert float(row["loss"]) == pytest.approx((one + other) / 2, rel=1e-3)


def test_what_was_trained_can_be_applied_and_saved(nodes, starter, images):
    scales = train(nodes, starter, images, learning_rate=0.05).args[0]
    routed = run_node(nodes["QuantTuneApplyScales"], model=starter[0],
                      scale_name="(connected scales)", scales=scales)
    assert "another base" not in str(routed.ui)
    saved = run_node(nodes["QuantTuneSaveScales"], scales=scales).args[0]
    again = run_node(nodes["QuantTuneLoadScales"], scale_name=saved.rsplit("/", 1)[1]).args[0]
    assert again.metadata == scales.metadata


def count(method, calls):
    """``method``, noting each call in ``calls``."""
    def counted(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)
    return counted


def test_stop_keeps_the_steps_so_far_and_queueing_again_goes_on(nodes, starter, images,
                                                                monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    from quanttune.training.trainer import ScaleTrainer

    whole = train(nodes, starter, images, run_name="whole").args[0]
    node = nodes["QuantTuneTrainScales"]
    new = node.fingerprint_inputs(run_name="stopped")
    asked = comfy.utils.ProgressBar.update_absolute

    def press_stop(bar, value, total=None, preview=None):
        if value == 3 and total == 6:
            management.interrupt_current_processing(True)
        return asked(bar, value, total, preview)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", press_stop)
        output = train(nodes, starter, images, run_name="stopped")
    assert not management.processing_interrupted(), "what follows in the graph still runs"
    assert output.args[0].metadata.steps == 3 and "queue again" in output.args[4]
    assert node.fingerprint_inputs(run_name="stopped") != new, "so the graph runs it again"
    with monkeypatch.context() as patch:
        patch.setattr(ScaleTrainer, "one_step", count(ScaleTrainer.one_step, taken := []))
        rest = train(nodes, starter, images, run_name="stopped").args[0]
    assert len(taken) == 3, "goes on instead of starting anew"
    assert rest.metadata.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(rest.tensors(), whole.tensors()))


def test_pictures_that_a_kill_has_cut_off_do_not_keep_a_run_from_going_on(nodes, starter, images,
                                                                          host_folders):
    options = {"validation_prompts": "a red star", "run_name": "cut"}
    whole = train(nodes, starter, images, **options).args[1]
    previews = host_folders / "output" / "quanttune_runs" / "cut" / "previews"
    path = previews / "step-000003.png"
    path.write_bytes(path.read_bytes()[:500])
    again = train(nodes, starter, images, **options).args[1]
    assert 0 < again.shape[2] < whole.shape[2], "one column less"


def test_previews_on_a_full_disk_leave_no_half_ones(nodes, starter, images, host_folders,
                                                    monkeypatch):
    from PIL import Image

    save = Image.Image.save

    def full(self, target, *arguments, **options):
        if "/previews/" not in str(target):
            return save(self, target, *arguments, **options)
        target.write_bytes(b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    grid = train(nodes, starter, images, validation_prompts="a red star").args[1]
    assert grid.shape[2] > 3 * 128, "the graph has them all the same"
    assert not list((host_folders / "output/quanttune_runs/run/previews").iterdir())


def test_starting_anew_forgets_the_run(nodes, starter, images):
    train(nodes, starter, images)
    output = train(nodes, starter, images, seed=1, if_run_exists="start anew")
    assert output.args[0].metadata.seed == 1


def test_class_images_are_made_once_and_train_beside_the_subject(nodes, starter, images,
                                                                 host_folders, monkeypatch):
    from quanttune.host import class_images

    model, clip, vae = starter
    arguments = {"model": model, "clip": clip, "vae": vae, "class_prompt": "a character",
                 "count": 2, "resolution": 128, "steps": 2}
    first = run_node(nodes["QuantTuneClassImages"], **arguments).args[0]
    assert first.prior == (True, True) and first.captions == ("a character",) * 2
    assert len(list((host_folders / "output" / "quanttune_class_images").rglob("*.png"))) == 2
    monkeypatch.setattr(class_images, "sample_pictures", None)
    again = run_node(nodes["QuantTuneClassImages"], **arguments).args[0]
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images))
    both = run_node(nodes["QuantTuneTrainingImages"], folder="starter: pip", resolution=128,
                    more=again).args[0]
    assert len(both.images) == 8 and both.prior.count(True) == 2
    assert train(nodes, starter, both, prior_weight=0.5).args[0].metadata.steps == 6


def test_two_subjects(nodes, starter, images):
    both = run_node(nodes["QuantTuneTrainingImages"], folder="starter: crest", resolution=128,
                    more=images).args[0]
    scales = train(nodes, starter, both).args[0]
    assert "zwx" in scales.metadata.subject and "sks" in scales.metadata.subject


def test_latents_and_conditioning_instead_of_images(nodes, starter):
    model, clip, _ = starter
    with torch.inference_mode():
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0]
                        for t in ("a sks dog", "a much longer sentence about a sks dog, asleep")]
    latents = {"samples": torch.randn(2, 4, 16, 16)}
    output = train(nodes, starter, latents=latents, conditioning=conditioning, clip=None,
                   vae=None)
    assert output.args[0].metadata.steps == 6


def test_latents_and_captions_are_encoded_once(nodes, starter, images, host_folders, monkeypatch):
    from quanttune.host import encode

    first = train(nodes, starter, images).args[0]
    cache = host_folders / "output" / "quanttune_runs" / ".cache"
    files = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert len(files) == 6 + len(set(images.captions)), "a file a picture and a caption"
    with monkeypatch.context() as patch:
        patch.setattr(encode, "conditions_of", None)
        patch.setattr(starter[2], "encode", None)
        second = train(nodes, starter, images, run_name="second").args[0]
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors()))
    assert files == {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    third = train(nodes, starter, images, run_name="third").args[0]
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), third.tensors()))


def test_a_text_encoder_with_a_lora_or_another_layer_reads_captions_anew(starter):
    from quanttune.host.encode import reader_of

    model, clip, _ = starter
    plain, skipped, patched = clip.clone(), clip.clone(), clip.clone()
    skipped.clip_layer(-2)
    name = next(k for k in clip.patcher.model_state_dict() if k.endswith("q_proj.weight"))
    weight = clip.patcher.model_state_dict()[name]
    patched.add_patches({name: ("diff", (torch.ones_like(weight),))})
    assert reader_of(model, plain) == reader_of(model, clip)
    assert len({reader_of(model, c) for c in (clip, skipped, patched)}) == 3


def test_a_bypass_lora_is_told_apart_by_what_it_does(starter):
    """It is no patch of a weight, and changes captions and class images all the same."""
    import comfy.sd

    from quanttune.host.class_images import _folder
    from quanttune.host.encode import reader_of
    from quanttune.host.lora_file import export_lora
    from quanttune.host.pictures import SamplingSettings
    from quanttune.tests.host.lora_models import random_layers

    model, clip, vae = starter

    def with_bypass(strength=1.0, seed=5):
        lora = export_lora(random_layers(model, clip=clip, seed=seed), model, clip)
        return comfy.sd.load_bypass_lora_for_models(model, clip, lora, strength, strength)

    def folder(patcher):
        return _folder(patcher, clip, vae, "a dog", SamplingSettings(64, 64, 2))

    first, again, weaker, other = (with_bypass(*a) for a in ((), (), (0.5,), (1.0, 6)))
    for key in (lambda pair: reader_of(model, pair[1]), lambda pair: folder(pair[0])):
        assert len({key(p) for p in ((model, clip), first, weaker, other)}) == 4
        assert key(first) == key(again), "whoever loaded it and when"

    unknown, another = clip.clone(), clip.clone()
    for own in (unknown, another):
        injection = comfy.patcher_extension.PatcherInjection(lambda _: None, lambda _: None)
        own.patcher.set_injections("another pack's", [injection])
    assert len({reader_of(model, c) for c in (clip, unknown, unknown.clone(), another)}) == 3


REFUSED = {
    "nothing connected": ({"images": None}, "nothing to train on"),
    "no CLIP": ({"clip": None}, "need a CLIP and a VAE"),
    "run name": ({"run_name": "../outside"}, "run name"),
    "long run name": ({"run_name": "字" * 100}, "run name.*too long"),
    "reserved run name": ({"run_name": "Con.txt"}, "run name.*Windows"),
    "empty run name": ({"run_name": ""}, "run name"),
    "too many experts": ({"num_experts": 50}, "50 experts"),
    "timesteps": ({"first_timestep": 0.9, "last_timestep": 0.1}, "timestep_range"),
    "float model": ({"model": "float"}, "Quantize UNet"),
    "different numbers": ({"images": None, "latents": {"samples": torch.zeros(3, 4, 16, 16)},
                           "conditioning": [[torch.zeros(1, 32, 128), {}]] * 2}, "3 latents and 2"),
    "NaN latents": ({"images": None,
                     "latents": {"samples": torch.full((1, 4, 16, 16), float("nan"))},
                     "conditioning": [[torch.zeros(1, 32, 128), {}]]}, "NaN"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_input_is_one_sentence(case, nodes, starter, images):
    from quanttune.quant import QuantTuneError

    options, match = REFUSED[case]
    if options.get("model") == "float":
        options = {"model": run_node(nodes["QuantTuneLoadStarterModel"]).args[0]}
    with pytest.raises(QuantTuneError, match=match) as caught:
        train(nodes, starter, **{"images": images, **options})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_an_empty_class_prompt(nodes, starter):
    from quanttune.quant import QuantTuneError

    model, clip, vae = starter
    with pytest.raises(QuantTuneError, match="class prompt is empty"):
        run_node(nodes["QuantTuneClassImages"], model=model, clip=clip, vae=vae)


def test_starting_anew_deletes_nothing_before_it_is_certain(nodes, starter, images, host_folders):
    train(nodes, starter, images, preview_every=0)
    state = host_folders / "output" / "quanttune_runs" / "run" / "checkpoint.pt"
    before = state.read_bytes()
    floats = run_node(nodes["QuantTuneLoadStarterModel"]).args
    with pytest.raises(Exception, match="only be trained on a quantized"):
        train(nodes, floats, images, if_run_exists="start anew")
    assert state.read_bytes() == before
    again = train(nodes, starter, images, preview_every=0, steps=3, if_run_exists="start anew")
    assert "3 of 3 steps" in again.args[4]


@pytest.mark.parametrize("choice", ["continue", "start anew"])
def test_a_run_that_another_program_trains_is_left_alone(choice, nodes, starter, images,
                                                         host_folders):
    from quanttune.training.run_lock import alone

    train(nodes, starter, images, preview_every=0, steps=2)
    folder = host_folders / "output" / "quanttune_runs" / "run"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with alone(folder), pytest.raises(Exception, match="'run' in .* by another program"):
        train(nodes, starter, images, preview_every=0, steps=2, if_run_exists=choice)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert "2 of 2 steps" in train(nodes, starter, images, preview_every=0, steps=2,
                                   if_run_exists=choice).args[4]


def test_stopped_after_starting_anew_the_report_says_how_to_go_on(nodes, starter, images,
                                                                  monkeypatch):
    import comfy.model_management
    import comfy.utils

    def press(bar, value, total=None, preview=None):
        if total == 6 and value == 2:
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", press)
    report = train(nodes, starter, images, preview_every=0, if_run_exists="start anew").args[4]
    assert "set if_run_exists to 'continue'" in report


def test_class_images_of_another_model_are_made_anew(nodes, starter, host_folders):
    model, clip, vae = run_node(nodes["QuantTuneLoadStarterModel"]).args
    other = model.clone()
    state = model.model.diffusion_model.state_dict()
    other.add_patches({f"diffusion_model.{k}": (torch.zeros_like(v),) for k, v in state.items()},
                      0.0, 0.0)
    made = [run_node(nodes["QuantTuneClassImages"], model=m, clip=clip, vae=vae, count=1, steps=2,
                     class_prompt="a star", resolution=64).args[0].images[0]
            for m in (model, other)]
    assert not torch.equal(*made)


def test_class_images_of_a_folder_name_what_was_left_out(nodes, starter, host_folders):
    from PIL import Image

    model, clip, vae = starter
    folder = host_folders / "input" / "kind"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    node = nodes["QuantTuneClassImages"]
    before = node.fingerprint_inputs(folder_path="kind")
    (folder / "b.png").write_bytes(b"junk")
    assert node.fingerprint_inputs(folder_path="kind") != before
    output = run_node(node, model=model, clip=clip, vae=vae, class_prompt="a star",
                      folder_path="kind", resolution=64)
    assert "b.png was left out" in str(output.ui["text"])


def test_previews_of_other_prompts_are_not_shown_as_these(nodes, starter, images, monkeypatch):
    import comfy.model_management
    import comfy.utils

    asked = comfy.utils.ProgressBar.update_absolute

    def press(bar, value, total=None, preview=None):
        if total == 6 and value == 3:
            comfy.model_management.interrupt_current_processing(True)
        return asked(bar, value, total, preview)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", press)
        first = train(nodes, starter, images, validation_prompts="a star\na moon",
                      validation_size=64, validation_steps=1).args[1]
    last = train(nodes, starter, images, validation_prompts="a heart", validation_size=64,
                 validation_steps=1).args[1]
    assert last.shape[2] < first.shape[2], "only the round after the last step"
