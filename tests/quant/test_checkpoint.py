import dataclasses
import math

import pytest
import torch

from quanttune.quant import (
    QuantTuneError,
    ScaleSet,
    UNetMetadata,
    fingerprint,
    load_quantized_unet,
    save_quantized_unet,
    save_scale_set,
)
from quanttune.quant.int8 import ActivationRanges
from quanttune.quant.safe_file import read_safetensors
from quanttune.quant.whole_file import write_safetensors
from quanttune.tests.quant.reference import random_weight
from quanttune.tests.quant.test_safe_file import BAD_FILES, assert_one_sentence

METADATA = UNetMetadata(
    family="SD15",
    unet_config={"model_channels": 32, "channel_mult": (1, 2), "dtype": torch.float16},
    model_type="EPS",
    provenance={"source": "made up", "options": {"bits": [2, 3, 4, 8]}},
)


def layers():
    return {
        "input.0": random_weight((8, 4, 3, 3), 4),
        "input.1": random_weight((7, 5), 3),
        "skip": random_weight((8, 12, 1, 1), 8, split=8),
        "out": random_weight((4, 8, 3, 3), 2, symmetric=True),
    }


def floats():
    return {
        "input.0.bias": torch.randn(8).half(),
        "norm.weight": torch.randn(8),
        "kept.weight": torch.randn(4, 4).bfloat16(),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "unet.safetensors"


def test_round_trip(path):
    written = save_quantized_unet(path, layers(), floats_ := floats(), METADATA)
    loaded = load_quantized_unet(path)
    assert loaded.metadata == written
    assert loaded.metadata.unet_config == {"model_channels": 32, "channel_mult": [1, 2]}
    assert loaded.metadata.provenance == METADATA.provenance
    for name, layer in layers().items():
        found = loaded.layers[name]
        for label in ("packed", "scale", "zero_point"):
            assert torch.equal(getattr(found, label), getattr(layer, label))
        for label in ("bits", "shape", "split", "symmetric"):
            assert getattr(found, label) == getattr(layer, label)
        assert torch.equal(found.dequantize(), layer.dequantize())
    assert set(loaded.floats) == set(floats_)
    assert all(torch.equal(loaded.floats[n], t) for n, t in floats_.items())
    sizes = [layer.nbytes for layer in layers().values()]
    assert loaded.nbytes == sum(sizes) + sum(t.numel() * t.element_size() for t in floats_.values())


def test_saving_a_loaded_file_gives_the_same_bytes(path, tmp_path):
    save_quantized_unet(path, layers(), floats(), METADATA)
    loaded = load_quantized_unet(path)
    again = tmp_path / "again.safetensors"
    save_quantized_unet(again, loaded.layers, loaded.floats, loaded.metadata)
    assert again.read_bytes() == path.read_bytes()


def test_a_loaded_file_can_be_saved_over_itself(path):
    save_quantized_unet(path, layers(), floats(), METADATA)
    before = path.read_bytes()
    loaded = load_quantized_unet(path)
    save_quantized_unet(path, loaded.layers, loaded.floats, loaded.metadata)
    assert path.read_bytes() == before


def test_fingerprint_is_of_the_content():
    base = fingerprint(layers())
    assert base == fingerprint(dict(reversed(layers().items()))) and len(base) == 64
    for label in ("packed", "scale", "zero_point"):
        changed = layers()
        getattr(changed["skip"], label).view(-1)[3] += 1
        assert fingerprint(changed) != base
    renamed = layers()
    renamed["other"] = renamed.pop("skip")
    assert fingerprint(renamed) != base
    fewer = layers()
    del fewer["skip"]
    assert fingerprint(fewer) != base


def test_the_file_carries_its_fingerprint(path):
    save_quantized_unet(path, layers(), floats(), METADATA)
    loaded = load_quantized_unet(path)
    assert loaded.metadata.fingerprint == fingerprint(layers()) == fingerprint(loaded.layers)


def test_nothing_to_save(path):
    with pytest.raises(QuantTuneError, match="no quantized layers"):
        save_quantized_unet(path, {}, floats(), METADATA)
    assert not path.exists()


def test_a_name_that_is_quantized_and_float(path):
    with pytest.raises(QuantTuneError, match=r"skip\.weight is both"):
        save_quantized_unet(path, layers(), {"skip.weight": torch.ones(2)}, METADATA)


@pytest.mark.parametrize("value", [object(), torch.ones(1), math.nan, 1j])
def test_metadata_that_is_not_json(path, value):
    metadata = dataclasses.replace(METADATA, unet_config={"a": {"b": [value]}})
    with pytest.raises(QuantTuneError, match=r"unet_config\.a\.b"):
        save_quantized_unet(path, layers(), floats(), metadata)
    assert not path.exists()


def test_the_family_must_be_one_that_the_caller_knows(path):
    save_quantized_unet(path, layers(), floats(), METADATA)
    load_quantized_unet(path, families=["SDXL", "SD15"])
    with pytest.raises(QuantTuneError, match="'SD15'") as caught:
        load_quantized_unet(path, families=["SDXL"])
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_no_good_at_all(path, case):
    path.write_bytes(BAD_FILES[case][0])
    with pytest.raises(QuantTuneError, match=BAD_FILES[case][1]) as caught:
        load_quantized_unet(path)
    assert_one_sentence(caught.value, path)


def test_a_scale_set_and_an_ordinary_file(path):
    save_scale_set(path, ScaleSet.identity({"a": (2, 2)}, 1))
    with pytest.raises(QuantTuneError, match="Load TuneQDM Scales") as caught:
        load_quantized_unet(path)
    assert_one_sentence(caught.value, path)


def change(facts, tensors, what):
    """Damage a file's metadata or tensors in the way named ``what``."""
    layer = facts["layers"]["skip"]
    scale, zero = tensors["skip.weight_scale"], tensors["skip.weight_zero_point"]
    packed = tensors["skip.weight"]
    actions = {
        "other format": lambda: facts.update(format="gguf"),
        "newer version": lambda: facts.update(format_version=3),
        "no version": lambda: facts.pop("format_version"),
        "no family": lambda: facts.update(family=""),
        "family is a number": lambda: facts.update(family=15),
        "no layers": lambda: facts.update(layers={}),
        "layers is a list": lambda: facts.update(layers=[]),
        "config missing": lambda: facts.pop("unet_config"),
        "float names are numbers": lambda: facts.update(floats=[1]),
        "layer is a number": lambda: facts["layers"].update(skip=4),
        "5 bits": lambda: layer.update(bits=5),
        "bits is text": lambda: layer.update(bits="4"),
        "bits is true": lambda: layer.update(bits=True),
        "other bits": lambda: layer.update(bits=4),
        "other shape": lambda: layer.update(shape=[8, 13, 1, 1]),
        "negative shape": lambda: layer.update(shape=[8, -12, 1, -1]),
        "gigantic shape": lambda: layer.update(shape=[2**40, 2**40]),
        "shape is text": lambda: layer.update(shape="8"),
        "empty shape": lambda: layer.update(shape=[]),
        "split too large": lambda: layer.update(split=12),
        "split is text": lambda: layer.update(split="8"),
        "split lost": lambda: layer.update(split=None),
        "symmetric lost": lambda: layer.pop("symmetric"),
        "layer tensor missing": lambda: tensors.pop("skip.weight"),
        "scale missing": lambda: tensors.pop("skip.weight_scale"),
        "zero point missing": lambda: tensors.pop("skip.weight_zero_point"),
        "float missing": lambda: tensors.pop("norm.weight"),
        "extra layer": lambda: tensors.update({"more.weight": packed, "more.weight_scale": scale}),
        "extra float": lambda: tensors.update({"more.bias": torch.ones(2)}),
        "scale NaN": lambda: scale.view(-1)[1:2].fill_(math.nan),
        "scale infinite": lambda: scale.view(-1)[1:2].fill_(math.inf),
        "scale zero": lambda: scale.view(-1)[1:2].fill_(0),
        "scale negative": lambda: scale.view(-1)[1:2].fill_(-1),
        "scale half": lambda: tensors.update({"skip.weight_scale": scale.half()}),
        "zero point NaN": lambda: zero.view(-1)[1:2].fill_(math.nan),
        "zero point broken": lambda: zero.view(-1)[1:2].fill_(1.5),
        "codes signed": lambda: tensors.update({"skip.weight": packed.view(torch.int8)}),
        "codes float": lambda: tensors.update({"skip.weight": packed.float()}),
        "float NaN": lambda: tensors["norm.weight"][:1].fill_(math.nan),
        "float infinite": lambda: tensors["kept.weight"][0, :1].fill_(math.inf),
        "float is integer": lambda: tensors.update({"norm.weight": torch.ones(8).int()}),
    }
    if what is not None:
        actions[what]()
    return list(actions)


DAMAGES = {
    "other format": "'gguf'",
    "newer version": "version 3",
    "no version": "version None",
    "no family": "family ''",
    "family is a number": "no valid family",
    "no layers": "no quantized layers",
    "layers is a list": "no valid layers",
    "config missing": "no valid unet_config",
    "float names are numbers": "no valid floats",
    "layer is a number": "not an object",
    "5 bits": "5 bits",
    "bits is text": "'4' bits",
    "bits is true": "True bits",
    "other bits": "codes are",
    "other shape": "codes are",
    "negative shape": "shape is",
    "gigantic shape": "shape is",
    "shape is text": "shape is",
    "empty shape": "shape is",
    "split too large": "split is 12",
    "split is text": "split is '8'",
    "split lost": "scale is",
    "symmetric lost": "symmetric",
    "layer tensor missing": "skip.weight is missing",
    "scale missing": "skip.weight_scale is missing",
    "zero point missing": "skip.weight_zero_point is missing",
    "float missing": "lacks the tensor norm.weight",
    "extra layer": "does not list",
    "extra float": "more.bias",
    "scale NaN": "a scale is NaN",
    "scale infinite": "a scale is NaN, infinite",
    "scale zero": "not above 0",
    "scale negative": "not above 0",
    "scale half": "scale is",
    "zero point NaN": "zero point is not",
    "zero point broken": "zero point is not",
    "codes signed": "codes are",
    "codes float": "codes are",
    "float NaN": "NaN or infinite values in norm.weight",
    "float infinite": "NaN or infinite values in kept.weight",
    "float is integer": "norm.weight of type",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_files_that_contradict_themselves(path, what):
    save_quantized_unet(path, layers(), floats(), METADATA)
    facts, tensors = read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(facts, tensors, what)
    write_safetensors(path, tensors, facts)
    with pytest.raises(QuantTuneError) as caught:
        load_quantized_unet(path)
    assert DAMAGES[what] in str(caught.value)
    assert_one_sentence(caught.value, path)


def test_an_ordinary_safetensors_file(path):
    write_safetensors(path, {"x.weight": torch.ones(2, 2)}, {})
    content = path.read_bytes().replace(b"quanttune", b"something")
    path.write_bytes(content)
    with pytest.raises(QuantTuneError, match="Quantize UNet") as caught:
        load_quantized_unet(path)
    assert_one_sentence(caught.value, path)


def test_eight_bit_floats(path):
    extra = {"kept.weight": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    save_quantized_unet(path, layers(), extra, METADATA)
    assert load_quantized_unet(path).floats["kept.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_that_are_not_finite(dtype, path):
    bad = torch.tensor([[1.0, math.nan]]).to(dtype)
    save_quantized_unet(path, layers(), {"kept.weight": bad}, METADATA)
    with pytest.raises(QuantTuneError, match="NaN or infinite values in kept.weight"):
        load_quantized_unet(path)


def calibrated():
    ranges = {"input.0": torch.tensor([[[-1.0, 2.0]], [[0.0, 3.0]]]),
              "skip": torch.tensor([[[-1.0, 1.0], [-2.0, 0.5]]] * 2)}
    return ActivationRanges(ranges)


def test_calibrated_ranges_round_trip(path):
    metadata = dataclasses.replace(METADATA, calibration={"samples": 100})
    written = save_quantized_unet(path, layers(), floats(), metadata, ranges=calibrated())
    loaded = load_quantized_unet(path)
    assert loaded.metadata == written and written.format_version == 2
    assert loaded.metadata.calibration == {"samples": 100}
    assert loaded.ranges.layers.keys() == calibrated().layers.keys()
    for name, ranges in calibrated().layers.items():
        assert torch.equal(loaded.ranges.layers[name], ranges)
    assert loaded.metadata.fingerprint == fingerprint(layers()), "scale files still fit"


def test_a_file_without_ranges_says_nothing_of_them(path):
    save_quantized_unet(path, layers(), floats(),
                        dataclasses.replace(METADATA, calibration={"samples": 100}))
    header, tensors = read_safetensors(path)
    assert header["format_version"] == 1 and "calibration" not in header
    assert not any("input_range" in name for name in tensors)
    assert load_quantized_unet(path).ranges is None


@pytest.mark.parametrize("damage", [
    lambda t: t.update({"skip.input_range": torch.zeros(2, 1, 2)}),
    lambda t: t.update({"input.0.input_range": torch.full((2, 1, 2), float("nan"))}),
    lambda t: t.update({"input.0.input_range": torch.zeros(3, 1, 2)}),
    lambda t: t.update({"input.0.input_range": torch.zeros(2, 1, 2).half()}),
    lambda t: t.update({"nowhere.input_range": torch.zeros(2, 1, 2)}),
    lambda t: [t.pop(n) for n in list(t) if n.endswith("input_range")],
])
def test_damaged_ranges_are_refused(path, damage):
    save_quantized_unet(path, layers(), floats(), METADATA, ranges=calibrated())
    header, tensors = read_safetensors(path)
    tensors = {name: t.clone() for name, t in tensors.items()}
    damage(tensors)
    write_safetensors(path, tensors, header)
    with pytest.raises(QuantTuneError) as caught:
        load_quantized_unet(path)
    assert str(path) in str(caught.value)
