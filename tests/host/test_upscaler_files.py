"""Upscalers among the model folders: what is offered, and what is told of what is not whole."""

import json
import shutil

import pytest
import torch

from quanttune.tests.host.upscalers import SHIPPED, WEIGHTS, change, told


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


class TestList:
    def test_what_is_offered(self, upscaler_folder, host_folders):
        from quanttune.host.upscaler_files import upscaler_names

        roots = host_folders / "models"
        deep = roots / "diffusers" / "models--a--x4" / "snapshots" / "0f"
        shutil.copytree(upscaler_folder, deep)
        shutil.copytree(upscaler_folder, roots / "checkpoints" / "sub" / "x4")
        other = shutil.copytree(upscaler_folder, roots / "upscale_models" / "other")
        change(other / "model_index.json", _class_name="StableDiffusionPipeline")
        half = shutil.copytree(upscaler_folder, roots / "upscale_models" / "half")
        (half / "model_index.json").unlink()
        assert upscaler_names() == [SHIPPED, "models--a--x4/snapshots/0f/", "x4/", "half/",
                                    "sub/x4/"]
        told("class 'StableDiffusionPipeline'", "other/")
        told("model_index.json is missing", "half/")

    @pytest.mark.parametrize("where", ["diffusers/loop", "diffusers/x4/loop"])
    @pytest.mark.parametrize("target", ["loop", "x" * 300, "gone"])
    def test_a_link_to_nowhere_hides_nothing(self, where, target, upscaler_folder, host_folders):
        from quanttune.host.upscaler_files import upscaler_names

        (host_folders / "models" / where).symlink_to(target)
        assert upscaler_names() == [SHIPPED, "x4/"]

    @pytest.mark.parametrize("name", ["gone.safetensors", "gone/", "../x4/", "/", "", "\0", "x4"])
    def test_what_is_gone_is_told_with_the_place_to_put_it(self, name, upscaler_folder):
        message = told("is not there", name)
        assert "stabilityai/stable-diffusion-x4-upscaler into models/diffusers" in message
        assert "x4-upscaler-ema.safetensors into models/checkpoints" in message

    def test_headers_are_read_once_for_each_state_of_a_file(self, host_folders, monkeypatch):
        from safetensors.torch import save_file

        import quanttune.host.upscaler_files as files

        path = host_folders / "models" / "checkpoints" / "a.safetensors"
        unet = "model.diffusion_model."
        shapes = {f"{unet}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
                  f"{unet}label_emb.weight": torch.zeros(10, 32)}
        save_file(shapes, path)
        reads, read = [], files.read_header
        monkeypatch.setattr(files, "read_header", lambda p: reads.append(p) or read(p))
        assert files.upscaler_names() == files.upscaler_names() == [SHIPPED]
        assert len(reads) == 1
        shapes[f"{unet}input_blocks.0.0.weight"] = torch.zeros(8, 7, 3, 3)
        save_file(shapes, path)
        assert files.upscaler_names() == [SHIPPED, "a.safetensors"]
        assert len(reads) == 2

    def test_state_follows_the_files(self, upscaler_folder):
        from quanttune.host.upscaler_files import upscaler_state

        before = upscaler_state("x4/")
        assert before == upscaler_state("x4/")
        change(upscaler_folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
        assert upscaler_state("x4/") != before
        assert upscaler_state(SHIPPED) == upscaler_state(SHIPPED)


class TestHalfDownloaded:
    """A folder that is not whole: the sentence names the file and what to do."""

    @pytest.mark.parametrize("file", [
        "model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "vae/config.json",
        f"vae/{WEIGHTS}", "text_encoder/config.json", "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json", "low_res_scheduler/scheduler_config.json"])
    @pytest.mark.parametrize("how", ["missing", "empty", "pointer", "cut short"])
    def test_file(self, file, how, upscaler_folder):
        path = upscaler_folder / file
        content = path.read_bytes()
        path.unlink()
        if how == "empty":
            path.write_bytes(b"")
        elif how == "pointer":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        elif how == "cut short":
            path.write_bytes(content[:len(content) // 2])
        message = told(file.rpartition(".")[0])
        assert "download" in message
        if path.suffix == ".safetensors":
            assert how.replace("pointer", "Git LFS pointer") in message
            assert "stabilityai/stable-diffusion-x4-upscaler" in message

    def test_shard(self, upscaler_pipeline, upscaler_folder):
        shutil.rmtree(upscaler_folder / "unet")
        upscaler_pipeline.unet.save_pretrained(upscaler_folder / "unet", max_shard_size="1MB")
        shard = sorted((upscaler_folder / "unet").glob("*-00002-of-*.safetensors"))[0]
        content = shard.read_bytes()
        shard.unlink()
        assert shard.name in told("is missing")
        shard.write_bytes(content[:-10])
        assert shard.name in told("is cut short")

    @pytest.mark.parametrize("names", [[], ["../vae/x.safetensors"], ["/etc/passwd"], [3], "x"])
    def test_index_of_shards(self, names, upscaler_folder):
        (upscaler_folder / "unet" / WEIGHTS).unlink()
        index = upscaler_folder / "unet" / f"{WEIGHTS}.index.json"
        shards = dict(enumerate(names)) if isinstance(names, list) else names
        index.write_text(json.dumps({"weight_map": shards}))
        told("index.json does not list the files")

    @pytest.mark.parametrize("where", [".cache/huggingface/download/unet/abc.incomplete",
                                       "unet/weights.safetensors.crdownload"])
    def test_a_download_that_stopped(self, where, upscaler_folder):
        (upscaler_folder / "unet" / WEIGHTS).unlink()
        left = upscaler_folder / where
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"half")
        assert left.name in told(f"unet/{WEIGHTS} is missing")

    def test_a_link_to_nothing(self, upscaler_folder):
        path = upscaler_folder / "unet" / WEIGHTS
        path.unlink()
        path.symlink_to(upscaler_folder / "blobs" / "gone")
        told(f"unet/{WEIGHTS} is missing")

    def test_half_a_bin(self, upscaler_pipeline, upscaler_folder):
        (upscaler_folder / "unet" / WEIGHTS).unlink()
        upscaler_pipeline.unet.save_pretrained(upscaler_folder / "unet", safe_serialization=False)
        path = upscaler_folder / "unet" / "diffusion_pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:-2000])
        told("diffusion_pytorch_model.bin is cut short")

    @pytest.mark.parametrize("what", ["code", "list", "junk"])
    def test_a_bin_of_something_else(self, what, upscaler_folder):
        (upscaler_folder / "unet" / WEIGHTS).unlink()
        path = upscaler_folder / "unet" / "diffusion_pytorch_model.bin"
        if what == "junk":
            path.write_bytes(b"junk" * 100)
        else:
            torch.save({"a": print} if what == "code" else [1, 2], path)
        told("diffusion_pytorch_model.bin (is damaged|holds)")
