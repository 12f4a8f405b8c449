"""LoRA Train as the executor runs it, on the starter."""

import csv
import os

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node

pytestmark = pytest.mark.usefixtures("host_folders")


@pytest.fixture(scope="module")
def starter(comfy_inprocess):
    """Quantized starter UNet, CLIP, VAE and the float UNet."""
    nodes = pack_nodes()
    model, clip, vae = run_node(nodes["QuantTuneLoadStarterModel"]).args
    quantized = run_node(nodes["QuantTuneQuantizeUNet"], model=model, range="minmax").args[0]
    return quantized, clip, vae, model


@pytest.fixture
def nodes(host_folders):
    import folder_paths

    # What the host's main does.
    folder_paths.add_model_folder_path(
        "loras", os.path.join(folder_paths.get_output_directory(), "loras"))
    return pack_nodes()


@pytest.fixture
def images(nodes):
    return run_node(nodes["QuantTuneTrainingImages"], folder="starter: pip",
                    resolution=128).args[0]


def train(nodes, starter, images=None, **options):
    quantized, clip, vae, _ = starter
    return run_node(nodes["QuantTuneLoraTrain"], **{
        "model": quantized, "clip": clip, "vae": vae, "images": images, "run_name": "run",
        "steps": 6, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "save_every": 2,
        "preview_every": 3, "validation_size": 128, "validation_steps": 2, **options})


@pytest.mark.parametrize("options", [
    {}, {"train_text_encoder": True, "dropout": 0.1}, {"dora": True, "targets": "all layers"},
    {"base": "NF4", "optimizer": "adamw8bit"}], ids=["4 bits", "text encoder", "DoRA", "NF4"])
def test_a_lora_pictures_losses_and_a_report_come_out(options, nodes, starter, images,
                                                      host_folders):
    model = starter[3] if options.get("base") else starter[0]
    output = train(nodes, starter, images, model=model, **options,
                   validation_prompts="a sks character on a red background\n\na red star")
    lora, grid, chart, loss_file, report = output.args
    assert lora.metadata["ss_output_name"] == "run"
    assert any(k.endswith(".lora_up.weight") and v.any() for k, v in lora.items())
    assert any(k.startswith("lora_te") for k in lora) == bool(options.get("train_text_encoder"))
    assert "6 of 6 steps" in report
    with open(loss_file) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(float(r["loss"]) > 0 for r in rows)
    run = host_folders / "output" / "quanttune_runs" / "run"
    assert sorted(p.name for p in (run / "previews").iterdir()) == [
        f"step-{i:06}.png" for i in (0, 3, 6)]
    assert grid.shape[0] == 1 and grid.shape[2] > 3 * 128 and chart.shape[1:] == (432, 768, 3)
    assert {"images", "text"} <= set(output.ui)
    assert [step for step, _ in output.ui["quanttune_losses"][0]["points"][0]] == [
        int(r["step"]) for r in rows]


def test_epochs_take_the_place_of_steps(nodes, starter, images):
    report = train(nodes, starter, images, epochs=2, batch_size=4, preview_every=0).args[4]
    assert "4 of 4 steps" in report, "six pictures are two batches"


def test_stop_keeps_the_steps_so_far_and_queueing_again_goes_on(nodes, starter, images,
                                                                monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    whole = train(nodes, starter, images, run_name="whole").args[0]
    node = nodes["QuantTuneLoraTrain"]
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
    assert output.args[0].metadata["ss_steps"] == "3" and "queue again" in output.args[4]
    assert node.fingerprint_inputs(run_name="stopped") != new, "so the graph runs it again"
    rest = train(nodes, starter, images, run_name="stopped").args[0]
    assert rest.keys() == whole.keys() and all(torch.equal(rest[k], whole[k]) for k in whole)


def test_a_lora_file_is_trained_on_in_a_graph(nodes, starter, images):
    """By 'Load LoRA (quantized)': to what the LoRA that was never saved comes to."""
    options = {"preview_every": 0, "steps": 2}
    first = train(nodes, starter, images, **options).args[0]
    path, = run_node(nodes["QuantTuneSaveLora"], lora=first, dtype="float32").args
    *_, loaded = run_node(nodes["QuantTuneLoadLora"], model=starter[0],
                          lora_name=os.path.basename(path)).args
    ends = [train(nodes, starter, images, run_name=name, start_from=start, **options).args[0]
            for name, start in (("from-memory", first), ("from-file", loaded))]
    key = next(k for k in first if k.endswith("lora_up.weight"))
    assert ends[0].keys() == ends[1].keys() and not torch.equal(ends[0][key], first[key])
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_latents_and_conditioning_in_place_of_images(nodes, starter):
    quantized, clip, *_ = starter
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))
    output = train(nodes, starter, latents={"samples": torch.randn(2, 4, 32, 32)},
                   conditioning=conditioning, clip=None, vae=None, preview_every=0)
    assert "6 of 6 steps" in output.args[4]


def test_a_run_that_another_program_trains_is_left_alone(nodes, starter, images, host_folders):
    from quanttune.training.run_lock import alone

    folder = host_folders / "output" / "quanttune_runs" / "run"
    with alone(folder), pytest.raises(ValueError, match="'run' in .* by another program"):
        train(nodes, starter, images, preview_every=0)
    assert not folder.exists()


@pytest.mark.parametrize("options,match", [
    ({"images": None}, "nothing to train on"), ({"clip": None}, "need a CLIP and a VAE"),
    ({"learning_rate": 0.0}, "learning_rate"), ({"run_name": "../x"}, "cannot be a folder name"),
])
def test_what_is_missing_is_told(options, match, nodes, starter, images, host_folders):
    with pytest.raises(ValueError, match=match):
        train(nodes, starter, **{"images": images, **options})
    assert not list((host_folders / "output").glob("quanttune_runs/*/*"))
