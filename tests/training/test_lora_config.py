"""Settings of a LoRA training, and the layers that they name."""

import pytest

from quanttune.quant import QuantTuneError
from quanttune.training.lora_config import PATTERN, TARGETS, LoraTraining

NAMES = [
    "time_embed.0", "input_blocks.0.0", "input_blocks.1.0.in_layers.2",
    "input_blocks.1.0.emb_layers.1", "input_blocks.1.0.skip_connection", "input_blocks.3.0.op",
    "input_blocks.1.1.proj_in", "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj", "out.2"]


def test_presets_grow():
    counts = [len(LoraTraining(targets=t).chosen(NAMES)) for t in TARGETS if t != PATTERN]
    assert counts == [4, 5, 8, len(NAMES)]


def test_attention_of_transformers():
    block = "double_blocks.0.img_"
    names = ["img_in", f"{block}mod.lin", f"{block}attn.qkv", f"{block}attn.proj",
             f"{block}mlp.0", "single_blocks.0.linear1", "single_blocks.0.modulation.lin"]
    chosen = LoraTraining(targets="attention").chosen(names)
    assert chosen == [f"{block}attn.qkv", f"{block}attn.proj", "single_blocks.0.linear1"]
    assert f"{block}mlp.0" in LoraTraining(targets="attention + feed-forward").chosen(names)


def test_a_pattern_is_searched_for():
    config = LoraTraining(targets=PATTERN, pattern=r"attn1, attn2\.to_[kv]$")
    assert [n.rsplit(".", 2)[-2:] for n in config.chosen(NAMES)] == [
        ["attn1", "to_q"], ["to_out", "0"], ["attn2", "to_k"]]


@pytest.mark.parametrize("changes,match", [
    ({"rank": 0}, "rank is 0"), ({"rank": True}, "rank is True"), ({"dropout": 1.0}, "dropout"),
    ({"alpha": -1.0}, "alpha"), ({"alpha": float("nan")}, "alpha"), ({"rslora": 1}, "rslora"),
    ({"targets": "some"}, "targets is 'some'"), ({"targets": PATTERN}, "go together"),
    ({"pattern": "attn"}, "go together"), ({"pattern": 3}, "has to be a text"),
    ({"learning_rate": 0.0}, "learning_rate"), ({"optimizer": "sgd"}, "optimizer"),
])
def test_settings_out_of_range(changes, match):
    with pytest.raises(QuantTuneError, match=match):
        LoraTraining(**changes)


@pytest.mark.parametrize("pattern,match", [
    ("attn[", "no regular expression"), ("nothing_like_it", "name no layer"), (", ,", "name no la"),
])
def test_patterns_that_name_nothing(pattern, match):
    with pytest.raises(QuantTuneError, match=match):
        LoraTraining(targets=PATTERN, pattern=pattern).chosen(NAMES)


def test_words_of_a_file():
    assert LoraTraining.from_dict({"rank": 4, "timestep_range": [0.0, 0.5]}).rank == 4
    with pytest.raises(QuantTuneError, match="no setting 'num_experts'"):
        LoraTraining.from_dict({"num_experts": 4})
    with pytest.raises(QuantTuneError, match="preset is 'paper'"):
        LoraTraining.from_dict({"preset": "paper"})


def test_names_of_the_kinds():
    assert LoraTraining(rank=8, alpha=4.0).scaling == 0.5
    assert LoraTraining(rank=16, rslora=True).scaling == 4
    assert LoraTraining(dora=True).mode == "DoRA, rank 16"
