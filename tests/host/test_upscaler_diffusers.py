"""A diffusers folder in the host's terms: real sizes, every saved form, settings and tensors."""

import json
import shutil

import pytest
import torch

from quanttune.tests.host import models, upscalers
from quanttune.tests.host.upscalers import (
    WEIGHTS,
    change,
    host_forward,
    load,
    load_unet,
    told,
    unet_inputs,
    with_old_names,
)


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


class TestRealSizes:
    """The published upscaler's shapes, by names alone."""

    def test_the_unet_is_what_the_host_detects(self):
        import comfy.model_base
        import comfy.model_detection
        import comfy.supported_models

        from quanttune.host.upscaler_diffusers import unet_config, unet_state

        theirs = upscalers.meta_parts()[0]
        config = unet_config(json.loads(theirs.to_json_string()), "config")
        state = unet_state(theirs.state_dict(), config, "unet")
        assert len(state) == len(theirs.state_dict())
        prefix = "model.diffusion_model."
        found = comfy.model_detection.model_config_from_unet(
            {prefix + key: value for key, value in state.items()}, prefix)
        assert isinstance(found, comfy.supported_models.SD_X4Upscaler)
        assert found.unet_config == config
        built = comfy.model_base.SD_X4Upscaler(found, device="meta").diffusion_model
        assert {k: v.shape for k, v in built.state_dict().items()} == {
            k: v.shape for k, v in state.items()}
        assert 472e6 < sum(p.numel() for p in built.parameters()) < 474e6

    @pytest.mark.parametrize("old_names", [False, True])
    def test_the_vae_is_what_the_host_makes(self, old_names):
        from comfy.ldm.models.autoencoder import AutoencoderKL

        from quanttune.host.upscaler_diffusers import vae_config, vae_state

        theirs = upscalers.meta_parts()[1]
        config = vae_config(json.loads(theirs.to_json_string()), "config")
        state = dict(theirs.state_dict())
        if old_names:
            state = with_old_names(state)
        state = vae_state(state)
        # What makes the host take it for the upscaler's.
        assert "decoder.up.2.upsample.conv.weight" in state
        assert "encoder.down.2.downsample.conv.weight" not in state
        assert "decoder.up.3.upsample.conv.weight" not in state
        with torch.device("meta"):
            built = AutoencoderKL(**config)
        assert {k: v.shape for k, v in built.state_dict().items()} == {
            k: v.shape for k, v in state.items()}

    def test_the_text_encoder_is_the_hosts(self):
        import comfy.clip_model
        import comfy.ops

        from quanttune.host.upscaler_diffusers import text_config, text_state

        theirs = upscalers.meta_parts()[2]
        config = text_config(theirs.config.to_dict(), "config")
        state = text_state(theirs.state_dict(), config["hidden_size"])
        built = comfy.clip_model.CLIPTextModel({**config, "eos_token_id": 2}, torch.float32,
                                               "meta", comfy.ops.manual_cast)
        assert {k: v.shape for k, v in built.state_dict().items()} == {
            k: v.shape for k, v in state.items()}


class TestForms:
    """The same weights in every form that diffusers saves."""

    def difference(self, upscaler_folder, expected):
        """The largest one between two readings of a UNet, which hold the same tensors."""
        from quanttune.host.upscaler_diffusers import read_unet

        state = read_unet(upscaler_folder).state
        assert state.keys() == expected.keys()
        return max(float((state[k].float() - v.float()).abs().max()) for k, v in expected.items())

    @pytest.fixture
    def expected(self, saved_upscaler):
        from quanttune.host.upscaler_diffusers import read_unet

        return read_unet(saved_upscaler).state

    @pytest.mark.parametrize("options", [
        {"max_shard_size": "1MB"}, {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "1MB"},
        {"variant": "fp16", "max_shard_size": "1MB"}], ids=str)
    def test_unet(self, options, upscaler_pipeline, upscaler_folder, expected):
        shutil.rmtree(upscaler_folder / "unet")
        upscaler_pipeline.unet.save_pretrained(upscaler_folder / "unet", **options)
        shards = 2 if "max_shard_size" in options else 1
        weights = [p for p in (upscaler_folder / "unet").iterdir() if p.suffix != ".json"]
        assert len(weights) >= shards
        assert self.difference(upscaler_folder, expected) == 0

    def test_half_precision(self, upscaler_folder, expected):
        from safetensors.torch import load_file, save_file

        path = upscaler_folder / "unet" / WEIGHTS
        half = {k: v.half() for k, v in load_file(path).items()}
        save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
        assert self.difference(upscaler_folder, expected) == 0  # full precision first
        path.unlink()
        assert 0 < self.difference(upscaler_folder, expected) < 1e-2
        assert bool(host_forward(load_unet(upscaler_folder), unet_inputs()).isfinite().all())

    def test_what_is_whole_goes_before_what_is_not(self, upscaler_pipeline, upscaler_folder,
                                                   expected):
        path = upscaler_folder / "unet" / WEIGHTS
        upscaler_pipeline.unet.save_pretrained(upscaler_folder / "unet", variant="fp16")
        path.write_bytes(path.read_bytes()[:1000])
        assert self.difference(upscaler_folder, expected) == 0

    def test_a_vae_with_the_old_names(self, upscaler_pipeline, upscaler_folder):
        from safetensors.torch import load_file, save_file

        from quanttune.host.load_upscaler import load_folder_vae

        path = upscaler_folder / "vae" / WEIGHTS
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        save_file(with_old_names(load_file(path)), path)
        ours = load_folder_vae(str(upscaler_folder)).model.decode(latent)
        assert models.relative(ours, upscaler_pipeline.vae.decode(latent).sample) < 1e-5

    def test_a_vae_whose_attention_is_written_as_convolutions(self, upscaler_folder):
        from safetensors.torch import load_file, save_file

        from quanttune.host.upscaler_diffusers import read_vae

        path = upscaler_folder / "vae" / WEIGHTS
        expected, state = read_vae(upscaler_folder).state, load_file(path)
        save_file({key: value[..., None, None] if "attentions." in key and value.ndim == 2
                   else value for key, value in state.items()}, path)
        found = read_vae(upscaler_folder).state
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_settings_that_begin_with_a_byte_order_mark(self, upscaler_folder):
        from quanttune.host.upscaler_diffusers import check_pipeline, read_unet
        from quanttune.host.upscaler_files import _is_upscaler

        expected = read_unet(upscaler_folder).config
        for path in upscaler_folder.rglob("*.json"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert check_pipeline(upscaler_folder) and read_unet(upscaler_folder).config == expected
        assert _is_upscaler(str(upscaler_folder))

    @pytest.mark.parametrize("prefix", ["", "text_model."])
    def test_a_text_encoder_with_and_without_the_prefix(self, prefix, upscaler_folder):
        from safetensors.torch import load_file, save_file

        from quanttune.host.upscaler_diffusers import read_text

        path = upscaler_folder / "text_encoder" / "model.safetensors"
        expected = read_text(upscaler_folder).state
        state = {prefix + k.removeprefix("text_model."): v for k, v in load_file(path).items()}
        save_file(state, path)
        found = read_text(upscaler_folder).state
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_a_pipeline_without_text_encoder_gives_no_clip(self, upscaler_folder):
        change(upscaler_folder / "model_index.json", text_encoder=[None, None])
        shutil.rmtree(upscaler_folder / "text_encoder")
        model, clip, vae = load()
        assert clip is None and model is not None and vae.upscale_ratio == 4


class TestWrongFolder:
    def test_another_pipeline(self, upscaler_folder):
        change(upscaler_folder / "model_index.json", _class_name="StableDiffusionPipeline")
        message = told("class 'StableDiffusionPipeline'")
        assert "StableDiffusionUpscalePipeline" in message

    @pytest.mark.parametrize("file, key, value", [
        ("unet/config.json", "in_channels", 4),
        ("unet/config.json", "num_class_embeds", None),
        ("unet/config.json", "num_class_embeds", 10**12),
        ("unet/config.json", "class_embed_type", "timestep"),
        ("unet/config.json", "block_out_channels", [32, 48, 64, 64]),
        ("unet/config.json", "block_out_channels", "wide"),
        ("unet/config.json", "down_block_types", [["DownBlock2D"]] * 4),
        ("unet/config.json", "up_block_types", ["UpBlock2D"] * 4),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "only_cross_attention", 3),
        ("unet/config.json", "attention_head_dim", 5),
        ("unet/config.json", "attention_head_dim", 0),
        ("unet/config.json", "act_fn", "gelu"),
        ("vae/config.json", "block_out_channels", [32, 64]),
        ("vae/config.json", "latent_channels", 16),
        ("text_encoder/config.json", "vocab_size", 1000),
        ("text_encoder/config.json", "hidden_act", ["gelu"]),
        ("scheduler/scheduler_config.json", "prediction_type", "sample"),
        ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"]),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("scheduler/scheduler_config.json", "beta_end", float("nan")),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1]),
        ("low_res_scheduler/scheduler_config.json", "beta_schedule", "linear"),
        ("low_res_scheduler/scheduler_config.json", "beta_end", 0.012),
        ("model_index.json", "max_noise_level", 100)])
    def test_setting(self, file, key, value, upscaler_folder):
        change(upscaler_folder / file, **{key: value})
        assert file in told(f"says {key} = ").replace("\\", "/")

    def test_low_res_without_a_schedule_is_linear(self, upscaler_folder):
        (upscaler_folder / "low_res_scheduler" / "scheduler_config.json").write_text("{}")
        told("beta_schedule = linear")

    @pytest.mark.parametrize("part, key", [
        ("unet", "conv_in.weight"), ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "final_layer_norm.weight")])
    @pytest.mark.parametrize("how", ["lacks", "unknown", "shape"])
    def test_tensors(self, part, key, how, upscaler_folder):
        from safetensors.torch import load_file, save_file

        path = next((upscaler_folder / part).glob("*.safetensors"))
        state = load_file(path)
        key = next(k for k in state if k.endswith(key))
        value = state.pop(key)
        if how != "lacks":
            state[key if how == "shape" else "more.weight"] = torch.zeros(3, 5)
        if how == "unknown":
            state[key] = value
        save_file(state, path)
        told({"lacks": "lacks the tensor", "shape": "has the shape"}.get(how, "tensor '.*more"))

    def test_a_text_encoder_of_another_width(self, upscaler_folder):
        encoder = upscalers.tiny_pipeline(text={"hidden_size": 64}).text_encoder
        shutil.rmtree(upscaler_folder / "text_encoder")
        encoder.save_pretrained(upscaler_folder / "text_encoder")
        told("gives 64 numbers a token and the UNet takes 32")

    def test_settings_that_are_none(self, upscaler_folder):
        (upscaler_folder / "unet" / "config.json").write_text("[1]")
        told("unet/config.json holds no settings")
        (upscaler_folder / "unet" / "config.json").write_text("[" * 100_000)
        told("unet/config.json cannot be read")


def test_weights_that_are_not_finite(comfy_inprocess, tmp_path):
    from safetensors.torch import save_file

    from quanttune.host.diffusers_files import ModelFolder
    from quanttune.quant import QuantTuneError

    (tmp_path / "unet").mkdir()
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"a.weight": torch.tensor([1.0, float("inf")])}, path)
    with pytest.raises(QuantTuneError, match="has NaN or infinite values in 'a.weight'"):
        ModelFolder(tmp_path).weights("unet")


def test_an_archive_of_several_disks(comfy_inprocess, tmp_path):
    from quanttune.host.diffusers_files import fault

    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    assert fault(path) is None
    place = data.rfind(b"PK\x06\x07")  # where the end of the directory lies, of zip64
    if place < 0:
        pytest.skip("torch writes another directory")
    data[place + 4] = 1
    path.write_bytes(data)
    assert fault(path) == "is cut short"
