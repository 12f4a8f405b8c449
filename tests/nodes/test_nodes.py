"""The nodes as the executor runs them: what they return, what they show, what they refuse."""

import json
import re
import struct

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.host import models


@pytest.fixture
def nodes(comfy_inprocess, host_folders):
    from quanttune.host.folders import register_folders

    register_folders()
    return pack_nodes()


@pytest.fixture
def quantized(nodes):
    with torch.inference_mode():
        return run_node(nodes["QuantTuneQuantizeUNet"], model=models.small_model()).args[0]


def saved(nodes, quantized, folder="quanttune"):
    """Path of ``quantized`` after Save Quantized UNet, under a name the load node lists."""
    with torch.inference_mode():
        output = run_node(nodes["QuantTuneSaveQuantizedUNet"], model=quantized,
                          filename_prefix=f"{folder}/m")
    return output.args[0]


def test_quantize_reports_and_shows_it(nodes):
    with torch.inference_mode():
        output = run_node(nodes["QuantTuneQuantizeUNet"], model=models.small_model(), bits="8")
    model, report = output.args
    assert "layers quantized" in report and report in output.ui["text"]
    assert re.fullmatch(r"8-bit · [\d.]+ [KM]iB", output.ui["quanttune_badge"][0])
    assert {w.bits for w in models.quantized_model(model).checkpoint.layers.values()} == {8}


@pytest.mark.parametrize("pattern", ["", "  ", " , "])
def test_an_empty_pattern_is_not_taken_for_none(pattern, nodes):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="pattern is empty"):
        run_node(nodes["QuantTuneQuantizeUNet"], model=models.small_model(), keep_float="pattern",
                 pattern=pattern)


def test_dynamic_int8_says_what_runs(nodes, integer_products):
    with torch.inference_mode():
        output = run_node(nodes["QuantTuneDynamicInt8"], model=models.small_model(),
                          precision="float32")
        model, note = output.args
        arguments = models.inputs(model)
        assert models.forward(model, arguments).isfinite().all()
    assert "integer" in note.lower() and note in output.ui["text"]
    assert re.fullmatch(r"8-bit · INT8 · [\d.]+ [KM]iB", output.ui["quanttune_badge"][0])
    assert models.quantized_model(model) is not None


def test_calibrate_then_train_from_prompts(nodes, integer_products):
    with torch.inference_mode():
        model, clip, _ = run_node(nodes["QuantTuneLoadStarterModel"]).args
        common = {"latent": {"samples": torch.zeros(1, 4, 16, 16)}, "clip": clip, "samples": 4,
                  "steps": 2, "precision": "float32",
                  "prompts": "a red star on a blue background\n\n  a green circle  \n"}
        calibrated = run_node(nodes["QuantTuneCalibrateInt8"], model=model, bits="4", **common)
        assert "4 bits" not in calibrated.args[1] and "2 prompts" in calibrated.args[1]
        assert "static ranges" in json.dumps(calibrated.ui)
        trained = run_node(nodes["QuantTuneTrainQat"], model=calibrated.args[0], reference=model,
                           train_steps=2, run_name="t", **{**common, "precision": "fp32"})
        fast, chart, report = trained.args
        assert chart.ndim == 4 and "2 of 2 steps" in report and "true integers" in report
        assert trained.ui["quanttune_badge"] == calibrated.ui["quanttune_badge"]
        losses = trained.ui["quanttune_losses"][0]
        assert (losses["run"], losses["steps"], losses["experts"]) == ("t", 2, 1)
        assert [step for step, _ in losses["points"][0]] == [1, 2]
        assert models.quantized_model(fast).checkpoint.ranges.num_buckets == 4
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        context = clip.encode_from_tokens(clip.tokenize("a red star"))
        answer = models.forward(fast, {"x": noise, "timesteps": torch.tensor([500.0]),
                                       "context": context})
    assert answer.isfinite().all()


def test_save_for_stock_writes_where_it_says(nodes):
    with torch.inference_mode():
        quantized = run_node(nodes["QuantTuneQuantizeUNet"], model=models.small_model(), bits="8",
                             symmetric=True).args[0]
        output = run_node(nodes["QuantTuneSaveForStock"], model=quantized,
                          filename_prefix="diffusion_models/m")
    assert output.args[0].endswith(".safetensors")
    with open(output.args[0], "rb") as file:
        assert struct.unpack("<Q", file.read(8))[0] > 100
    assert "Linear layers in INT8" in json.dumps(output.ui.as_dict())


def test_save_then_load_through_the_lists(nodes, quantized):
    path = saved(nodes, quantized)
    name = path.rsplit("/", 1)[1]
    options = nodes["QuantTuneLoadQuantizedUNet"].GET_SCHEMA().inputs[0].options
    assert name in options
    with torch.inference_mode():
        loaded = run_node(nodes["QuantTuneLoadQuantizedUNet"], unet_name=name).args[0]
        arguments = models.inputs(quantized)
        assert torch.equal(models.forward(loaded, arguments), models.forward(quantized, arguments))


def test_a_replaced_file_is_loaded_again(nodes, quantized):
    path = saved(nodes, quantized)
    loader = nodes["QuantTuneLoadQuantizedUNet"]
    name = path.rsplit("/", 1)[1]
    before = loader.fingerprint_inputs(name)
    assert before == loader.fingerprint_inputs(name)
    with open(path, "ab") as file:
        file.write(b"x")
    assert before != loader.fingerprint_inputs(name)


def test_scales_from_a_file_and_from_a_socket_are_the_same(nodes, quantized):
    scales = models.random_scales(quantized)
    path = run_node(nodes["QuantTuneSaveScales"], scales=scales).args[0]
    name = path.rsplit("/", 1)[1]
    apply = nodes["QuantTuneApplyScales"]
    assert name in apply.GET_SCHEMA().inputs[1].options
    again = run_node(nodes["QuantTuneLoadScales"], scale_name=name).args[0]
    arguments = models.inputs(quantized)
    with torch.inference_mode():
        base = models.forward(quantized, arguments)
        outputs = [
            models.forward(run_node(apply, model=quantized, strength=1.0, **how).args[0], arguments)
            for how in ({"scale_name": name},
                        {"scale_name": "(connected scales)", "scales": scales},
                        {"scale_name": "(connected scales)", "scales": again})]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert models.relative(outputs[0], base) > 1e-3


def test_apply_without_scales_says_what_to_do(nodes, quantized):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="connect 'Load TuneQDM Scales'"):
        run_node(nodes["QuantTuneApplyScales"], model=quantized, scale_name="(connected scales)")


def truncated(data):
    return data[: len(data) // 2]


def empty(data):
    return b""


def not_safetensors(data):
    return b"hello, I am a text file and not a model\n" * 50


def pickled(data):
    import pickle

    return pickle.dumps({"state_dict": {}}) * 20


def edited(change):
    """A corruption of the header: ``change(header)`` edits the parsed metadata of the pack."""
    def corrupt(data):
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8: 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size:]
    return corrupt


def metadata(change):
    """A corruption of the pack's own JSON inside the header."""
    def edit(header):
        inner = json.loads(header["__metadata__"]["quanttune"])
        change(inner)
        header["__metadata__"]["quanttune"] = json.dumps(inner)
    return edited(edit)


def huge_header(data):
    return struct.pack("<Q", 2**62) + data[8:]


def wrong_bits(inner):
    inner["layers"]["out.2"]["bits"] = 5


def other_bits(inner):
    inner["layers"]["out.2"]["bits"] = 8


def missing_layer(inner):
    del inner["layers"]["out.2"]


def gigantic(inner):
    inner["layers"]["out.2"]["shape"] = [2**30, 2**30]


def family(inner):
    inner["family"] = "SD99"


def version(inner):
    inner["format_version"] = 99


def setting(where, key, value):
    """A corruption of one number or word of the model's description."""
    def change(inner):
        place = inner if where is None else inner[where]
        assert where == "sampling_settings" or key == "latent_preview" or key in place
        place[key] = value
    return metadata(change)


def plain_float(header):
    del header["__metadata__"]


BAD_UNETS = {
    "truncated": truncated, "zero-length": empty, "not safetensors": not_safetensors,
    "pickled": pickled, "huge header": huge_header, "wrong bits": metadata(wrong_bits),
    "other bits": metadata(other_bits), "missing layer": metadata(missing_layer),
    "gigantic shape": metadata(gigantic), "wrong family": metadata(family),
    "newer version": metadata(version), "no metadata": edited(plain_float),
    "prediction type": setting(None, "model_type", "TELEPATHY"),
    "latent format": setting(None, "latent_format", "torch"),
    "latent format's kind": setting(None, "latent_format", 3),
    "preview of another size": setting(None, "latent_preview", {"factors": [[1, 1, 1]]}),
    "preview's kind": setting(None, "latent_preview", [1]),
    "NaN preview": setting(None, "latent_preview", {"factors": [[float("nan")] * 3] * 4}),
    "preview's bias": setting(None, "latent_preview", {"factors": [[1, 0, 0]] * 4, "bias": "red"}),
    "no levels": setting("unet_config", "transformer_depth", []),
    "endless depth": setting("unet_config", "transformer_depth_middle", 10**9),
    "negative width": setting("unet_config", "model_channels", -32),
    "vast width": setting("unet_config", "model_channels", 32 * 10**5),
    "infinite width": setting("unet_config", "context_dim", float("inf")),
    "vast schedule": setting("sampling_settings", "timesteps", 10**13),
    "NaN schedule": setting("sampling_settings", "linear_start", float("nan")),
}


@pytest.mark.parametrize("kind", list(BAD_UNETS))
def test_bad_unet_files_name_themselves_in_one_sentence(kind, nodes, quantized):
    from quanttune.quant import QuantTuneError

    path = saved(nodes, quantized)
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(BAD_UNETS[kind](data))
    name = path.rsplit("/", 1)[1]
    with pytest.raises(QuantTuneError) as caught:
        run_node(nodes["QuantTuneLoadQuantizedUNet"], unet_name=name)
    one_sentence(str(caught.value), name)


def one_sentence(message, name):
    assert name in message, message
    assert "\n" not in message and message.endswith(".") and len(message) < 500, message


def set_nan(header, data):
    """Offset of the first scale in a scale file, to put NaN there."""
    key = next(k for k in header if k.endswith(".r_out"))
    return header[key]["data_offsets"][0]


def nan_scale(data):
    size = struct.unpack("<Q", data[:8])[0]
    at = 8 + size + set_nan(json.loads(data[8: 8 + size]), data)
    return data[:at] + struct.pack("<f", float("nan")) + data[at + 4:]


def no_experts(inner):
    inner["num_experts"] = 0


BAD_SCALES = {
    "truncated": truncated, "zero-length": empty, "not safetensors": not_safetensors,
    "pickled": pickled, "NaN": nan_scale, "N = 0": metadata(no_experts),
    "newer version": metadata(version), "no metadata": edited(plain_float),
}


@pytest.mark.parametrize("kind", list(BAD_SCALES))
def test_bad_scale_files_name_themselves_in_one_sentence(kind, nodes, quantized):
    from quanttune.quant import QuantTuneError

    path = run_node(nodes["QuantTuneSaveScales"], scales=models.random_scales(quantized)).args[0]
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(BAD_SCALES[kind](data))
    name = path.rsplit("/", 1)[1]
    with pytest.raises(QuantTuneError) as caught:
        run_node(nodes["QuantTuneApplyScales"], model=quantized, scale_name=name)
    one_sentence(str(caught.value), name)


def test_each_kind_of_file_given_to_the_other_loader(nodes, quantized, host_folders):
    import shutil

    from quanttune.quant import QuantTuneError

    unet = saved(nodes, quantized)
    scales = run_node(nodes["QuantTuneSaveScales"], scales=models.random_scales(quantized)).args[0]
    shutil.copy(unet, host_folders / "output" / "quanttune_scales" / "really_a_unet.safetensors")
    shutil.copy(scales, host_folders / "output" / "quanttune" / "really_scales.safetensors")
    with pytest.raises(QuantTuneError, match="really_scales"):
        run_node(nodes["QuantTuneLoadQuantizedUNet"], unet_name="really_scales.safetensors")
    with pytest.raises(QuantTuneError, match="really_a_unet"):
        run_node(nodes["QuantTuneLoadScales"], scale_name="really_a_unet.safetensors")


@pytest.mark.parametrize("error", [28, 30, 13])
def test_a_full_or_read_only_folder_leaves_nothing_behind(error, nodes, quantized, host_folders,
                                                          monkeypatch):
    import os

    from quanttune.quant import QuantTuneError

    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    scales = models.random_scales(quantized)
    for node, inputs in (("QuantTuneSaveQuantizedUNet", {"model": quantized}),
                         ("QuantTuneSaveScales", {"scales": scales})):
        with pytest.raises(QuantTuneError) as caught:
            run_node(nodes[node], **inputs)
        assert ".safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not [p for p in (host_folders / "output").rglob("*") if p.is_file()]


def test_a_file_that_vanished(nodes):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match=r"gone\.safetensors.*models/quanttune"):
        run_node(nodes["QuantTuneLoadQuantizedUNet"], unet_name="gone.safetensors")


def test_layer_times_then_a_plan_of_a_time_then_integers(nodes, integer_products):
    model = models.small_model()
    row = [[torch.zeros(1, 7, 24), {}]]
    common = {"model": model, "latent": {"samples": torch.zeros(1, 4, 8, 8)}, "positive": row}
    timed = run_node(nodes["QuantTuneLayerTimes"], rounds=1, precision="float32", **common)
    times, chart, report = timed.args
    assert chart.ndim == 4 and "the least that a plan can have" in report
    assert "least that a plan" in json.dumps(timed.ui)
    found = run_node(nodes["QuantTuneLayerSensitivity"], forwards=1, samples=1, steps=1, int8=True,
                     bits_4=False, unit="group", **common).args[0]
    # The machine's own times may let no layer gain; these do.
    integers = {n: None if s is None else times.floats[n] / 2 for n, s in times.integers.items()}
    times = type(times)(times.shapes, times.floats, integers, times.step, times.precision)
    share = round(times.share(times.fastest()) + 0.01, 3)
    plan, _, report = run_node(nodes["QuantTuneBitPlan"], model=model, sensitivity=found,
                               times=times, budget="time", time=share).args
    assert "Expected time" in report
    sized, _, report = run_node(nodes["QuantTuneBitPlan"], model=model, sensitivity=found,
                                bits_per_weight=9.0).args
    assert "Expected time" not in report and 8 in sized.bits.values()
    output = run_node(nodes["QuantTuneDynamicInt8"], model=model, precision="float32", plan=plan)
    layers = models.quantized_model(output.args[0]).checkpoint.layers
    assert set(layers) == {n for n, bits in plan.bits.items() if bits == 8}
