"""Load SD 4x Upscaler: the same as diffusers, the host's own objects, precisions, the node."""

import asyncio
import gc
import sys
import weakref
from types import ModuleType

import pytest
import torch

from quanttune.tests.host import models, upscalers
from quanttune.tests.host.upscalers import (
    SHIPPED,
    change,
    host_forward,
    load,
    load_unet,
    told,
    unet_inputs,
)


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def starter(monkeypatch, upscaler_folder):
    """A stand-in for the loader of the shipped upscaler: its answer, and what it was asked."""
    module = ModuleType("quanttune.starter.load_upscaler")
    module.paths, module.parts = [], load("x4/")
    module.load_starter_upscaler = lambda path=None: module.paths.append(path) or module.parts
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class TestSameAsDiffusers:
    def test_unet(self, upscaler_pipeline, upscaler_folder):
        model = load()[0]
        x, timesteps, context, levels = inputs = unet_inputs()
        ours = host_forward(model, inputs)
        theirs = upscaler_pipeline.unet(x, timesteps, context, class_labels=levels).sample
        assert models.relative(ours, theirs) < 1e-5
        other = host_forward(model, (x, timesteps, context, levels + 1))
        assert models.relative(other, theirs) > 1e-3  # the noise level counts

    def test_vae(self, upscaler_pipeline, upscaler_folder):
        vae = load()[2]
        latent = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
        ours = vae.first_stage_model.decode(latent)
        theirs = upscaler_pipeline.vae.decode(latent).sample
        assert models.relative(ours, theirs) < 1e-5
        picture = vae.decode(latent)
        assert picture.shape == (1, 32, 48, 3)
        expected = (theirs.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
        assert (picture - expected).abs().max() < 1e-5
        assert vae.encode(picture).shape == latent.shape
        posterior = upscaler_pipeline.vae.encode(theirs).latent_dist
        # The host's encoder answers with a sample; its moments are compared.
        moments = vae.first_stage_model.quant_conv(vae.first_stage_model.encoder(theirs))
        assert models.relative(moments[:, :4], posterior.mean) < 1e-5

    def test_text_encoder(self, upscaler_pipeline, upscaler_folder):
        clip = load()[1]
        tokens = clip.tokenize("a photo of a cat")
        ids = torch.tensor([[int(token) for token, _ in tokens["h"][0]]])
        assert ids.shape == (1, 77) and ids[0, -1] == 0  # padded as SD2 is
        ours = clip.encode_from_tokens(tokens)
        theirs = upscaler_pipeline.text_encoder(ids)[0]
        assert models.relative(ours, theirs) < 1e-5

    @pytest.mark.parametrize("changes", [
        {"attention_head_dim": 4, "num_class_embeds": 400, "layers_per_block": 2},
        {"attention_head_dim": [2, 4, 4, 4], "only_cross_attention": False},
        {"use_linear_projection": False, "transformer_layers_per_block": 2},
    ], ids=["heads", "head_size", "projection"])
    def test_unets_of_other_shapes(self, changes, upscaler_folder):
        other = upscalers.tiny_pipeline(1, unet=changes).unet
        other.save_pretrained(upscaler_folder / "unet")
        x, timesteps, context, levels = inputs = unet_inputs()
        theirs = other(x, timesteps, context, class_labels=levels).sample
        assert models.relative(host_forward(load_unet(upscaler_folder), inputs), theirs) < 1e-5

    def test_a_vae_of_other_shapes(self, upscaler_folder):
        from quanttune.host.load_upscaler import load_folder_vae

        other = upscalers.tiny_pipeline(1, vae={"block_out_channels": (32, 32, 64),
                                                "layers_per_block": 1}).vae
        other.save_pretrained(upscaler_folder / "vae")
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        ours = load_folder_vae(str(upscaler_folder)).model.decode(latent)
        assert models.relative(ours, other.decode(latent).sample) < 1e-5

    @pytest.mark.parametrize("settings", [
        {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"},
        {"beta_schedule": "linear"}, {"beta_start": 0.00085, "beta_end": 0.012},
        {"rescale_betas_zero_snr": True}], ids=lambda s: "-".join(map(str, s.values())))
    def test_prediction_and_schedule(self, settings, upscaler_folder):
        from diffusers import DDIMScheduler

        change(upscaler_folder / "scheduler" / "scheduler_config.json", **settings)
        theirs = DDIMScheduler.from_pretrained(upscaler_folder / "scheduler")
        model = load_unet(upscaler_folder).model
        wanted = {"v_prediction": "V_PREDICTION", "epsilon": "EPS"}
        assert model.model_type.name == wanted[theirs.config.prediction_type]
        kinds = [c.__name__ for c in type(model.model_sampling).__mro__]
        assert wanted[theirs.config.prediction_type] in kinds
        alphas = 1 / (1 + model.model_sampling.sigmas.double() ** 2)
        assert (alphas - theirs.alphas_cumprod).abs().max() < 1e-5

    def test_noise_on_the_small_picture(self, upscaler_pipeline, upscaler_folder):
        model = load_unet(upscaler_folder).model
        picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(5))
        level = torch.tensor([120])
        theirs = upscaler_pipeline.low_res_scheduler.add_noise(picture, noise, level)
        ours = model.noise_augmentor.q_sample(picture, level, noise)
        assert (ours - theirs).abs().max() < 1e-6
        assert model.noise_augmentor.max_noise_level == upscaler_pipeline.config.max_noise_level
        assert model.latent_format.scale_factor == upscaler_pipeline.vae.config.scaling_factor


class TestHost:
    def test_all_three_are_the_hosts(self, upscaler_folder):
        import comfy.model_base
        import comfy.sd

        model, clip, vae = load()
        assert isinstance(model.model, comfy.model_base.SD_X4Upscaler)
        assert isinstance(clip, comfy.sd.CLIP) and isinstance(vae, comfy.sd.VAE)
        assert vae.downscale_ratio == vae.upscale_ratio == vae.spacial_compression_decode() == 4
        assert model.model_size() > 4e6

    def test_the_host_can_make_each_again(self, upscaler_folder):
        model, clip, vae = load()
        for patcher in (model, clip.patcher, vae.patcher):
            factory, arguments = patcher.cached_patcher_init
            again = factory(*arguments, disable_dynamic=True)
            state = patcher.model.state_dict()
            for key, value in again.model.state_dict().items():
                if "logit_scale" not in key:
                    assert torch.equal(value, state[key]), key

    def test_the_sampler_runs_on_it(self, upscaler_folder):
        import comfy.sample
        import comfy.samplers

        model, clip, vae = load()
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        tokens = clip.tokenize("a cat")
        cond = [[clip.encode_from_tokens(tokens), {"concat_image": picture,
                                                   "noise_augmentation": 20 / 350}]]
        latent = torch.zeros(1, 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 3)
        result = comfy.sample.sample(model, noise, 2, 2.0, "ddim", "normal", cond, cond, latent,
                                     seed=3)
        picture = vae.decode(result)
        assert picture.shape == (1, 64, 64, 3) and bool(picture.isfinite().all())


class TestPrecision:
    @pytest.mark.parametrize("precision, most, size", [
        ("8-bit", 0.05, 0.45), ("4-bit", 0.6, 0.35), ("dynamic INT8", 0.1, 0.45)])
    def test_close_smaller_and_alone(self, precision, most, size, upscaler_folder, monkeypatch):
        import quanttune.host.load_upscaler as module

        seen = []

        def watched(part, *args, **kwargs):
            patcher = make(part, *args, **kwargs)
            seen.append(weakref.ref(patcher.model))
            return patcher

        floats = load_unet(upscaler_folder)
        expected = host_forward(floats, unet_inputs())
        make = module.upscaler_model
        monkeypatch.setattr(module, "upscaler_model", watched)
        model = load(precision=precision)[0]
        gc.collect()
        assert [ref() for ref in seen] == [None]  # the float model is let go
        assert 0 < models.relative(host_forward(model, unet_inputs()), expected) < most
        assert model.model_size() < size * floats.model_size()
        module.check_upscaler(model)

    def test_all_of_it_survives_saving(self, host_folders):
        """Heads, labels, cross-attention alone, prediction, schedule, latents, picture noise."""
        import folder_paths

        from quanttune.host.build import load_model
        from quanttune.host.save import save_model

        other = upscalers.tiny_pipeline(
            2, unet={"attention_head_dim": 4, "num_class_embeds": 400},
            scheduler={"prediction_type": "epsilon", "beta_start": 0.00085})
        other.save_pretrained(host_folders / "models" / "diffusers" / "other")
        quantized = load("other/", "8-bit")[0]
        expected = host_forward(load_unet(host_folders / "models/diffusers/other"), unet_inputs())
        answer = host_forward(quantized, unet_inputs())
        assert models.relative(answer, expected) < 0.05
        path = save_model(quantized, "quanttune/upscaler")[0]
        assert path.startswith(folder_paths.get_output_directory())
        again = load_model(path, "upscaler.safetensors")
        assert torch.equal(host_forward(again, unet_inputs()), answer)
        config = again.model.model_config.unet_config
        assert (config["num_heads"], config["num_classes"]) == (4, 400)
        assert config["disable_self_attentions"] == [True, True, True, False]
        assert again.model.diffusion_model.label_emb.weight.shape == (400, 128)
        for model in (quantized.model, again.model):
            assert model.model_type.name == "EPS"
            assert "EPS" in [c.__name__ for c in type(model.model_sampling).__mro__]
            assert model.model_sampling.linear_start == 0.00085
            assert model.latent_format.scale_factor == 0.08333
            assert model.noise_augmentor.max_noise_level == 350

    def test_unknown_precision(self, upscaler_folder):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match="precision is '3-bit'"):
            load(precision="3-bit")


class TestSingleFile:
    @pytest.fixture
    def state(self):
        """The original names at the smallest size that the host's detection knows."""
        import comfy.model_base
        import comfy.supported_models

        from quanttune.host.upscaler_diffusers import unet_config

        config = unet_config({**upscalers.REAL_UNET, "block_out_channels": [256] * 4,
                              "layers_per_block": 1, "up_block_types": list(upscalers.UP),
                              "only_cross_attention": [True, True, True, False]}, "test")
        family = comfy.supported_models.SD_X4Upscaler(config)
        unet = comfy.model_base.SD_X4Upscaler(family, device="meta").diffusion_model
        state = {f"model.diffusion_model.{key}": torch.zeros(value.shape, dtype=torch.float16)
                 for key, value in unet.state_dict().items()}
        state["model.diffusion_model.out.2.bias"] += 3
        return state | {
            "first_stage_model.decoder.conv_in.weight": torch.ones(512, 4, 3, 3).half(),
            "first_stage_model.post_quant_conv.weight": torch.ones(4, 4, 1, 1).half()}

    @staticmethod
    def write(state, folders, kind="checkpoints", **metadata):
        from safetensors.torch import save_file

        path = folders / "models" / kind / "x4.safetensors"
        save_file(state, path, metadata or None)
        return path

    def test_by_the_hosts_own_loader(self, state, host_folders):
        from quanttune.host.upscaler_files import upscaler_names

        self.write(state, host_folders)
        assert upscaler_names() == [SHIPPED, "x4.safetensors"]
        model, clip, vae = load("x4.safetensors")
        assert clip is None and vae.upscale_ratio == 4
        assert model.model.model_type.name == "V_PREDICTION"
        answer = host_forward(model, unet_inputs(1024, 1, 8))
        assert torch.equal(answer, torch.full_like(answer, 3))

    def test_it_is_opened_once_and_the_host_can_make_each_again(self, state, host_folders,
                                                                monkeypatch):
        import comfy.utils

        opened, real = [], comfy.utils.load_torch_file

        def watched(path, *args, **kwargs):
            opened.append(path)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(comfy.utils, "load_torch_file", watched)
        path = self.write(state, host_folders)
        model, _, vae = load("x4.safetensors")
        assert opened == [str(path)]
        for patcher in (model, vae.patcher):
            factory, arguments = patcher.cached_patcher_init
            again = factory(*arguments, disable_dynamic=True)
            first = patcher.model.state_dict()
            # The file's own tensors; a VAE that lacks some has whatever was in memory.
            for key, value in again.model.state_dict().items():
                if f"model.{key}" in state or f"first_stage_model.{key}" in state:
                    assert torch.equal(value, first[key]), key

    def test_numbers_of_no_model(self, state, host_folders):
        state["model.diffusion_model.out.2.bias"][1] = torch.nan
        self.write(state, host_folders)
        told("holds NaN or infinite values in", "x4.safetensors")

    def test_not_whole(self, state, host_folders):
        path = self.write(state, host_folders)
        path.write_bytes(path.read_bytes()[:-100])
        assert "x4-upscaler-ema.safetensors" in told("is cut short", "x4.safetensors")

    def test_without_its_vae(self, state, host_folders):
        unet = {k: v for k, v in state.items() if k.startswith("model.")}
        self.write(unet, host_folders, "diffusion_models")
        told("UNet without its VAE", "x4.safetensors")

    def test_what_is_no_vae_under_its_names(self, state, host_folders):
        unet = {k: v for k, v in state.items() if k.startswith("model.")}
        self.write(unet | {"first_stage_model.other": torch.ones(2).half()}, host_folders)
        told("nothing that ComfyUI knows as one", "x4.safetensors")

    def test_another_model(self, host_folders):
        unet = models.small_model().model.diffusion_model
        self.write({f"model.diffusion_model.{key}": value.contiguous()
                    for key, value in unet.state_dict().items()}, host_folders)
        message = told("is not the SD x4 upscaler but looks like", "x4.safetensors")
        assert "models/checkpoints" in message

    def test_the_family_is_named(self, host_folders):
        """SD1.5's names and shapes with the weights left out of the middle of it."""
        shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3), "out.2.weight": (4, 320, 3, 3),
                  "input_blocks.1.0.in_layers.0.weight": (320,),
                  "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
                  "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
                  "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
                  "output_blocks.0.0.in_layers.0.weight": (640,)}
        self.write({f"model.diffusion_model.{key}": torch.zeros(shape).half()
                    for key, shape in shapes.items()}, host_folders)
        told("looks like a model of the family SD15", "x4.safetensors")

    def test_a_pickled_file(self, host_folders):
        path = host_folders / "models" / "checkpoints" / "x4.safetensors"
        torch.save({"a": torch.zeros(1)}, path)
        told("pickled", "x4.safetensors")

    def test_the_form_of_the_shipped_one(self, upscaler_folder, host_folders, starter):
        from quanttune.host.upscaler_files import upscaler_names

        unet = "model.diffusion_model."
        state = {f"{unet}input_blocks.0.0.weight": torch.zeros(8, 7, 3, 3),
                 f"{unet}label_emb.weight": torch.zeros(10, 32)}
        path = self.write(state, host_folders, unet_config="{}", vae_config="{}")
        assert upscaler_names() == [SHIPPED, "x4/", "x4.safetensors"]
        assert load("x4.safetensors") == starter.parts
        assert starter.paths == [path]


class TestCheckUpscaler:
    def test_other_models_are_named(self, upscaler_folder):
        from quanttune.host.load_upscaler import check_upscaler
        from quanttune.quant import QuantTuneError

        check_upscaler(load()[0])
        with pytest.raises(QuantTuneError, match="This MODEL is a model of the family SDXL, not"):
            check_upscaler(models.small_model("SDXL"))


class TestNode:
    @pytest.fixture
    def node(self, comfy_inprocess):
        from quanttune.nodes.upscaler import LoadUpscaler

        return LoadUpscaler

    def test_it_loads(self, node, upscaler_folder):
        from quanttune.tests.harness.inprocess import run_node

        assert node.GET_SCHEMA().inputs[0].options == [SHIPPED, "x4/"]
        model, clip, vae = run_node(node, upscaler="x4/", precision="8-bit").args
        assert models.quantized_model(model).checkpoint.layers
        assert clip is not None and vae.upscale_ratio == 4

    def test_the_shipped_one(self, node, host_folders, starter):
        from quanttune.tests.harness.inprocess import run_node

        assert run_node(node).args == starter.parts
        assert starter.paths == [None]

    @pytest.mark.parametrize("name", ["x4/", SHIPPED, "gone/", 5, "a\nb" * 999])
    def test_a_saved_workflow_whose_file_is_gone(self, name, node, upscaler_folder, monkeypatch):
        """As ComfyUI checks a workflow before it runs it."""
        import execution
        import nodes

        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Upscaler", node)
        workflow = {
            "1": {"class_type": "Upscaler", "inputs": {"upscaler": name, "precision": "float"}},
            "2": {"class_type": "EmptyLatentImage",
                  "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}},
            "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0],
                                                        "filename_prefix": "x"}}}
        valid, _, _, errors = asyncio.run(execution.validate_prompt("id", workflow, None))
        assert valid == (name in ("x4/", SHIPPED))
        if not valid:
            (error,) = errors["1"]["errors"]
            assert "is not there; put the folder of stabilityai/" in error["details"]
            assert len(error["details"]) < 500 and "\n" not in error["details"]

    def test_a_name_from_another_node_is_checked_when_it_is_known(self, node, upscaler_folder):
        assert node.validate_inputs(None) is True

    def test_it_runs_again_when_its_files_change(self, node, upscaler_folder):
        before = node.fingerprint_inputs("x4/", "float")
        change(upscaler_folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
        assert node.fingerprint_inputs("x4/", "float") != before
