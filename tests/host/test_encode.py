"""What the diffusion model is given for captions."""

import pytest
import torch

from quanttune.tests.host import models

pytestmark = pytest.mark.usefixtures("comfy_inprocess")
SIZES = ((16, 16), (16, 24), (128, 128))


class Reader:
    """A text encoder: what it gives depends on whether there is a caption, and on nothing else."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        some = float(bool(text))
        return [[torch.full((1, 7, 24), some), {"pooled_output": torch.full((1, 128), some)}]]


def sdxl():
    """An SDXL that is told sizes."""
    import comfy.supported_models

    config = comfy.supported_models.SDXL(
        {**models.COMMON, **models.FAMILIES["SDXL"], "adm_in_channels": 128 + 6 * 256})
    config.set_inference_dtype(torch.float32, None)
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(config.get_model({}, ""), cpu, cpu)


def test_an_empty_caption_comes_with_the_size_of_its_picture():
    from quanttune.host.encode import conditions_of, encode_empty
    from quanttune.training.data import TrainingSet

    model, clip = sdxl(), Reader()
    latents = tuple(torch.zeros(4, *size) for size in (*SIZES, SIZES[0]))
    found = encode_empty(model, clip, TrainingSet(latents, ({},) * 4, (False,) * 4, ("",) * 4, ""))
    assert sorted(tuple(s) for s in found) == sorted((4, *size) for size in SIZES)
    for latent in latents:
        empty = found[tuple(latent.shape)]
        captioned = conditions_of(model, clip, "a dog", latent)
        assert torch.equal(empty["y"][:, 128:], captioned["y"][:, 128:]), "the same size"
        assert not empty["y"][:, :128].any() and captioned["y"][:, :128].all()
        assert not empty["c_crossattn"].any() and captioned["c_crossattn"].all()


@pytest.mark.parametrize("tensors,kind", [
    ({"latent": torch.tensor([[[float("nan")]]])}, "quanttune.latent"),
    ({"latent": torch.ones(1, 2, 2)}, "quanttune.conditions"), ({}, "quanttune.latent"),
    ({"latent": torch.ones(1, 2, 2, dtype=torch.bool)}, "quanttune.latent")])
def test_a_damaged_cache_is_made_again(tensors, kind, comfy_inprocess, tmp_path):
    from quanttune.host.encode import LATENT, _read
    from quanttune.quant.whole_file import write_safetensors

    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"latent": torch.ones(1, 2, 2)}, {"format": LATENT})
    assert _read(path, LATENT)["latent"].shape == (1, 2, 2)
    write_safetensors(path, tensors, {"format": kind})
    assert _read(path, LATENT) is None and not path.exists()
