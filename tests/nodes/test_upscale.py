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


def checkpoint_of_the_smallest(path):
    """A file in the original names that the host's own detection knows: four levels of one block
    each and the VAE of the real size, random weights."""
    import comfy.ldm.models.autoencoder
    import comfy.model_base
    import comfy.supported_models
    from safetensors.torch import save_file

    from quanttune.host.upscaler_diffusers import unet_config
    from quanttune.tests.host import upscalers

    config = unet_config({**upscalers.REAL_UNET, "block_out_channels": [256] * 4,
                          "layers_per_block": 1, "up_block_types": list(upscalers.UP),
                          "only_cross_attention": [True, True, True, False]}, "test")
    family = comfy.supported_models.SD_X4Upscaler(config)
    vae = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
           "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [],
           "dropout": 0.0}
    generator = torch.Generator().manual_seed(0)
    state = {}
    unet = comfy.model_base.SD_X4Upscaler(family, device="meta").diffusion_model
    with torch.device("meta"):
        decoder = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=vae, embed_dim=4)
    parts = {"model.diffusion_model.": unet, "first_stage_model.": decoder}
    for prefix, module in parts.items():
        for key, value in module.state_dict().items():
            spread = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            drawn = torch.empty(value.shape, dtype=torch.float16).normal_(
                float(value.ndim == 1 and key.endswith("weight")), spread, generator=generator)
            state[prefix + key] = drawn
    save_file(state, path)


def test_the_stock_checkpoint_loaders_model_and_vae(node, host_folders):
    """The route without a loader of ours: the host detects the upscaler in its own file."""
    import comfy.model_base
    import nodes

    from quanttune.host.load_upscaler import load_upscaler

    checkpoint_of_the_smallest(host_folders / "models" / "checkpoints" / "x4.safetensors")
    words = [[torch.randn(1, 7, 1024, generator=torch.Generator().manual_seed(3)), {}]]
    found = []
    with torch.inference_mode():
        for load in (nodes.CheckpointLoaderSimple().load_checkpoint, load_upscaler):
            model, _, vae = load("x4.safetensors")
            assert isinstance(model.model, comfy.model_base.SD_X4Upscaler)
            found += run_node(node, image=image(16, 70), model=model, vae=vae, positive=words,
                              negative=words, steps=1, cfg=1.0, tile_size=64).args
    assert found[0].shape == (1, 64, 280, 3) and found[0].std() > 0.01
    assert torch.equal(*found)


def test_a_damaged_number_in_a_single_file(node, host_folders):
    from safetensors.torch import load_file, save_file

    from quanttune.host.load_upscaler import load_upscaler
    from quanttune.quant import QuantTuneError

    path = host_folders / "models" / "checkpoints" / "x4.safetensors"
    checkpoint_of_the_smallest(path)
    state = load_file(path)
    name = "first_stage_model.decoder.conv_out.weight"
    for bad, words in ((state[name] * torch.nan, "NaN"), (state[name].int(), "int32")):
        save_file({**state, name: bad}, path)
        with pytest.raises(QuantTuneError, match=f"{words}.*{name}"):
            load_upscaler("x4.safetensors")
