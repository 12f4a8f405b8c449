"""LoRAs that do not fit, do not fit whole, or are damaged: told in a sentence each."""

import pickle

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.lora_models import assert_same, exported


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clip(comfy_inprocess):
    with torch.inference_mode():
        return models.projecting_clip()


def broken(lora, **changes):
    return {k: v for k, v in {**lora, **changes}.items() if v is not None}


@pytest.mark.parametrize("case", ["nan", "inf", "half", "halves", "alpha", "shape", "other",
                                  "few", "empty", "no lora", "rank", "loha", "reshape"])
def test_bad_loras_in_one_sentence(case):
    from quanttune.host.lora_file import import_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    _, lora = exported(model, include=("attn1.to_q", "attn2.to_k"))
    first = next(iter(lora)).partition(".")[0]
    down, up = f"{first}.lora_down.weight", f"{first}.lora_up.weight"
    others = {f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{half}.weight": torch.ones(4, 4)
              for i in range(len(lora)) for half in ("up", "down")}
    cases = {
        "nan": (broken(lora, **{up: torch.full_like(lora[up], float("nan"))}),
                f"NaN or infinite values in '{up}'"),
        "inf": (broken(lora, **{down: torch.full_like(lora[down], float("inf"))}),
                f"NaN or infinite values in '{down}'"),
        "half": (broken(lora, **{down: None}), f"the up half of the layer '{first}' without"),
        "halves": (broken(lora, **{down: torch.ones(7, 32)}), "do not belong together"),
        "alpha": (broken(lora, **{f"{first}.alpha": torch.ones(2)}), "2 values for the one number"),
        "shape": (broken(lora, **{down: torch.ones(4, 77)}), "32 x 77 values and the layer has 32"),
        "other": (others, r"fits none of its \d+ layers to this SD15 model, such as "
                          "'lora_unet_double_blocks_0_img_attn_qkv', it seems to be for Flux"),
        "few": ({**lora, **others}, r"fits only \d+ of its \d+ layers"),
        "empty": ({}, "holds no tensors"),
        "no lora": (torch.ones(3), "is not a LoRA"),
        "rank": (broken(lora, **{down: torch.ones(40, 32), up: torch.ones(32, 40)}),
                 "rank is 40, but .* no more than 32"),
        "loha": ({f"{first}.hada_{part}": torch.ones(32, 4) if part.endswith("a")
                  else torch.ones(4, 32) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
                 "holds a loha adapter"),
        "reshape": (broken(lora, **{f"{first}.reshape_weight": torch.tensor([32, 32])}),
                    "changes the shape"),
    }
    bad, message = cases[case]
    with pytest.raises(QuantTuneError, match=message) as caught:
        import_lora(bad, model, name="x.safetensors")
    text = str(caught.value)
    assert "x.safetensors" in text and text.endswith(".") and "\n" not in text and ";" in text


def test_halves_that_are_both_kernels_are_refused():
    """The host would only log that it cannot multiply them."""
    from quanttune.host.lora_fit import fit_lora
    from quanttune.quant import QuantTuneError

    bad = {f"{CONV}.lora_up.weight": torch.ones(32, 4, 3, 3),
           f"{CONV}.lora_down.weight": torch.ones(4, 32, 3, 3)}
    with pytest.raises(QuantTuneError, match="halves of shapes .* do not belong together"):
        fit_lora(bad, models.small_model())


def test_biases_that_peft_saves_beside_the_adapters_are_no_layers():
    from quanttune.host.lora_fit import fit_lora

    model = models.small_model()
    _, lora = exported(model, include=("attn1.to_q",))
    count = len(lora) // 3
    biases = {f"base_model.model.down_blocks.{i}.conv.bias": torch.ones(3)
              for i in range(4 * count)}
    fit = fit_lora({**lora, **biases}, model)
    assert str(fit).startswith(f"{count} of {count} layers matched")
    assert len(fit.unknown) == 4 * count and "have no place" in fit.notes()[0]


LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONV = "diffusion_model.input_blocks.1.0.in_layers.2"


def adapter(model, kind, layer=LAYER):
    """What a file holds for one adapter of 32 x 32 values, or of a 3 x 3 convolution of 32."""
    def values(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) / 10

    parts = {
        "loha": {"hada_w1_a": values(32, 4), "hada_w1_b": values(4, 32),
                 "hada_w2_a": values(32, 4), "hada_w2_b": values(4, 32)},
        "lokr": {"lokr_w1": values(4, 4), "lokr_w2": values(8, 8)},
        "oft": {"oft_blocks": values(2, 16, 16)},
        "boft": {"oft_blocks": values(2, 4, 8, 8), "alpha": torch.tensor(1.0)},
        "glora": {"a1.weight": values(32, 4), "a2.weight": values(4, 32),
                  "b1.weight": values(32, 4), "b2.weight": values(4, 32)},
        "diff": {"diff": values(32, 32)}, "set": {"set_weight": values(32, 32)},
        "lora": {"lora_up.weight": values(32, 4), "lora_down.weight": values(4, 32)},
        "tucker": {"lora_up.weight": values(32, 4, 1, 1), "lora_down.weight": values(4, 32, 1, 1),
                   "lora_mid.weight": values(4, 4, 3, 3)},
    }[kind]
    return {f"{layer}.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("kind,zeros", [
    (kind, zeros) for kind in ("loha", "lokr", "oft", "boft", "glora", "diff", "set", "tucker")
    for zeros in (False, True)])
def test_every_adapter_that_the_host_computes_is_taken(kind, zeros):
    from quanttune.host.apply_lora import apply_lora

    model = models.small_model()
    lora = adapter(model, kind, CONV if kind == "tucker" else LAYER)
    if zeros:
        lora = {key: value if key.endswith("alpha") else 0 * value for key, value in lora.items()}
    patched, _, report = apply_lora(model, None, lora, 0.5, 0.0)
    assert "1 of 1 layers matched" in report
    arguments = models.inputs(model)
    change = models.relative(models.forward(patched, arguments), models.forward(model, arguments))
    assert change == 0 if zeros and kind != "set" else change > 1e-6


@pytest.mark.parametrize("kind,changes,message", [
    ("loha", {"hada_w2_b": None}, "lacks '.*to_q.hada_w2_b'"),
    ("loha", {"hada_w1_a": (33, 4), "hada_w2_a": (33, 4)}, r"a weight of \[32, 32\]"),
    ("lokr", {"lokr_w2": None}, "to_q' \\(a part of it is missing"),
    ("lokr", {"lokr_w1": (3, 4)}, r"a weight of \[32, 32\]"),
    ("oft", {"oft_blocks": (2, 15, 15)}, r"a weight of \[32, 32\]"),
    ("boft", {"alpha": None}, r"a weight of \[32, 32\]"),
    ("glora", {"a1.weight": (4, 32)}, "to_q'"),
    ("diff", {"diff": (32, 33)}, r"holds \[32, 33\] values, the layer \[32, 32\]"),
    ("set", {"set_weight": (33, 32)}, r"holds \[33, 32\] values, the layer \[32, 32\]"),
    ("set", {"set_weight": (1, 32)}, r"holds \[1, 32\] values"),
    ("tucker", {"lora_mid.weight": (5, 4, 3, 3)}, "in_layers.2'"),
    ("tucker", {"lora_mid.weight": (4, 4, 9)}, "in_layers.2'"),
    ("lora", {"reshape_weight": [34, 32]}, "another shape than the 32 x 32 it has"),
    ("lora", {"reshape_weight": [10**6, 10**6]}, "another shape than the 32 x 32 it has"),
    ("lora", {"reshape_weight": 32}, "another shape than the 32 x 32 it has"),
    ("lora", {"dora_scale": (35, 1)}, r"dora_scale of shape \[35, 1\]"),
    ("lora", {"dora_scale": (1, 1)}, r"dora_scale of shape \[1, 1\]"),
    ("lora", {"dora_scale": (32,)}, r"dora_scale of shape \[32\]"),
    ("lora", {"dora_scale": ()}, r"dora_scale of shape \[\]"),
    ("loha", {"dora_scale": (35, 1)}, r"a weight of \[32, 32\]"),
], ids=str)
def test_adapters_that_the_host_cannot_compute(kind, changes, message):
    from quanttune.host.apply_lora import apply_lora
    from quanttune.quant import QuantTuneError

    model, layer = models.small_model(), CONV if kind == "tucker" else LAYER
    made = {f"{layer}.{name}": torch.ones(value) if isinstance(value, tuple) else (
        value if value is None else torch.tensor(value)) for name, value in changes.items()}
    lora = broken(adapter(model, kind, layer), **made)
    with pytest.raises(QuantTuneError, match=message) as caught:
        apply_lora(model, None, lora, 1.0, 0.0, "x.safetensors")
    assert "'x.safetensors'" in str(caught.value) and layer in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["oft_blocks", "hada_w1_b", "lokr_w1_b", "a2.weight", "alpha",
                                  "dora_scale", "diff_b"])
def test_a_layer_that_nothing_is_done_to_is_not_matched(part):
    from quanttune.host.lora_fit import fit_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    alone = {f"{LAYER}.{part}": torch.ones(1)}
    with pytest.raises(QuantTuneError, match="fits none of its 1 layers"):
        fit_lora(alone, model)
    fit = fit_lora({**alone, **adapter(model, "loha", LAYER.replace("to_q", "to_k"))}, model)
    assert (fit.matched, fit.layers) == (1, 2) and "to_q" in fit.notes()[0]


@pytest.mark.parametrize("shape", [(32, 1), (1, 32)])
def test_magnitudes_of_outputs_or_of_inputs_are_taken(shape):
    from quanttune.host.lora_fit import fit_lora

    model = models.small_model()
    lora = {**adapter(model, "lora"), f"{LAYER}.dora_scale": torch.ones(shape)}
    assert fit_lora(lora, model).matched == 1


@pytest.mark.parametrize("kind,factor,strength,taken", [
    ("lora", 1.0, 1.0, True), ("lora", 1.0, -1e9, False), ("lora", 1e15, 1.0, False),
    ("lora", 300.0, 1.0, True), ("lora", 300.0, 100.0, False), ("loha", 1.0, 1e9, False),
    ("loha", 1e9, 1.0, False), ("diff", 1e9, 1.0, False), ("diff", 1e9, 1e-9, True),
    ("set", 1e9, 1e-9, False)])
def test_changes_too_large_for_half_precision(kind, factor, strength, taken):
    from quanttune.host.apply_lora import apply_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    lora = {key: value * factor for key, value in adapter(model, kind).items()}
    if taken:
        apply_lora(model, None, lora, strength, 0.0)
        return
    with pytest.raises(QuantTuneError, match="at strength .* more than half precision holds"):
        apply_lora(model, None, lora, strength, 0.0)


def test_a_large_bound_alone_refuses_nothing():
    from quanttune.host.lora_fit import fit_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    up, down = torch.zeros(32, 4), torch.zeros(4, 32)
    up[:, 0], down[1] = 1e4, 1e4  # whose product is 0
    lora = {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}
    assert fit_lora(lora, model).matched == 1
    down[0] = 1e4
    with pytest.raises(QuantTuneError, match="half precision"):
        fit_lora(lora, model)


@pytest.mark.parametrize("texts", [{"ss_base_model_version": "<b>\n\nboo" * 1000}, {}])
def test_texts_of_a_file_come_short_and_in_one_line(texts):
    from quanttune.host.lora_file import LoraWeights
    from quanttune.host.lora_fit import fit_lora
    from quanttune.quant import QuantTuneError

    layer = "lora_unet_" + "very\nlong" * 500
    lora = LoraWeights({f"{layer}.lora_{half}.weight": torch.ones(4, 4) for half in ("up", "down")},
                       texts)
    with pytest.raises(QuantTuneError, match="fits none of its") as caught:
        fit_lora(lora, models.small_model())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350
    assert ("'<b> boo<b> boo" in str(caught.value)) == bool(texts)


@pytest.mark.parametrize("width,models_of_it", [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL")])
def test_the_family_is_told_from_the_text_encoders_width(width, models_of_it):
    from quanttune.host.lora_fit import family

    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    lora = {f"{name}.lora_down.weight": torch.ones(4, width),
            f"{name}.lora_up.weight": torch.ones(320, 4)}
    assert family(lora) == models_of_it


def test_most_layers_match(caplog):
    from quanttune.host.lora_file import import_lora

    model = models.small_model()
    layers, lora = exported(model)
    lora["lora_unet_elsewhere.lora_up.weight"] = torch.ones(4, 4)
    lora["lora_unet_elsewhere.lora_down.weight"] = torch.ones(4, 4)
    assert_same(import_lora(lora, model), layers)
    assert any("1 parts of" in r.message and "lora_unet_elsewhere" in r.message
               for r in caplog.records)


def test_without_a_clip_its_layers_are_left_out(clip, caplog):
    from quanttune.host.lora_file import import_lora
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    layers, lora = exported(model, clip)
    own = {n: layer for n, layer in layers.items() if n.startswith("diffusion_model.")}
    assert_same(import_lora(lora, model), own)
    assert any("connect a CLIP" in r.message for r in caplog.records)
    only = {k: v for k, v in lora.items() if k.startswith("lora_te")}
    with pytest.raises(QuantTuneError, match="text encoder only .* no CLIP is connected"):
        import_lora(only, model)


@pytest.mark.parametrize("content,message", [
    (b"", "is empty"), (pickle.dumps({"a": 1}), "pickled checkpoint"), (b"PK\x03\x04" + b"\0" * 40,
                                                                       "pickled checkpoint"),
    (b"hello, this is no LoRA", "not a safetensors file"), (None, "does not exist")])
def test_bad_files(content, message, tmp_path):
    from quanttune.host.lora_file import read_lora
    from quanttune.quant import QuantTuneError

    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QuantTuneError, match=message):
        read_lora(path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_files(keep, tmp_path):
    from quanttune.host.lora_file import read_lora, save_lora
    from quanttune.quant import QuantTuneError

    path = save_lora(tmp_path / "x.safetensors", exported(models.small_model())[1])
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * keep)])
    with pytest.raises(QuantTuneError, match="cut short"):
        read_lora(path)


def test_a_part_without_a_place_is_told():
    from quanttune.host.lora_fit import fit_lora

    model = models.small_model()
    _, lora = exported(model, include=("attn1.to_q",))
    first = next(iter(lora)).partition(".")[0]
    fit = fit_lora({**lora, f"{first}.diff_b": torch.ones(32)}, model)
    assert fit.matched == fit.layers and "to_q.bias" in fit.notes()[0]
    assert len(model.clone().add_patches(fit.patches)) == len(fit.patches)
