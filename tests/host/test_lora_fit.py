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
