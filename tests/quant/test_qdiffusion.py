"""Checkpoints of Q-Diffusion: every integer of synthetic files, hostile files, and memory."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from quanttune.quant import (
    QuantTuneError,
    UNetMetadata,
    fingerprint,
    is_qdiffusion,
    load_qdiffusion,
    load_quantized_unet,
    save_quantized_unet,
    torch_archive,
)
from quanttune.quant.qdiffusion import DOUBTFUL_CUT, MOST_CUT
from quanttune.quant.tensor_file import load_unpickled
from quanttune.tests.quant.qdiffusion_files import (
    UNET,
    expected_codes,
    expected_weight,
    synthetic,
    with_activations,
)

SPLIT = "output_blocks.0.0.skip_connection"
LINEAR = "time_embed.0"


def saved(state, tmp_path, name="file.pth"):
    path = tmp_path / name
    torch.save(state, path)
    return path


def check_all(state, path, bits, declared=None, prefix="model."):
    found = load_qdiffusion(path, declared)
    assert found.bits == bits
    assert set(found.layers) == set(UNET)
    for name, (shape, split) in UNET.items():
        layer = found.layers[name]
        expected = expected_codes(state, name, bits, prefix)
        assert torch.equal(layer.codes().float(), expected.flatten(1)), name
        weight = layer.dequantize()
        assert (weight.dtype, weight.shape) == (torch.float32, torch.Size(shape))
        assert torch.equal(weight, expected_weight(state, name, bits, prefix)), name
        assert (layer.split, layer.bits, layer.shape) == (split, bits, shape)
    return found


@pytest.mark.parametrize("alpha", [True, False], ids=["adaround", "nearest"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_integer_is_the_authors(bits, alpha, tmp_path):
    state = synthetic(bits, alpha=alpha, seed=bits)
    check_all(state, saved(state, tmp_path), bits)


def test_zero_points_outside_of_the_range_are_kept(tmp_path):
    state = synthetic(4)
    layer = load_qdiffusion(saved(state, tmp_path)).layers[LINEAR]
    low, high = torch.aminmax(layer.zero_point)
    assert low < 0 and high > 15
    key = f"model.{LINEAR}.weight_quantizer.zero_point"
    assert torch.equal(layer.zero_point, state[key])


@pytest.mark.parametrize(
    "prefix", ["", "model.", "model.diffusion_model.", "module.model._orig_mod."]
)
def test_names_have_no_prefix(prefix, tmp_path):
    state = synthetic(4, prefix=prefix)
    found = check_all(state, saved(state, tmp_path), 4, prefix=prefix)
    assert torch.equal(found.floats[f"{LINEAR}.bias"], state[f"{prefix}{LINEAR}.bias"])
    assert set(found.floats) == {*(f"{name}.bias" for name in UNET), "out.0.weight"}


def test_the_other_models_of_a_pipeline_are_left_out(tmp_path):
    state = synthetic(4, prefix="model.diffusion_model.")
    state |= {
        "first_stage_model.conv_in.weight": torch.ones(4),
        "betas": torch.ones(9),
        "model_ema.out2weight": torch.ones(3),
    }
    found = check_all(state, saved(state, tmp_path), 4, prefix="model.diffusion_model.")
    assert set(found.floats) == {*(f"{name}.bias" for name in UNET), "out.0.weight"}


@pytest.mark.parametrize(
    "other",
    [
        {"out.0.weight": torch.full((4,), 50.0)},
        {f"{LINEAR}.weight": torch.ones(12, 8)},
        synthetic(4, seed=1, prefix="module."),
        synthetic(4, seed=1, prefix=""),
    ],
    ids=["a float", "a layer's weight", "a model", "a bare model"],
)
def test_two_models_in_one_file(other, tmp_path):
    path = saved({**synthetic(4), **other}, tmp_path)
    with pytest.raises(QuantTuneError, match="names of more than one model") as caught:
        load_qdiffusion(path)
    assert "'model." in str(caught.value)


def test_quantizers_of_activations_are_left_out(tmp_path):
    state = with_activations(synthetic(8))
    found = check_all(state, saved(state, tmp_path), 8)
    assert set(found.floats) == {*(f"{name}.bias" for name in UNET), "out.0.weight"}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_trainers_wrapping_and_other_types_are_read(key, tmp_path):
    state = {k: torch.nn.Parameter(v) for k, v in synthetic(4).items()}
    path = saved({key: state, "epoch": 3}, tmp_path)
    check_all({k: v.detach() for k, v in state.items()}, path, 4)
    half = {k: v.half() if k.endswith("alpha") else v for k, v in synthetic(4).items()}
    check_all(half, saved(half, tmp_path, "half.pt"), 4)


def test_views_and_other_memory_formats_are_read(tmp_path):
    state = synthetic(4)
    key = "model.input_blocks.0.0.weight"
    state[key] = state[key].to(memory_format=torch.channels_last)
    key = f"model.{LINEAR}.weight"
    state[key] = torch.cat([torch.zeros(2, 8), state[key]])[2:]
    assert state[key].storage_offset()
    check_all(state, saved(state, tmp_path), 4)


def test_a_torch_that_gives_no_offsets_maps_the_file(tmp_path, monkeypatch):
    real, asked = torch.load, []

    def older(path, *args, **options):
        asked.append(options)
        found = real(path, *args, **options)
        for tensor in found.values():
            tensor.untyped_storage()._checkpoint_offset = None
        return found

    monkeypatch.setattr(torch_archive.torch, "load", older)
    state = synthetic(4)
    check_all(state, saved(state, tmp_path), 4)
    assert asked[-1]["mmap"] and all(o["weights_only"] for o in asked)


def test_the_median_channel_tells_the_bits_and_an_input_overrides(tmp_path):
    state = synthetic(4)
    for name in list(UNET)[:2]:  # two layers of wide channels do not change the median
        state[f"model.{name}.weight_quantizer.delta"] /= 40
    path = saved(state, tmp_path)
    found = load_qdiffusion(path)
    assert found.bits == 4 and found.doubtful == list(UNET)[:2]
    # Weights that a search of the step clipped hard look like more bits than they have.
    clipped = {k: v / 1.5 if k.endswith("delta") else v for k, v in synthetic(3).items()}
    path = saved(clipped, tmp_path, "clipped.pth")
    assert load_qdiffusion(path).bits == 4
    check_all(clipped, path, 3, declared=3)


@pytest.mark.parametrize("bits, declared", [(4, 2), (8, 4), (8, 3), (8, 2)])
def test_too_few_bits_are_refused(bits, declared, tmp_path):
    """Most weights would be cut off at the end of the range."""
    path = saved(synthetic(bits, seed=bits), tmp_path)
    with pytest.raises(QuantTuneError, match=f"cannot have {declared} bits: [0-9]+%") as told:
        load_qdiffusion(path, declared)
    message = str(told.value)
    assert f"set bits to {bits} or leave it" in message and message.count(". ") == 0


@pytest.mark.parametrize("bits, declared", [(4, 3), (3, 2)])
def test_one_bit_too_few_is_taken_and_noted(bits, declared, tmp_path):
    state = synthetic(bits, seed=bits)
    found = check_all(state, saved(state, tmp_path), declared, declared=declared)
    assert DOUBTFUL_CUT < found.cut < MOST_CUT


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_that_are_the_files_cut_nothing_off(bits, tmp_path):
    state = synthetic(bits, seed=bits)
    path = saved(state, tmp_path)
    assert load_qdiffusion(path, bits).cut < 0.02
    assert load_qdiffusion(path).cut == load_qdiffusion(path, bits).cut
    # Steps that were searched for the least error cut the tails off.
    for key in [k for k in state if k.endswith("delta")]:
        state[key] /= 1.3
        zero = key.replace("delta", "zero_point")
        state[zero] = (state[zero] * 1.3 - 0.15 * 2**bits).round()
    cut = load_qdiffusion(saved(state, tmp_path, "searched.pth"), bits).cut
    assert 0 < cut < DOUBTFUL_CUT


def test_zero_points_of_another_file(tmp_path):
    state = synthetic(4)
    for key in [k for k in state if k.endswith("zero_point")]:
        state[key] += 99
    path = saved(state, tmp_path)
    with pytest.raises(QuantTuneError, match="100% of its weights.*; download it again"):
        load_qdiffusion(path, 4)
    with pytest.raises(QuantTuneError, match="4 bits, which its weights look like: 100% of its "
                       "weights.*; set bits to those that it was made with, download it again"):
        load_qdiffusion(path)


def test_bits_that_were_found_may_be_too_few_as_well(tmp_path):
    """Weights that span 32 of 256 steps look like 4 bits, which do not hold their upper half."""
    state = synthetic(8)
    for key in [k for k in state if k.endswith("delta")]:
        state[key] *= 8
        zero = key.replace("delta", "zero_point")
        state[zero] = (state[zero] / 8).round()
    found = load_qdiffusion(saved(state, tmp_path))
    assert found.bits == 4 and DOUBTFUL_CUT < found.cut < MOST_CUT


@pytest.mark.parametrize("part", ["delta", "zero_point", "alpha"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32])
def test_numbers_of_other_kinds(part, dtype, tmp_path):
    state = synthetic(4)
    key = f"model.{LINEAR}.weight_quantizer.{part}"
    state[key] = state[key].to(dtype)
    path = saved(state, tmp_path)
    if (part, dtype) == ("zero_point", torch.int32):
        check_all(state, path, 4)
    else:
        with pytest.raises(QuantTuneError, match=f"{part} of type {dtype}"):
            load_qdiffusion(path)


@pytest.mark.parametrize(
    "key, words",
    [
        (f"{LINEAR}.weight_quantizer.delta", "delta of 1e.30, which no channel has"),
        (f"{LINEAR}.weight_quantizer.zero_point", "zero_point that no channel has"),
    ],
)
def test_numbers_of_no_model(key, words, tmp_path):
    state = synthetic(4)
    state[f"model.{key}"][3] = 1e30
    with pytest.raises(QuantTuneError, match=words):
        load_qdiffusion(saved(state, tmp_path))


@pytest.mark.parametrize("key", ["input_blocks.0.0.weight", "input_blocks.0.0.bias"])
def test_numbers_that_are_to_be_negated(key, tmp_path):
    state = synthetic(4)
    state[f"model.{key}"] = torch._neg_view(state[f"model.{key}"])
    path = saved(state, tmp_path)
    assert torch.load(path, weights_only=True)[f"model.{key}"].is_neg()
    assert "as the negative" in told(path)
    with pytest.raises(QuantTuneError, match="no plain tensor"):
        load_unpickled(path)


@pytest.mark.parametrize("dtype, what", [(torch.complex64, "complex"), (torch.bool, "boolean")])
def test_biases_of_other_numbers(dtype, what, tmp_path):
    state = synthetic(4)
    state[f"model.{LINEAR}.bias"] = state[f"model.{LINEAR}.bias"].to(dtype)
    with pytest.raises(QuantTuneError, match=f"{what} numbers in 'model.{LINEAR}.bias'"):
        load_qdiffusion(saved(state, tmp_path))


def test_the_format_from_before_1_6_is_known_and_refused(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(synthetic(4), path, _use_new_zipfile_serialization=False)
    assert is_qdiffusion(path)
    with pytest.raises(QuantTuneError, match="no checkpoint of a PyTorch since 1.6"):
        load_qdiffusion(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert not is_qdiffusion(path)
    assert not is_qdiffusion(tmp_path) and not is_qdiffusion(tmp_path / "absent.pth")


def test_the_integers_survive_our_own_format(tmp_path):
    state = synthetic(4)
    found = load_qdiffusion(saved(state, tmp_path))
    out = tmp_path / "ours.safetensors"
    written = save_quantized_unet(out, found.layers, found.floats, UNetMetadata("SD15"))
    ours = load_quantized_unet(out)
    assert ours.metadata.fingerprint == written.fingerprint == fingerprint(ours.layers)
    for name in UNET:
        expected = expected_codes(state, name, 4).flatten(1)
        assert torch.equal(ours.layers[name].codes().float(), expected)
        assert torch.equal(ours.layers[name].dequantize(), expected_weight(state, name, 4))
        assert ours.layers[name].split == found.layers[name].split
    in_memory = tmp_path / "again.safetensors"
    layers = {name: layer.weight() for name, layer in found.layers.items()}
    save_quantized_unet(in_memory, layers, found.floats, UNetMetadata("SD15"))
    assert in_memory.read_bytes() == out.read_bytes()


def test_a_file_that_is_gone_is_still_open(tmp_path):
    if sys.platform == "win32":
        pytest.skip("a file in use cannot be deleted there")
    state = synthetic(4)
    path = saved(state, tmp_path)
    found = load_qdiffusion(path)
    path.unlink()
    assert torch.equal(found.layers[LINEAR].dequantize(), expected_weight(state, LINEAR, 4))


# Hostile files


def told(path, bits=None, **expected):
    """The one sentence a file is refused with."""
    with pytest.raises(QuantTuneError) as error:
        found = load_qdiffusion(path, bits)
        for layer in found.layers.values():
            layer.codes()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 600
    assert message.count(". ") == 0, "one sentence"
    return message


SPLIT_KEY = f"model.{SPLIT}.weight_quantizer"
CONV_KEY = "model.input_blocks.0.0.weight_quantizer"
SPOILED = {
    "no alpha on a split layer": (f"{SPLIT_KEY}.alpha", None, "lacks the tensor"),
    "no second alpha": (f"{SPLIT_KEY}_0.alpha", None, "weight_quantizer_0.alpha"),
    "no second delta": (f"{SPLIT_KEY}_0.delta", None, "weight_quantizer_0.delta"),
    "no delta": (f"{CONV_KEY}.delta", None, "lacks the tensor"),
    "no zero point": (f"{CONV_KEY}.zero_point", None, "weight_quantizer.zero_point"),
    "no weight": ("model.input_blocks.0.0.weight", None, "lacks the tensor weight"),
    "a split that leaves channels over": (f"{SPLIT_KEY}.alpha", torch.ones(8, 9, 1, 1), "make up"),
    "a split of other kernels": (f"{SPLIT_KEY}_0.alpha", torch.ones(8, 6, 3, 3), "make up"),
    "a delta of another shape": (f"{CONV_KEY}.delta", torch.ones(8), "shape [8] and not"),
    "a delta for a part": (f"{CONV_KEY}.delta", torch.ones(4, 1, 1, 1), "shape [4, 1, 1, 1]"),
    "an alpha of another shape": (f"{CONV_KEY}.alpha", torch.ones(8, 4, 3, 2), "an alpha of shape"),
    "a weight of one number": ("model.input_blocks.0.0.weight", torch.tensor(1.0), "of shape []"),
    "whole weights": ("model.input_blocks.0.0.weight", torch.ones(8, 4, 3, 3).int(), "int32"),
    "NaN delta": (f"{CONV_KEY}.delta", torch.full((8, 1, 1, 1), torch.nan), "NaN"),
    "infinite delta": (f"{CONV_KEY}.delta", torch.full((8, 1, 1, 1), torch.inf), "infinite"),
    "zero delta": (f"{CONV_KEY}.delta", torch.zeros(8, 1, 1, 1), "not above 0"),
    "negative delta": (f"{CONV_KEY}.delta", -torch.ones(8, 1, 1, 1), "not above 0"),
    "half a zero point": (f"{CONV_KEY}.zero_point", torch.full((8, 1, 1, 1), 0.5), "whole number"),
    "NaN zero point": (f"{CONV_KEY}.zero_point", torch.full((8, 1, 1, 1), torch.nan), "whole"),
    "NaN weights": ("model.input_blocks.0.0.weight", torch.full((8, 4, 3, 3), torch.nan), "NaN"),
    "NaN alpha": (f"{CONV_KEY}.alpha", torch.full((8, 4, 3, 3), torch.nan), "NaN"),
    "infinite alpha": (f"{CONV_KEY}.alpha", torch.full((8, 4, 3, 3), torch.inf), "infinity"),
    "steps of no channel": (f"{CONV_KEY}.delta", torch.full((8, 1, 1, 1), 1e-42), "no channel"),
    "weights of no model": (
        "model.input_blocks.0.0.weight",
        torch.full((8, 4, 3, 3), 1e30),
        "which no model has",
    ),
    "NaN bias": ("model.input_blocks.0.0.bias", torch.full((8,), torch.nan), "NaN"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_file_is_told_in_one_sentence(case, tmp_path):
    key, value, words = SPOILED[case]
    state = synthetic(4)
    assert key in state
    state.pop(key)
    if value is not None:
        state[key] = value
    message = told(saved(state, tmp_path))
    assert words in message
    assert key.removeprefix("model.").partition(".weight")[0] in message or "bias" in message


@pytest.mark.parametrize("bits", [4.0, True, "4", 5])
def test_bits_of_another_kind(bits, tmp_path):
    assert "a checkpoint has 2, 3, 4 or 8" in told(saved(synthetic(4), tmp_path), bits)


def test_a_2_bit_file_declared_8_is_refused(tmp_path):
    state = synthetic(2)
    path = saved(state, tmp_path)
    assert "cannot have 8 bits" in told(path, bits=8) and "set bits to 2" in told(path, bits=8)
    check_all(state, path, 2, declared=2)
    assert "2, 3, 4 or 8" in told(path, bits=5)
    assert "2, 3, 4 or 8" in told(path, bits=True)


class Runs:
    def __reduce__(self):
        return (print, ("code in the file was run",))


def test_pickled_code_is_refused_and_not_run(tmp_path, capsys):
    path = saved({**synthetic(4), "model.extra": Runs()}, tmp_path)
    assert "pickled code" in told(path)
    assert "was run" not in capsys.readouterr().out


def test_a_whole_module_is_refused(tmp_path):
    assert "pickled code" in told(saved(torch.nn.Linear(3, 3), tmp_path))


@pytest.mark.parametrize("part", [0.001, 0.3, 0.7, 0.9, 0.999])
def test_a_truncated_file_is_refused(part, tmp_path):
    path = saved(synthetic(4), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert "download" in told(path) or "no checkpoint" in told(path)


def test_every_flipped_byte_of_the_structure_is_survived(tmp_path):
    path = saved(synthetic(4, {LINEAR: UNET[LINEAR]}), tmp_path)
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            for layer in load_qdiffusion(path).layers.values():
                layer.codes()
        except QuantTuneError as error:
            assert "\n" not in str(error)


def rezipped(source, target, change=lambda name, data: data, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".format_version"):
                new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_an_archive_packed_again_is_read_or_refused(tmp_path):
    state = synthetic(4)
    path = saved(state, tmp_path)
    check_all(state, rezipped(path, tmp_path / "stored.pth"), 4)
    message = told(rezipped(path, tmp_path / "small.pth", method=zipfile.ZIP_DEFLATED))
    assert "compressed" in message


def test_a_record_shorter_than_its_tensor_is_refused(tmp_path):
    path = saved(synthetic(4), tmp_path)

    def shorter(name, data):
        return data[: len(data) // 2] if name.endswith("data/3") else data

    assert "larger than its data" in told(rezipped(path, tmp_path / "short.pth", shorter))


def test_a_record_of_another_name_is_refused(tmp_path):
    """Newer releases of torch calculate a record's place and do not ask for its name."""
    path = saved(synthetic(4), tmp_path)
    data = path.read_bytes()
    name = b"/data/3PK"  # as it stands in the directory, at whose entries' beginnings "PK" stands
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, b"/ ata/3PK"))
    assert re.search("is not there|not found", told(path))


def test_other_byte_orders_are_refused(tmp_path):
    path = saved(synthetic(4), tmp_path)

    def other(name, data):
        return b"big" if name.endswith("byteorder") else data

    if sys.byteorder == "little":
        assert "order of bytes" in told(rezipped(path, tmp_path / "big.pth", other))


def test_foreign_files_are_refused(tmp_path):
    assert "not a checkpoint of Q-Diffusion" in told(
        saved({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, tmp_path)
    )
    assert "not a dictionary" in told(saved([torch.ones(2)], tmp_path))
    assert "does not exist" in told(tmp_path / "absent.pth")
    text = tmp_path / "text.pth"
    text.write_text("hello")
    assert "no checkpoint of PyTorch; download it again" in told(text)
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a Git LFS pointer in place" in told(text)
    old = tmp_path / "old.pth"
    torch.save(synthetic(4), old, _use_new_zipfile_serialization=False)
    assert "since 1.6" in told(old)
    assert "compressed" in told(_zip(tmp_path)) or "damaged" in told(_zip(tmp_path))
    assert "cannot be read" in told(tmp_path)
    sparse = {**synthetic(4), "model.x": torch.eye(3).to_sparse()}
    told(saved(sparse, tmp_path))


def _zip(folder):
    path = folder / "any.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return path


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    state = synthetic(4)
    path = saved(state, tmp_path)
    found = load_qdiffusion(path)
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(QuantTuneError, match="was changed"):
        found.layers[LINEAR].codes()


def test_what_is_one_and_what_is_not(tmp_path):
    assert is_qdiffusion(saved(synthetic(4), tmp_path))
    assert not is_qdiffusion(saved({"a": torch.ones(2)}, tmp_path))
    assert not is_qdiffusion(tmp_path / "absent.pth")
    assert not is_qdiffusion(Path(__file__))


MEASURE = """
import sys, torch
from quanttune.metrics.memory import peak_memory
from quanttune.quant import UNetMetadata, load_qdiffusion, save_quantized_unet
from quanttune.tests.quant.qdiffusion_files import synthetic
warm, path, out = sys.argv[1:]
def convert(path):
    state = load_qdiffusion(path)
    save_quantized_unet(out, state.layers, state.floats, UNetMetadata("SD15"))
convert(warm)
with peak_memory(torch.device("cpu")) as found:
    convert(path)
print(found.extra)
"""


def test_memory_is_that_of_a_layer_and_not_of_the_file(tmp_path):
    layers = {f"input_blocks.{i}.0": ((1024, 1024, 3, 3), None) for i in range(3)}
    state = synthetic(4, {"out.2": layers["input_blocks.0.0"]})
    state = {k.replace("out.2", name): v for name in layers for k, v in state.items()}
    # Separate copies, which the archive would otherwise hold once.
    path = saved({k: v.clone() for k, v in state.items()}, tmp_path)
    warm = saved(synthetic(4), tmp_path, "warm.pth")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, warm, path, tmp_path / "out"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / ".dev" / "site")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    largest = 2 * 4 * 1024 * 1024 * 9  # weight and alpha of one layer, 72 MiB
    assert path.stat().st_size > 2.9 * largest
    assert int(done.stdout) < 1.3 * largest
