"""Settings: presets, what is refused, and the way through a file."""

import pytest

from quanttune.quant import QuantTuneError
from quanttune.training.config import PAPER, PRESETS, ScaleTraining


def test_presets_say_what_they_are():
    assert PRESETS["peqa"].mode == "PEQA" and PRESETS["peqa"].num_experts == 1
    assert PRESETS["paper"].mode == "TuneQDM, 4 experts"
    assert PRESETS["recommended"].replace(num_experts=1).mode == "TuneQDM, 1 expert"
    assert PAPER.absolute and not PAPER.separate_experts and PAPER.learning_rate == 3e-6


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_goes_through_a_file_unchanged(name):
    import json

    values = json.loads(json.dumps(PRESETS[name].asdict()))
    assert ScaleTraining.from_dict(values) == PRESETS[name]
    assert ScaleTraining.from_dict({"preset": name, "steps": 7}) == PRESETS[name].replace(steps=7)


@pytest.mark.parametrize("changes", [
    {"steps": 0}, {"steps": 1.5}, {"steps": True}, {"batch_size": 0}, {"num_experts": 0},
    {"learning_rate": 0}, {"learning_rate": float("nan")}, {"learning_rate": -1e-3},
    {"learning_rate": "fast"}, {"optimizer": "sgd"}, {"scheduler": "stairs"},
    {"precision": "fp16"}, {"timestep_range": (0.5, 0.5)}, {"timestep_range": (0.9, 0.1)},
    {"timestep_range": (0.0, 2.0)}, {"timestep_range": (0.0,)}, {"ema_decay": 1.0},
    {"max_grad_norm": float("inf")}, {"min_snr_gamma": float("inf")}, {"seed": 2**64},
    {"timestep_range": 3}, {"timestep_range": (0.5, 0.5000001)}, {"train_s_in": "false"},
    {"stratified": 1}, {"absolute": "no"}, {"separate_experts": None}, {"checkpointing": "no"},
    {"optimizer": []}, {"learning_rate": 10**5000}, {"optimizer": "x" * 10**6},
    {"seed": -1}, {"shared_share": 1.1}, {"caption_dropout": 2}, {"max_grad_norm": -1},
])
def test_impossible_settings_are_named(changes):
    with pytest.raises(QuantTuneError, match=next(iter(changes))) as caught:
        ScaleTraining(**changes)
    told = str(caught.value)
    assert "\n" not in told and told.endswith(".") and len(told) < 500


def test_more_experts_than_steps():
    with pytest.raises(QuantTuneError, match="8 experts.*5 steps"):
        ScaleTraining(steps=5, num_experts=8)


@pytest.mark.parametrize("values,match", [({"stepz": 3}, "stepz"), ({"preset": "best"}, "best"),
                                          ({"preset": []}, "preset"), ({"preset": {}}, "preset")])
def test_unknown_words_in_a_file(values, match):
    with pytest.raises(QuantTuneError, match=match):
        ScaleTraining.from_dict(values)
