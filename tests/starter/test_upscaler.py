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


def test_the_committed_figures_beat_bicubic():
    figures = json.loads((FILE.parent / "results.json").read_text("utf-8"))
    ours, bicubic = figures["means: ours"], figures["means: bicubic"]
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
