import math

import pytest
import torch

from quanttune.quant import (
    LayerScales,
    QuantTuneError,
    ScaleMetadata,
    ScaleSet,
    UNetMetadata,
    load_scale_set,
    save_quantized_unet,
    save_scale_set,
)
from quanttune.quant.safe_file import read_safetensors
from quanttune.quant.whole_file import write_safetensors
from quanttune.tests.quant.reference import random_set, random_weight
from quanttune.tests.quant.test_safe_file import BAD_FILES, assert_one_sentence

SHAPES = {"blocks.0.proj": (8, 4), "out": (6, 10)}
METADATA = ScaleMetadata("ab" * 32, "base.safetensors", "a sks dog", 400, 7, 4, {"lr": 1e-4})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scales.safetensors"


@pytest.mark.parametrize("with_s_in", [True, False])
def test_round_trip(path, with_s_in):
    source = random_set(SHAPES, 3, 50, with_s_in)
    source = ScaleSet(source.layers, 3, 50, METADATA)
    save_scale_set(path, source)
    loaded = load_scale_set(path)
    assert (loaded.num_experts, loaded.num_timesteps) == (3, 50)
    assert loaded.metadata == METADATA and set(loaded.layers) == set(SHAPES)
    for name, scales in source.layers.items():
        assert torch.equal(loaded.layers[name].r_out, scales.r_out)
        if with_s_in:
            assert torch.equal(loaded.layers[name].s_in, scales.s_in)
        else:
            assert loaded.layers[name].s_in is None


def test_parameters_of_a_trainer_are_saved_as_float32(path):
    r_out = torch.nn.Parameter(torch.ones(1, 8, dtype=torch.bfloat16))
    save_scale_set(path, ScaleSet({"a": LayerScales(r_out)}, 1))
    loaded = load_scale_set(path).layers["a"].r_out
    assert loaded.dtype == torch.float32 and not loaded.requires_grad


def test_a_set_that_went_bad_after_it_was_made_is_not_saved(path):
    scale_set = ScaleSet.identity(SHAPES, 1)
    scale_set.layers["out"].r_out[0, 0] = math.nan
    with pytest.raises(QuantTuneError, match="NaN"):
        save_scale_set(path, scale_set)
    assert not path.exists()


def test_an_empty_set_is_not_saved(path):
    with pytest.raises(QuantTuneError, match="no layers"):
        save_scale_set(path, ScaleSet({}, 1))


@pytest.mark.parametrize("value", [object(), math.nan])
def test_metadata_that_is_not_json(path, value):
    scale_set = ScaleSet.identity(SHAPES, 1, metadata=ScaleMetadata(extra={"x": value}))
    with pytest.raises(QuantTuneError, match="JSON"):
        save_scale_set(path, scale_set)
    assert not path.exists()


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_no_good_at_all(path, case):
    path.write_bytes(BAD_FILES[case][0])
    with pytest.raises(QuantTuneError, match=BAD_FILES[case][1]) as caught:
        load_scale_set(path)
    assert_one_sentence(caught.value, path)


def test_a_quantized_unet(path):
    save_quantized_unet(path, {"a": random_weight((4, 8))}, {}, UNetMetadata("SD15"))
    with pytest.raises(QuantTuneError, match="Load Quantized UNet") as caught:
        load_scale_set(path)
    assert_one_sentence(caught.value, path)


def ones(*shape):
    return torch.ones(*shape)


DAMAGES = {
    "other format": ({"format": "lora"}, {}, "'lora'"),
    "newer version": ({"format_version": 9}, {}, "version 9"),
    "no experts": ({"num_experts": 0}, {}, "experts is 0"),
    "experts is text": ({"num_experts": "2"}, {}, "experts is '2'"),
    "experts missing": ({"num_experts": ...}, {}, "no num_experts"),
    "no timesteps": ({"num_timesteps": 0}, {}, "timesteps is 0"),
    "more experts than rows": ({"num_experts": 5}, {}, "5 experts"),
    "steps is text": ({"steps": "many"}, {}, "no valid steps"),
    "subject is a number": ({"subject": 3}, {}, "no valid subject"),
    "NaN": ({}, {"out.r_out": torch.full((2, 6), math.nan)}, "out.r_out hold NaN"),
    "infinite": ({}, {"out.s_in": torch.full((2, 10), math.inf)}, "out.s_in hold NaN or inf"),
    "integers": ({}, {"out.r_out": torch.ones(2, 6).int()}, "out.r_out as torch.int32"),
    "one dimension": ({}, {"out.r_out": ones(6)}, "shape [6]"),
    "r_out missing": ({}, {"out.r_out": ...}, "lacks the scales out.r_out"),
    "another tensor": ({}, {"lora_up.weight": ones(2, 2)}, "lora_up.weight"),
    "a bare name": ({}, {"r_out": ones(2, 2)}, "tensor r_out"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_files_that_contradict_themselves(path, what):
    facts_change, tensor_change, message = DAMAGES[what]
    save_scale_set(path, random_set(SHAPES, 2))
    facts, tensors = read_safetensors(path)
    facts = {k: v for k, v in {**facts, **facts_change}.items() if v is not ...}
    tensors = {k: v for k, v in {**tensors, **tensor_change}.items() if v is not ...}
    write_safetensors(path, tensors, facts)
    with pytest.raises(QuantTuneError) as caught:
        load_scale_set(path)
    assert message in str(caught.value)
    assert_one_sentence(caught.value, path)


def test_no_scales_at_all(path):
    save_scale_set(path, random_set(SHAPES, 2))
    facts, _ = read_safetensors(path)
    write_safetensors(path, {}, facts)
    with pytest.raises(QuantTuneError, match="holds no scales"):
        load_scale_set(path)
