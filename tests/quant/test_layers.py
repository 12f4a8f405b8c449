import pytest
from torch import nn

from quanttune.quant import (
    QUANTIZE_PRESETS,
    QuantTuneError,
    keep_float,
    quantizable_layers,
    scale_shape,
    scale_shapes,
    shortcut_splits,
)

NAMES = [
    "time_embed.0",
    "time_embed.2",
    "input_blocks.0.0",
    "input_blocks.1.0.in_layers.2",
    "input_blocks.1.0.emb_layers.1",
    "input_blocks.1.1.proj_in",
    "output_blocks.0.0.skip_connection",
    "out.2",
]


def test_presets():
    assert keep_float(NAMES, "none") == set()
    assert keep_float(NAMES, "first_last") == {"input_blocks.0.0", "out.2"}
    time = {"time_embed.0", "time_embed.2", "input_blocks.1.0.emb_layers.1"}
    assert keep_float(NAMES, "time_embedding") == time
    assert keep_float(NAMES, "first_last_time") == time | {"input_blocks.0.0", "out.2"}
    assert set(QUANTIZE_PRESETS) == {"none", "first_last", "time_embedding", "first_last_time"}


def test_patterns():
    kept = keep_float(NAMES, "*.proj_in, input_blocks.1.0.*")
    assert kept == {n for n in NAMES if n.startswith("input_blocks.1.")}
    assert keep_float(NAMES, "") == set() and keep_float(NAMES, " , ") == set()


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("proj_in", "input_blocks.1.1.proj_in"),
        ("*.skip_conection", "output_blocks.0.0.skip_connection"),
        ("qqqqqq", "presets"),
        ("out.2, nothing.*", "'nothing"),
        ("OUT.2", "out.2"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern, hint):
    with pytest.raises(QuantTuneError) as caught:
        keep_float(NAMES, pattern)
    assert "matches no layer" in str(caught.value) and hint in str(caught.value)


def test_a_preset_that_matches_nothing():
    with pytest.raises(QuantTuneError, match="first_last"):
        keep_float(["blocks.0.weird"], "first_last")


def test_quantizable_layers_and_their_scales():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1, groups=2), nn.Linear(6, 5)
    )
    assert list(quantizable_layers(model)) == ["0", "2", "3"]
    assert scale_shapes(model) == {"0": (8, 4), "2": (6, 8), "3": (5, 6)}
    assert scale_shapes(model, {"3": 2})["3"] == (10, 6)
    assert scale_shape((5, 6), split=2) == (10, 6)


def test_shortcuts_of_a_latent_diffusion_unet():
    shapes = {
        "middle_block.0.out_layers.3": (64, 64, 3, 3),
        "middle_block.2.out_layers.3": (128, 64, 3, 3),
        "output_blocks.0.0.out_layers.3": (64, 128, 3, 3),
        "output_blocks.0.0.skip_connection": (64, 192, 1, 1),
        "output_blocks.1.0.out_layers.3": (32, 96, 3, 3),
        "output_blocks.1.0.skip_connection": (32, 96, 1, 1),
        "output_blocks.10.0.skip_connection": (32, 64, 1, 1),
        "output_blocks.9.0.out_layers.3": (32, 32, 3, 3),
        "input_blocks.4.0.skip_connection": (64, 32, 1, 1),
    }
    assert shortcut_splits(shapes) == {
        "output_blocks.0.0.skip_connection": 128,
        "output_blocks.1.0.skip_connection": 64,
        "output_blocks.10.0.skip_connection": 32,
    }


def test_models_without_shortcuts():
    assert shortcut_splits({"double_blocks.0.img_attn.qkv": (96, 32)}) == {}
    assert shortcut_splits({}) == {}
