"""What *SD 4x Upscale* cannot work with, and whose words it takes."""

import pytest
import torch

from quanttune.tests.host.test_upscale import inference, run  # noqa: F401
from quanttune.tests.host.upscale_models import image, prompt, small_upscaler, small_vae


@pytest.fixture(scope="module")
def parts(comfy_inprocess):
    with torch.inference_mode():
        yield small_upscaler(), small_vae()


def test_bad_pictures(parts):
    from quanttune.quant import QuantTuneError

    bad = {"no picture": torch.zeros(0, 8, 8, 3), r"empty \(8 x 0": torch.zeros(1, 0, 8, 3),
           "NaN": torch.full((1, 8, 8, 3), torch.nan), "channels": torch.zeros(1, 8, 8, 2),
           r"is \[8, 8, 3\]": torch.zeros(8, 8, 3), "is NoneType": None,
           r"whole numbers \(torch.uint8\)": torch.full((1, 8, 8, 3), 255, dtype=torch.uint8),
           r"whole numbers \(torch.int64\)": torch.ones(1, 8, 8, 3, dtype=torch.int64),
           r"complex numbers \(torch.complex64\)": torch.ones(1, 8, 8, 3) * 1j}
    for match, picture in bad.items():
        with pytest.raises(QuantTuneError, match=match) as caught:
            run(parts, picture)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_bad_settings(parts):
    from quanttune.quant import QuantTuneError

    for match, settings in {
        "0 to 350": {"noise_level": 351}, "at least one": {"steps": 0},
        "overlap of 64": {"overlap": 64}, "is -8, but tiles share 0": {"overlap": -8},
        "at least 64": {"tile_size": 32, "overlap": 0},
        "cfg is nan": {"cfg": float("nan")},
        "no sampler 'x'": {"sampler": "x"}, "no scheduler 'x'": {"scheduler": "x"},
    }.items():
        with pytest.raises(QuantTuneError, match=match):
            run(parts, image(8, 8), **settings)


def test_a_result_that_is_no_picture(parts):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        run(parts, image(8, 8), steps=1, scheduler="kl_optimal")


@pytest.mark.parametrize("width", [8, 72])
def test_a_vae_that_draws_no_picture(parts, width):
    """The host's own loader takes damaged numbers, which would go on as a black picture."""
    from quanttune.quant import QuantTuneError

    vae = small_vae()
    vae.first_stage_model.decoder.conv_out.bias[1] = torch.nan
    with pytest.raises(QuantTuneError, match=r"VAE drew NaN.*; get the upscaler's file again"):
        run((parts[0], vae), image(8, width), steps=1)


def test_another_model_or_vae(parts):
    import comfy.sd

    from quanttune.host.upscale import upscale
    from quanttune.quant import QuantTuneError
    from quanttune.tests.host.models import small_model

    model, vae = parts
    eightfold = small_vae(ch_mult=[1, 2, 4, 4])
    eightfold.upscale_ratio = eightfold.downscale_ratio = 8
    for match, pair in {
        "BaseModel, not Stable Diffusion's x4": (small_model(), vae),
        "something else, not": (vae, vae), "enlarges 8 times": (model, eightfold),
        "no VAE": (model, comfy.sd.VAE({})), "There is no VAE": (model, None),
    }.items():
        with pytest.raises(QuantTuneError, match=match) as caught:
            upscale(*pair, image(8, 8), prompt(), prompt())
        assert "connect the" in str(caught.value)


def test_conditioning_that_tiles_cannot_follow(parts):
    from quanttune.host.upscale import upscale
    from quanttune.quant import QuantTuneError

    (embedding, _), = prompt()
    for told, extra in {"a ControlNet": {"control": object()}, "an area": {"area": (8, 8, 0, 0)},
                        "a mask": {"mask": torch.ones(1, 8, 8)}, "GLIGEN": {"gligen": (1, 2, 3)},
                        "replaces": {"concat_image": torch.zeros(1, 3, 8, 8)}}.items():
        for which in (0, 1):
            both = [prompt(), prompt()]
            both[which] = [[embedding, extra]]
            with pytest.raises(QuantTuneError, match=told):
                upscale(*parts, image(8, 8), *both)
    with pytest.raises(QuantTuneError, match="negative conditioning is empty"):
        upscale(*parts, image(8, 8), prompt(), [])
    for empty in ([[None, {}]], [[torch.zeros(7, 32), {}]]):
        with pytest.raises(QuantTuneError, match="positive conditioning holds no prompt"):
            upscale(*parts, image(8, 8), empty, prompt())
    with pytest.raises(QuantTuneError, match="width 768, but this upscaler needs 32"):
        upscale(*parts, image(8, 8), [[torch.zeros(1, 7, 768), {}]], prompt())


def test_words_or_conditioning(comfy_inprocess):
    from quanttune.host.upscale_inputs import conditioning
    from quanttune.quant import QuantTuneError

    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return [[tokens, {}]]

    read = conditioning(Clip(), "a cat", "blur", None, None, 9.0)
    assert read == ([["a cat", {}]], [["blur", {}]])
    given = conditioning(Clip(), "a cat", "blur", prompt(), None, 9.0)
    assert torch.is_tensor(given[0][0][0]) and given[1] == [["blur", {}]]
    positive, negative = conditioning(None, "", "", prompt(), None, 1.0)
    assert positive is negative
    for match, arguments in {"the positive prompt": (None, "a", "", None, prompt(), 9.0),
                             "the negative prompt": (None, "", "", prompt(), None, 9.0),
                             "positive conditioning is empty": (Clip(), "a", "", [], None, 9.0),
                             "negative conditioning is empty": (Clip(), "a", "", None, [], 1.0),
                             }.items():
        with pytest.raises(QuantTuneError, match=match):
            conditioning(*arguments)


def test_what_is_no_conditioning(parts):
    from quanttune.host.upscale import upscale
    from quanttune.host.upscale_inputs import conditioning
    from quanttune.quant import QuantTuneError

    (read, _), = prompt()
    forms = {"no CONDITIONING but dict": {"a": 1}, "no CONDITIONING but str": "hello",
             "no CONDITIONING but int": 5}
    for form in ([[read, None]], [[read]], [[read, {}, 1]], [5], ["hello"]):
        forms[f"not a prompt with its settings.{len(forms)}"] = form
    for match, form in forms.items():
        match = match.split(".")[0]
        with pytest.raises(QuantTuneError, match=match):
            conditioning(None, "", "", form, None, 1.0)
        with pytest.raises(QuantTuneError, match=match) as caught:
            upscale(*parts, image(8, 8), prompt(), form)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    for match, embedding in {
        r"is empty \(\[0, 7, 32\]\)": read[:0].expand(0, 7, 32), "is empty": read[:, :0],
        "NaN": read * torch.nan, "infinite": read / 0, "sparse": read.to_sparse(),
    }.items():
        with pytest.raises(QuantTuneError, match=f"positive conditioning .*{match}"):
            upscale(*parts, image(8, 8), [[embedding, {}]], prompt())
    with pytest.raises(QuantTuneError, match="strength of nan"):
        upscale(*parts, image(8, 8), [[read, {"strength": torch.nan}]], prompt())


def test_places_that_are_none_are_left_out(parts):
    from quanttune.host.upscale_inputs import NOT_CROPPED, check_conditioning

    extra = {**dict.fromkeys(NOT_CROPPED), "pooled_output": None}
    found = check_conditioning(parts[0], [[prompt()[0][0], extra]], prompt())
    assert found[0][0][1] == {"pooled_output": None}


def test_a_noise_level_that_the_model_has_no_class_for(parts, monkeypatch):
    from quanttune.quant import QuantTuneError

    monkeypatch.setattr(parts[0].model.diffusion_model, "num_classes", 100)
    with pytest.raises(QuantTuneError, match="is 100, but .* below 100; set .* at most 99"):
        run(parts, image(8, 8), noise_level=100)
    run(parts, image(8, 8), noise_level=99, steps=1)


def test_self_attention_guidance_sees_one_tile_only(parts):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    from quanttune.quant import QuantTuneError
    from quanttune.tests.harness.inprocess import run_node

    model, vae = parts
    patched = run_node(SelfAttentionGuidance, model=model, scale=0.5, blur_sigma=2.0).args[0]
    with pytest.raises(QuantTuneError, match="'Self-Attention Guidance'.* tile_size"):
        run((patched, vae), image(72, 64), steps=1)


def test_context_windows_are_no_tiles(parts):
    from quanttune.quant import QuantTuneError

    model, vae = parts[0].clone(), parts[1]
    model.model_options["context_handler"] = object()  # where 'Context Windows' keeps its own
    with pytest.raises(QuantTuneError, match="'Context Windows'.* take that node out"):
        run((model, vae), image(72, 64), steps=1)
