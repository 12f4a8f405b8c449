"""The shipped files: their size, and that the host makes obedient pictures from them."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "starter"
FILES = ("unet", "clip", "vae", "classifier")


@pytest.fixture(scope="module")
def parts():
    """MODEL, CLIP and VAE as the host's executor would hold them."""
    from quanttune.starter.common import prepare_host

    torch = pytest.importorskip("torch")
    pytest.importorskip("comfy")
    prepare_host("cuda" if torch.cuda.is_available() else "cpu")
    from quanttune.starter.load import load_starter

    with torch.inference_mode():
        return load_starter()


@pytest.fixture(scope="module")
def classifier():
    """The shipped judge of pictures."""
    from quanttune.starter.classifier import load_classifier

    return load_classifier()


def test_all_files_together_stay_small():
    """The 4-bit file and the scales included; the upscaler has a test of its own."""
    files = [f for f in FOLDER.rglob("*.safetensors") if f.parent.name != "upscale"]
    assert {f.stem for f in files} >= {*FILES, "starter-4bit"}
    assert sum(f.stat().st_size for f in files) <= 24e6


def test_the_model_is_an_ordinary_one(parts):
    model, clip, vae = parts
    factory, args = model.cached_patcher_init
    assert factory(*args, disable_dynamic=True).model_size() == model.model_size()
    assert type(model.model.model_sampling).__mro__[1].__name__ == "ModelSamplingDiscrete"
    assert vae.latent_channels == 4


def test_a_prompt_with_unknown_words_and_a_long_one_still_encode(parts):
    _, clip, _ = parts
    from quanttune.starter.config import CLIP, TOKENS

    short = clip.encode_from_tokens(clip.tokenize("a xylophone of gossamer"))
    assert short.shape == (1, TOKENS, CLIP["hidden_size"])
    assert short.isfinite().all()
    long = clip.encode_from_tokens(clip.tokenize("a red star on a blue background, " * 8))
    assert long.shape[1] % TOKENS == 0 and long.shape[1] > TOKENS


def test_a_few_steps_give_pictures(parts):
    from quanttune.starter.evaluate import generate

    pictures = generate(*parts, ["a red star on a blue background"] * 2, steps=3)
    assert pictures.shape == (2, 128, 128, 3)
    assert 0 <= pictures.min() and pictures.max() <= 1


def test_the_classifier_reads_pictures_it_never_saw(classifier):
    from quanttune.starter.stage_classifier import accuracy

    right = accuracy(classifier, 300)
    assert right["colour"] >= 0.95 and right["shape"] >= 0.9 and right["background"] >= 0.95


def test_the_autoencoder_keeps_what_a_picture_shows(parts, classifier):
    import numpy as np
    import torch

    from quanttune.starter.generator import render, sample

    scenes = [sample(900_000 + i, held=None) for i in range(24)]
    pictures = torch.from_numpy(np.stack([render(s) for s in scenes])).float() / 255
    with torch.inference_mode():
        again = parts[2].decode(parts[2].encode(pictures)).cpu()
    assert -10 * torch.log10((again - pictures).square().mean()) > 22
    said = classifier.read(again)
    for name in ("shape", "colour", "background"):
        right = np.mean([a[name] == getattr(s, name) for a, s in zip(said, scenes)])
        assert right >= 0.85, name


def test_pictures_obey_their_prompts(parts, classifier):
    """`results.json` has the figures over 300 prompts; chance is 0.11 to 0.21."""
    from quanttune.starter.evaluate import generate, held_out_prompts, obedience

    prompts = held_out_prompts(48)
    pictures = generate(*parts, [text for _, text in prompts])
    right = obedience([s for s, _ in prompts], pictures, classifier)
    for name in ("shape", "colour", "background"):
        assert right[name] >= 0.85, (name, right)


@pytest.mark.parametrize("damage", ["nan", "cut"])
def test_a_damaged_file_is_told(damage, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("comfy")
    from quanttune.quant import QuantTuneError
    from quanttune.quant.whole_file import write_safetensors
    from quanttune.starter.load import read, whole

    path = tmp_path / "clip.safetensors"
    write_safetensors(path, {"a": torch.tensor([float(damage == "cut" or "nan")])}, {})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(QuantTuneError, match="clip.safetensors (is missing or damaged|has NaN)"):
        read(str(path))
    other = "unet.safetensors describes another network"
    with pytest.raises(QuantTuneError, match=other), whole("unet.safetensors"):
        raise KeyError("model_channels")
