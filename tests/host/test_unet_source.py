"""UNets of every form: names, prefixes, shards, precisions, and what is told of odd ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quanttune.tests.host import unets
from quanttune.tests.host.unets import WEIGHTS, host_state, told


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def saved(comfy_inprocess, tmp_path_factory):
    """A tiny SD1 UNet, its folder (not to be changed) and its tensors in the host's names."""
    unet = unets.tiny_unet()
    folder = unets.save_pipeline(unet, tmp_path_factory.mktemp("unet") / "sd")
    with torch.inference_mode():
        return unet, folder, host_state(folder)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "sd")


def open_(path):
    from quanttune.host.unet_source import open_unet

    return open_unet(path)


def same(path, expected, exact=True):
    found = host_state(path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if exact:
            assert torch.equal(found[key].float(), value.float()), key
        else:
            assert torch.allclose(found[key].float(), value.float(), rtol=0.14, atol=2e-3), key


class TestForms:
    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.",
                                        "module."])
    def test_the_original_names_with_and_without_a_prefix(self, prefix, saved, tmp_path):
        path = tmp_path / "a.safetensors"
        others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(3),
                  "cond_stage_model.x": torch.zeros(2)} if prefix.endswith("model.") else {}
        save_file({**{prefix + k: v for k, v in saved[2].items()}, **others}, path)
        same(path, saved[2])

    @pytest.mark.parametrize("prefix", ["", "unet.", "model."])
    def test_diffusers_names_in_one_file(self, prefix, saved, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({prefix + k: v for k, v in saved[0].state_dict().items()}, path)
        same(path, saved[2])

    @pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
    @pytest.mark.parametrize("nested", [True, False])
    def test_pickled(self, suffix, nested, saved, tmp_path):
        path = tmp_path / f"a.{suffix}"
        state = {f"model.diffusion_model.{k}": v for k, v in saved[2].items()}
        torch.save({"state_dict": state, "global_step": 7} if nested else state, path)
        same(path, saved[2])

    def test_pickled_before_zip_files(self, saved, tmp_path):
        torch.save(saved[2], tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
        same(tmp_path / "a.ckpt", saved[2])

    @pytest.mark.parametrize("options", [
        {"max_shard_size": "200KB"}, {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "200KB"},
        {"variant": "fp16", "max_shard_size": "200KB"}], ids=str)
    def test_forms_of_a_folder(self, options, saved, folder):
        from quanttune.host.convert_unet import detect

        shutil.rmtree(folder / "unet")
        saved[0].save_pretrained(folder / "unet", **options)
        same(folder, saved[2])
        same(folder / "unet", saved[2])
        for index in (folder / "unet").glob("*.index*.json"):
            same(index, saved[2])
            assert detect(index)

    def test_the_folder_of_the_unet_alone_and_its_file(self, saved, folder):
        same(folder / "unet", saved[2])
        same(folder / "unet" / WEIGHTS, saved[2])
        one, other = open_(folder), open_(folder / "unet" / WEIGHTS)
        assert one.metadata == other.metadata and one.name == "sd"
        alone = shutil.copytree(folder / "unet", folder.parent / "alone")
        assert open_(alone).metadata.model_type == "EPS"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype, saved, tmp_path):
        save_file({k: v.to(dtype) for k, v in saved[2].items()}, tmp_path / "a.safetensors")
        same(tmp_path / "a.safetensors", {k: v.to(dtype) for k, v in saved[2].items()})
        wanted = torch.float32 if dtype == torch.float64 else dtype
        assert open_(tmp_path / "a.safetensors").dtype("out.2.weight") == wanted

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("names", ["host", "diffusers"])
    def test_bare_fp8(self, dtype, names, saved, tmp_path):
        state = saved[2] if names == "host" else saved[0].state_dict()
        save_file({k: v.to(dtype) for k, v in state.items()}, tmp_path / "a.safetensors")
        same(tmp_path / "a.safetensors", {k: v.to(dtype).float() for k, v in saved[2].items()})

    @pytest.mark.parametrize("form", ["old", "marks", "header"])
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_fp8_with_scales(self, form, dtype, saved, tmp_path):
        kind = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]
        mark, strings, layers, expected = json.dumps({"format": kind}), {}, {}, {}
        stored = {}
        for key, value in saved[2].items():
            stored[key], expected[key] = value.half(), value.half()
            if value.dim() == 2:
                scale = value.abs().max() / torch.finfo(dtype).max
                layer = key.removesuffix(".weight")
                stored[key] = (value / scale).to(dtype)
                expected[key] = stored[key].float() * scale
                names = ("scale_weight", "scale_input") if form == "old" else (
                    "weight_scale", "input_scale")
                stored |= {f"{layer}.{names[0]}": scale, f"{layer}.{names[1]}": torch.ones(())}
                layers[layer] = {"format": kind}
                if form == "marks":
                    stored[f"{layer}.comfy_quant"] = torch.tensor(list(mark.encode()),
                                                                  dtype=torch.uint8)
        if form == "old":
            stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
        if form == "header":
            strings["_quantization_metadata"] = json.dumps({"layers": layers})
        save_file({f"model.diffusion_model.{k}": v for k, v in stored.items()},
                  tmp_path / "a.safetensors", metadata=strings)
        same(tmp_path / "a.safetensors", expected)
        same(tmp_path / "a.safetensors", saved[2], exact=False)


class TestWhatIsSaid:
    """Heads, prediction and noise, which no shape tells."""

    @pytest.mark.parametrize("family", list(unets.CONFIGS))
    def test_family_by_its_build(self, family, comfy_inprocess, tmp_path):
        metadata = open_(unets.save_pipeline(unets.tiny_unet(family), tmp_path / "x")).metadata
        assert (metadata.family, metadata.model_type, dict(metadata.sampling_settings)) == (
            family, "EPS", {})
        assert metadata.latent_format == ("SDXL" if "SDXL" in family else "SD15")

    @pytest.mark.parametrize("change, prediction, sampling", [
        ({"prediction_type": "v_prediction"}, "V_PREDICTION", {}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "V_PREDICTION",
         {"zsnr": True}),
        ({"beta_end": 0.02}, "EPS", {"linear_end": 0.02}),
        ({"beta_schedule": "linear"}, "EPS", {"beta_schedule": "sqrt_linear"})])
    def test_scheduler(self, change, prediction, sampling, saved, tmp_path):
        metadata = open_(unets.save_pipeline(saved[0], tmp_path / "x", change)).metadata
        assert metadata.model_type == prediction and metadata.sampling_settings == sampling

    def test_playground(self, tmp_path):
        unet = unets.tiny_unet("SDXL")
        scheduler = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}
        metadata = open_(unets.save_pipeline(unet, tmp_path / "x", scheduler)).metadata
        assert (metadata.model_type, metadata.latent_format) == ("EDM", "SDXL_Playground_2_5")

    def test_marks_of_a_checkpoint(self, tmp_path):
        folder = unets.save_pipeline(unets.tiny_unet("SDXL"), tmp_path / "x")
        state = {f"model.diffusion_model.{k}": v for k, v in host_state(folder).items()}
        save_file({**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
                  tmp_path / "a.safetensors")
        metadata = open_(tmp_path / "a.safetensors").metadata
        assert metadata.model_type == "V_PREDICTION" and metadata.sampling_settings == {
            "zsnr": True}

    @pytest.mark.parametrize("down", [("CrossAttnDownBlock2D", "DownBlock2D"),
                                      ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")])
    def test_a_small_unet_on_images(self, down, tmp_path):
        """One of SD2.x, whose latents have another scale than those of SDXL."""
        unet = unets.tiny_unet("SD20", down_block_types=down, class_embed_type="projection",
                               projection_class_embeddings_input_dim=40)
        folder = unets.save_pipeline(unet, tmp_path / "x")
        save_file(host_state(folder), tmp_path / "alone.safetensors")
        sources = [folder]
        if down[1] == "DownBlock2D":  # with attention everywhere no shape tells
            sources.append(tmp_path / "alone.safetensors")
        for path in sources:
            metadata = open_(path).metadata
            assert (metadata.family, metadata.latent_format) == ("SD21UnclipL", "SD15")
            assert metadata.unet_config["adm_in_channels"] == 40

    @pytest.mark.parametrize("config, family", [
        ({"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
          "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}, "SD15"),
        ({"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024,
          "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
          "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}, "SD20"),
        ({"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
          "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
          "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
          "projection_class_embeddings_input_dim": 2816, **unets.TEXT_TIME}, "SDXL"),
        ({"block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280,
          "attention_head_dim": (6, 12, 24, 24), "transformer_layers_per_block": 4,
          "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                               "DownBlock2D"),
          "projection_class_embeddings_input_dim": 2560, **unets.TEXT_TIME}, "SDXLRefiner"),
    ], ids=["SD15", "SD20", "SDXL", "SDXLRefiner"])
    def test_real_sizes_are_what_the_host_detects(self, config, family):
        import comfy.model_detection

        from quanttune.host.unet_names import detect, host_names
        from quanttune.host.unet_source import CANNOT, Settings, _told

        with torch.device("meta"):
            unet = unets.tiny_unet("SD15", layers_per_block=2, **config)
        state = unet.state_dict()
        names = host_names(state)
        own = {names[k]: tuple(v.shape) for k, v in state.items()}
        found, ours = detect(own, "The UNet")
        theirs = comfy.model_detection.model_config_from_diffusers_unet(state)
        assert found.__name__ == type(theirs).__name__ == family
        told_ = _told(Settings(json.loads(unet.to_json_string()), "config", CANNOT), own)
        assert {**found(ours).unet_config, **told_} == {
            k: v for k, v in theirs.unet_config.items() if k != "dtype"}


class TestRefused:
    @pytest.mark.parametrize("file", ["unet/config.json", f"unet/{WEIGHTS}",
                                      "scheduler/scheduler_config.json"])
    @pytest.mark.parametrize("how", ["missing", "empty", "pointer", "cut short"])
    def test_half_a_folder(self, file, how, folder):
        path = folder / file
        content = path.read_bytes()
        path.unlink()
        if how == "missing" and "scheduler" in file:
            assert open_(folder).metadata.model_type == "EPS"  # a folder of a UNet alone
            return
        if how == "empty":
            path.write_bytes(b"")
        elif how == "pointer":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        elif how == "cut short":
            path.write_bytes(content[:len(content) // 2])
        message = told(f"{path.name.partition('.')[0]}.* is |cannot be read", open_, folder)
        assert "download" in message

    @pytest.mark.parametrize("how", ["missing", "empty", "pointer", "cut short", "data", "junk"])
    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    def test_half_a_file(self, how, suffix, saved, tmp_path):
        path = tmp_path / f"a{suffix}"
        if suffix == ".ckpt":
            torch.save(saved[2], path)
        else:
            save_file(saved[2], path)
        content = path.read_bytes()
        path.unlink()
        damage = {"empty": b"", "pointer": b"version https://git-lfs.github.com/spec/v1\n",
                  "cut short": content[:1000], "data": content[:-1000], "junk": b"junk" * 99}
        if how != "missing":
            path.write_bytes(damage[how])
        assert "a" + suffix in told("is missing|is empty|LFS pointer|cut short|damaged",
                                    open_, path)

    def test_shards(self, saved, folder):
        shutil.rmtree(folder / "unet")
        saved[0].save_pretrained(folder / "unet", max_shard_size="200KB")
        shard = sorted((folder / "unet").glob("*-00002-of-*.safetensors"))[0]
        index = folder / "unet" / f"{WEIGHTS}.index.json"
        content = shard.read_bytes()
        shard.unlink()
        for path in (folder, folder / "unet", index):
            assert shard.name in told("is missing", open_, path)
        shard.write_bytes(content[:-10])
        for path in (folder, index):
            assert shard.name in told("is cut short", open_, path)

    def test_an_index_that_lists_a_part_of_the_shards(self, saved, folder):
        shutil.rmtree(folder / "unet")
        saved[0].save_pretrained(folder / "unet", max_shard_size="200KB")
        index = folder / "unet" / f"{WEIGHTS}.index.json"
        listed = json.loads(index.read_text())
        names = sorted(set(listed["weight_map"].values()))
        kept = {k: v for k, v in listed["weight_map"].items() if v in names[:len(names) // 2]}
        index.write_text(json.dumps({**listed, "weight_map": kept}))
        for path in (folder, folder / "unet", index):
            assert "download" in told(f"does not list {names[len(names) // 2]}", open_, path)

    def test_an_index_that_lists_a_tensor_of_no_shard(self, tmp_path):
        """Without its last block this would be a whole UNet, of another depth."""
        unet = unets.tiny_unet("SDXL")
        folder = unets.save_pipeline(unet, tmp_path / "xl", max_shard_size="200KB")
        for shard in (folder / "unet").glob("*.safetensors"):
            kept = {k: v for k, v in load_file(shard).items() if "transformer_blocks.1." not in k}
            save_file(kept, shard)
        for path in (folder, folder / "unet", folder / "unet" / f"{WEIGHTS}.index.json"):
            message = told(r"index.json lists '.*transformer_blocks.1.*', which none of its files "
                           "has", open_, path)
            assert "download" in message

    @pytest.mark.parametrize("name", ["a\0.safetensors", "\ud800.safetensors"])
    def test_an_index_with_names_that_no_file_has(self, name, folder):
        index = folder / "unet" / f"{WEIGHTS}.index.json"
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        (folder / "unet" / WEIGHTS).unlink()
        for path in (folder, index):
            assert "download" in told("cannot be read", open_, path)

    @pytest.mark.parametrize("name", ["conv_in.weight", "conv_norm_out.bias"])
    def test_a_tensor_without_numbers(self, name, saved, tmp_path):
        state = {**saved[0].state_dict(), name: torch.zeros(0, *[3] * (name[-1] == "t"))}
        save_file(state, tmp_path / "x.safetensors")
        told("has no numbers in '(input_blocks.0.0.weight|out.0.bias)'", open_,
             tmp_path / "x.safetensors")

    @pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "sigmoid"])
    def test_noise_that_comfyui_cannot_sample(self, schedule, saved, tmp_path):
        folder = unets.save_pipeline(saved[0], tmp_path / "x", {"beta_schedule": schedule})
        for path in (folder, folder / "unet", folder / "unet" / WEIGHTS):
            message = told(f"scheduler_config.json says beta_schedule = {schedule}, a schedule of "
                           "the noise", open_, path)
            assert "load the model with diffusers, or choose one that was trained with" in message

    def test_code(self, tmp_path):
        torch.save({"state_dict": print}, tmp_path / "a.ckpt")
        told("is damaged or holds more than weights", open_, tmp_path / "a.ckpt")

    @pytest.mark.parametrize("state", [[1, 2], {}, {"a": 3}, {"state_dict": {}}])
    def test_something_else_pickled(self, state, tmp_path):
        torch.save(state, tmp_path / "a.pt")
        told("something else than the weights", open_, tmp_path / "a.pt")

    def test_other_classes(self, folder):
        config = folder / "unet" / "config.json"
        text = config.read_text()
        config.write_text(json.dumps({**json.loads(text), "_class_name": "FluxTransformer2DModel"}))
        told("holds a FluxTransformer2DModel where", open_, folder)

    def test_other_models(self, saved, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"double_blocks.0.x": torch.zeros(2)}, path)
        told("holds no Stable Diffusion UNet", open_, path)
        state = saved[2]
        save_file({**state, "label_emb.weight": torch.zeros(10, 128)}, path)
        told("is an SD x4 upscaler's; load it with 'Load SD 4x Upscaler'", open_, path)
        save_file(state, path, metadata={"quanttune": "{}"})
        told("was written by QuantTune", open_, path)
        save_file({k.replace("middle_block.1.norm", "middle_block.9.norm"): v
                   for k, v in saved[0].state_dict().items()} | {"mid_block.odd": torch.zeros(1)},
                  path)
        told("holds a tensor 'mid_block.odd'", open_, path)

    def test_a_tensor_in_two_shards(self, saved, tmp_path):
        names = {"a.safetensors": saved[2], "b.safetensors": {"out.0.bias": torch.zeros(32)}}
        for name, state in names.items():
            save_file(state, tmp_path / name)
        index = tmp_path / "m.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict(zip(("out.2.bias", "out.0.bias"), names))}))
        told("has 'out.0.bias' in two of its files", open_, index)

    def test_quantized_already(self, saved, tmp_path):
        path, key = tmp_path / "a.safetensors", "out.2.weight"
        layer = key.removesuffix(".weight")
        save_file({**saved[2], key: saved[2][key].to(torch.int8)}, path)
        told("as torch.int8, so it is quantized already", open_, path)
        for kind, words in (("nvfp4", "quantized as nvfp4"), ("int8_tensorwise", "INT8 already"),
                            ("x" * 300, "quantized as x")):
            mark = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
            save_file({**saved[2], f"{layer}.comfy_quant": mark}, path)
            told(words, open_, path)
        save_file({**saved[2], f"{layer}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, path)
        told("does not say in a readable way", open_, path)

    @pytest.mark.parametrize("scale, words", [
        (torch.ones(3), "damaged scale"), (torch.tensor(float("nan")), "damaged scale"),
        (torch.ones((), dtype=torch.int32), "damaged scale"), (None, "has no scale")])
    def test_fp8_scales(self, scale, words, saved, tmp_path):
        key = "time_embed.0.weight"
        layer = key.removesuffix(".weight")
        mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        state = {**saved[2], key: saved[2][key].to(torch.float8_e4m3fn),
                 f"{layer}.comfy_quant": mark}
        if scale is not None:
            state[f"{layer}.weight_scale"] = scale
        save_file(state, tmp_path / "a.safetensors")
        told(words, open_, tmp_path / "a.safetensors")
        save_file({**saved[2], f"{layer}.weight_scale": torch.ones(())},
                  tmp_path / "a.safetensors")
        told("is no fp8", open_, tmp_path / "a.safetensors")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
    def test_nan(self, dtype, saved, tmp_path):
        state = {k: v.to(dtype) for k, v in saved[2].items()}
        state["out.0.bias"] = torch.full_like(saved[2]["out.0.bias"], float("nan")).to(dtype)
        save_file(state, tmp_path / "a.safetensors")
        told("NaN or infinite values in 'out.0.bias'", host_state, tmp_path / "a.safetensors")

    @pytest.mark.parametrize("change, words", [
        ({"act_fn": "gelu"}, "act_fn = gelu"), ({"in_channels": 9}, "is not of the weights"),
        ({"block_out_channels": [64, 128]}, "is not of the weights"),
        ({"attention_head_dim": 7}, "attention_head_dim = 7"),
        ({"block_out_channels": "x"}, "block_out_channels = x"),
        ({"only_cross_attention": "yes"}, "only_cross_attention"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type")])
    def test_settings(self, change, words, folder):
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        told(words, open_, folder)

    @pytest.mark.parametrize("change", [
        {"prediction_type": "sample"}, {"trained_betas": [1]}, {"num_train_timesteps": 10},
        {"beta_schedule": []}, {"beta_end": "x"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"}])
    def test_schedulers(self, change, folder):
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert next(iter(change)) in told("scheduler_config.json says", open_, folder)

    def test_a_header_that_lies(self, saved, tmp_path):
        import struct

        path = tmp_path / "a.safetensors"
        for entry in ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
                      {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]},
                      {"dtype": "F32", "shape": [2], "data_offsets": ["a", 8]},
                      {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
                      {"dtype": [], "shape": [2], "data_offsets": [0, 8]}):
            text = json.dumps({"out.2.weight": entry}).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
            told("a.safetensors", open_, path)
