"""SD 4x Upscale as the executor runs it."""

import pytest
import torch

from quanttune.tests.harness.inprocess import run_node
from quanttune.tests.host.upscale_models import image, prompt, small_upscaler, small_vae


@pytest.fixture(scope="module")
def node(comfy_inprocess):
    from quanttune.nodes.upscale import Upscale4x

    return Upscale4x


@pytest.fixture(scope="module")
def loaded(comfy_inprocess):
    with torch.inference_mode():
        return {"model": small_upscaler(), "vae": small_vae()}


def test_words_or_conditioning_or_both(node, loaded):
    class Clip:
        read = []

        def tokenize(self, text):
            self.read.append(text)
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return prompt(len(tokens))

    picture = image(8, 12)
    settings = {**loaded, "image": picture, "steps": 1}
    words, = run_node(node, **settings, clip=Clip(), prompt="abc", negative_prompt="de").args
    assert words.shape == (1, 32, 48, 3) and Clip.read == ["abc", "de"]
    given, = run_node(node, **settings, positive=prompt(3), negative=prompt(2)).args
    assert torch.equal(words, given)
    Clip.read.clear()
    both, = run_node(node, **settings, clip=Clip(), prompt="other", negative_prompt="other",
                     positive=prompt(3), negative=prompt(2)).args
    assert torch.equal(words, both) and not Clip.read


def test_neither_words_nor_conditioning(node, loaded):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="connect the upscaler's CLIP, or a conditioning"):
        run_node(node, **loaded, image=image(8, 8), prompt="a cat")


def test_the_defaults(node, loaded):
    defaults = {entry.id: getattr(entry, "default", None) for entry in node.GET_SCHEMA().inputs}
    assert (defaults["noise_level"], defaults["steps"], defaults["cfg"]) == (20, 25, 9.0)
    assert (defaults["sampler_name"], defaults["scheduler"]) == ("ddim", "ddim_uniform")
    assert defaults["tile_vae"] is True
    found, = run_node(node, **loaded, image=image(8, 8), positive=prompt(), negative=prompt(1),
                      steps=2).args
    assert found.shape == (1, 32, 32, 3)
