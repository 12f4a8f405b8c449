"""The small upscaler's file: what it holds, that the host upscales with it, what a bad one says."""

from __future__ import annotations

import json
import shutil

import pytest

from quanttune.starter.upscaler_config import FACTOR, FILE, SCALE_FACTOR, UNET, VAE

torch = pytest.importorskip("torch")
pytest.importorskip("comfy")

from quanttune.quant.errors import QuantTuneError  # noqa: E402
from quanttune.starter.common import prepare_host  # noqa: E402
from quanttune.starter.upscaler_vae import SPREAD  # noqa: E402


@pytest.fixture(scope="module")
def parts():
    """MODEL, CLIP and VAE as the host's executor would hold them."""
    prepare_host("cuda" if torch.cuda.is_available() else "cpu")
    from quanttune.starter.load_upscaler import load_starter_upscaler

    with torch.inference_mode():
        return load_starter_upscaler()


def test_the_file_is_small_and_says_what_it_is():
    from safetensors import safe_open

    assert FILE.stat().st_size <= 12e6
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
        assert {k.split(".")[0] for k in file.keys()} == {"model", "first_stage_model"}
        assert all(file.get_tensor(k).dtype == torch.float16 for k in file.keys())
    assert json.loads(metadata["unet_config"]) == UNET
    assert json.loads(metadata["vae_config"]) == VAE
    assert float(metadata["scale_factor"]) == SCALE_FACTOR


def test_it_is_the_hosts_own_upscaler(parts):
    import comfy.model_base

    model, _, vae = parts
    assert isinstance(model.model, comfy.model_base.SD_X4Upscaler)
    assert model.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    assert model.model.latent_format.scale_factor == SCALE_FACTOR
    assert vae.downscale_ratio == vae.upscale_ratio == FACTOR
    for patcher in (model, vae.patcher):
        factory, args = patcher.cached_patcher_init
        assert factory(*args, disable_dynamic=True).model_size() == patcher.model_size()


def test_latents_are_what_the_diffusion_model_expects(parts):
    """Of the spread that the recipe gives them, after the scale factor."""
    from quanttune.starter.upscaler_evaluate import held_out

    _, truth, _ = held_out(6)
    with torch.inference_mode():
        latents = parts[2].encode(truth[:, 100:356, 100:356]) * SCALE_FACTOR
    assert latents.shape == (6, 4, 64, 64)
    assert latents.mean().abs() < 0.6
    assert 0.5 < latents.std() / SPREAD < 1.5


def test_flat_colour_keeps_its_colour_at_any_size(parts):
    """Group norms of two channels would give every flat picture the same colours."""
    vae = parts[2]
    for colour in ((0.1, 0.5, 0.9), (0.8, 0.3, 0.2)):
        for side in (32, 96):
            flat = torch.tensor(colour).expand(1, side, side, 3).contiguous()
            with torch.inference_mode():
                again = vae.decode(vae.encode(flat)).cpu()
            assert (again[:, 8:-8, 8:-8] - flat[:, 8:-8, 8:-8]).abs().mean() < 0.03


@pytest.fixture(scope="module")
def scene():
    """A held-out scene: what it shows in words, and its picture of 128 pixels."""
    from quanttune.starter.upscaler_evaluate import held_out, resize

    told, truth, _ = held_out(2)
    return told[1], resize(truth[1:], 128, "area")


@pytest.mark.parametrize("precision", ["float", "8-bit"])
def test_the_live_preview_has_the_colours_of_the_result(parts, scene, monkeypatch, precision):
    import comfy.latent_formats
    import numpy as np
    from comfy.cli_args import LatentPreviewMethod, args

    from quanttune.host.precision import at_precision
    from quanttune.host.upscale import upscale
    from quanttune.host.upscale_inputs import conditioning
    from quanttune.starter.upscaler_config import DELICATE, SETTINGS

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    (words, small), seen = scene, []
    model, clip, vae = parts
    with torch.inference_mode():
        if precision != "float":
            model = at_precision(model, precision, "x", DELICATE)
        prompts = conditioning(clip, words, "", None, None, 2.0)
        settings = {**SETTINGS, "progress": lambda done, total, shown: seen.append(shown)}
        out = upscale(model, vae, small, *prompts, **settings)
    seen = [shown[1] for shown in seen if shown]
    last = torch.from_numpy(np.array(seen[-1])).float() / 255
    means = torch.nn.functional.avg_pool2d(out.movedim(-1, 1), FACTOR)[0].movedim(0, -1)
    assert len(seen) == 4 and last.shape == means.shape
    assert (last - means).abs().mean() < 0.02
    # The full-size autoencoder's colours, which are false here, and stay in the host's class.
    false = comfy.latent_formats.SD_X4()
    assert false.latent_rgb_factors != model.model.latent_format.latent_rgb_factors
    assert false.latent_rgb_factors_bias is None


def test_the_preview_factors_are_those_that_the_recipe_fits(parts):
    from quanttune.starter.upscaler_config import LATENT_RGB, LATENT_RGB_BIAS
    from quanttune.starter.upscaler_preview import fit, scenes

    factors, bias, off = fit(parts[2], scenes(6, first=100))
    assert off < 0.02
    # The fourth latent holds detail, and hardly any colour.
    assert (factors - torch.tensor(LATENT_RGB)).abs().max() < 0.02
    assert (bias - torch.tensor(LATENT_RGB_BIAS)).abs().max() < 0.03


def test_it_comes_nearer_to_the_original_than_bicubic(parts):
    """`results.json` has the figures over more pictures."""
    from quanttune.starter.upscaler_evaluate import held_out, psnr, resize, upscale

    told, truth, _ = held_out(1)
    small = resize(truth, 128, "area")
    bicubic = psnr(resize(small, 512, "bicubic"), truth)
    assert psnr(upscale(parts, small, told), truth) > bicubic + 0.2


def test_8_bits_still_come_nearer_than_bicubic(parts):
    from quanttune.host.precision import at_precision
    from quanttune.starter.upscaler_config import DELICATE
    from quanttune.starter.upscaler_evaluate import held_out, psnr, resize, upscale

    told, truth, _ = held_out(1)
    small = resize(truth, 128, "area")
    bicubic = psnr(resize(small, 512, "bicubic"), truth)
    with torch.inference_mode():
        model = at_precision(parts[0], "8-bit", "x", DELICATE)
    assert psnr(upscale((model, *parts[1:]), small, told), truth) > bicubic


@pytest.mark.parametrize("config", ["[]", "{}", '{"model_channels": 32}', "[" * 10000])
def test_a_file_that_describes_another_network_says_so(tmp_path, config):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from quanttune.starter.load_upscaler import load_starter_upscaler

    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(FILE), tmp_path / "other.safetensors", {**metadata, "unet_config": config})
    with pytest.raises(QuantTuneError, match="other.safetensors"), torch.inference_mode():
        load_starter_upscaler(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.weight",
                                  "first_stage_model.post_quant_conv.bias"])  # fmt: skip
@pytest.mark.parametrize("bad, words", [(torch.nan, "NaN or infinite values in"),
                                        (-torch.inf, "NaN or infinite values in"),
                                        (None, "holds int8 in")])  # fmt: skip
def test_a_file_with_no_numbers_for_weights_says_so(tmp_path, name, bad, words):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from quanttune.starter.load_upscaler import load_starter_upscaler

    state = load_file(FILE)
    if bad is None:
        state[name] = state[name].to(torch.int8)
    else:
        state[name].view(-1)[1] = bad
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    save_file(state, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(QuantTuneError, match=f"bad.safetensors (holds )?{words}"):
        load_starter_upscaler(tmp_path / "bad.safetensors")


def with_(**changes):
    """A change to the text encoder's tensors; None leaves one out."""
    return lambda state: {k: v for k, v in {**state, **changes}.items() if v is not None}


TEXT = {
    "another file": (lambda state: {"a": torch.zeros(2)}, "so it is another file"),
    "no ids": (with_(token_ids=None), "so it is another file"),
    "more ids than rows": (with_(token_ids=torch.arange(99)), "do not belong together"),
    "no list of ids": (with_(token_ids=torch.tensor(3)), "do not belong together"),
    "ids of no token": (with_(token_ids=torch.arange(83) - 1), "do not belong together"),
    "fractions": (with_(token_ids=torch.arange(83).float()), "do not belong together"),
    "wider": (with_(**{"text_model.final_layer_norm.bias": torch.zeros(129)}), "has the shape"),
    "less": (with_(**{"text_model.final_layer_norm.bias": None}), "lacks the tensor"),
    "more": (with_(another=torch.zeros(1)), "unknown tensor 'another'"),
    "NaN": (with_(token_rows=torch.full((84, 128), torch.nan)), "NaN or infinite"),
    "whole": (with_(token_rows=torch.ones(84, 128).int()), "holds int32"),
}


@pytest.mark.parametrize("kind", TEXT)
def test_another_text_encoder_in_the_shipped_ones_place(tmp_path, parts, kind):
    from safetensors.torch import load_file, save_file

    from quanttune.starter.load import FOLDER, load_clip

    change, words = TEXT[kind]
    path = tmp_path / "clip.safetensors"
    save_file(change(load_file(FOLDER / "clip.safetensors")), path)
    with pytest.raises(QuantTuneError, match=words) as caught:
        load_clip(str(path))
    assert "clip.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_the_committed_figures_beat_bicubic():
    figures = json.loads((FILE.parent / "results.json").read_text("utf-8"))
    ours, bicubic = figures["means: ours"], figures["means: bicubic"]
    assert figures["settings"]["count"] >= 24
    assert ours["psnr"] > bicubic["psnr"] + 1
    assert ours["feature_distance"] < bicubic["feature_distance"]


def test_a_missing_a_cut_and_a_foreign_file_each_say_so(tmp_path):
    from quanttune.starter.load_upscaler import load_starter_upscaler

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(FILE.read_bytes()[:100_000])
    foreign = tmp_path / "foreign.safetensors"
    shutil.copy(FILE.parents[1] / "vae.safetensors", foreign)
    for path, words in (
        (tmp_path / "none.safetensors", "none.safetensors is missing or damaged"),
        (cut, "cut.safetensors is missing or damaged"),
        (foreign, "foreign.safetensors carries no `unet_config`"),
    ):
        with pytest.raises(QuantTuneError, match=words) as caught:
            load_starter_upscaler(path)
        assert str(caught.value).count(". ") == 0


def test_a_file_without_some_tensor_says_which(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from quanttune.starter.load_upscaler import load_starter_upscaler

    state = load_file(FILE)
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    for name in ("model.diffusion_model.out.2.weight", "first_stage_model.post_quant_conv.bias"):
        less = {k: v for k, v in state.items() if k != name}
        save_file(less, tmp_path / "less.safetensors", metadata)
        with pytest.raises(QuantTuneError, match=name.split(".", 2)[-1]):
            load_starter_upscaler(tmp_path / "less.safetensors")
