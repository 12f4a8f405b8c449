"""Shards of a model: their names, their index, and what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def _host(comfy_inprocess):
    yield


def numbered(stem, count, kind="safetensors"):
    return [f"{stem}-{n:05d}-of-{count:05d}.{kind}" for n in range(1, count + 1)]


def write_index(path, names):
    path.write_text(json.dumps({"weight_map": {f"key{n}": name for n, name in enumerate(names)}}))
    return path


@pytest.mark.parametrize("name, found", [
    ("m.safetensors.index.json", True), ("m.safetensors.index.fp16.json", True),
    ("m.fp16.safetensors.index.json", True), ("m.bin.index.json", True),
    ("config.json", False), ("model_index.json", False), ("m.index.json.safetensors", False)])
def test_names_of_an_index(name, found):
    from quanttune.host.diffusers_files import is_index

    assert is_index(f"folder/{name}") is found


@pytest.mark.parametrize("shard, there, index", [
    ("m-00001-of-00002.safetensors", [], "m.safetensors.index.json"),
    ("m-00001-of-00002.bin", [], "m.bin.index.json"),
    ("m.fp16-00001-of-00002.safetensors", [], "m.fp16.safetensors.index.json"),
    ("m.fp16-00001-of-00002.safetensors", ["m.safetensors.index.fp16.json"],
     "m.safetensors.index.fp16.json"),
    ("m.fp16-00001-of-00002.safetensors",
     ["m.safetensors.index.fp16.json", "m.fp16.safetensors.index.json"],
     "m.fp16.safetensors.index.json"),
    ("m.safetensors", [], None), ("m-1-of-2.safetensors", [], None)])
def test_the_index_of_a_shard(shard, there, index, tmp_path):
    from quanttune.host.diffusers_files import index_of

    for name in there:
        (tmp_path / name).write_text("{}")
    assert index_of(tmp_path / shard) == (index and tmp_path / index)


class TestShards:
    @pytest.mark.parametrize("names", [
        numbered("m", 3), numbered("m", 1), numbered("a", 2, "bin") + numbered("b", 2, "bin"),
        ["a.safetensors", "b.safetensors"]])
    def test_all_of_them(self, names, tmp_path):
        from quanttune.host.diffusers_files import shards

        index = write_index(tmp_path / "m.safetensors.index.json", names)
        assert shards(index) == ([tmp_path / name for name in sorted(names)], None)

    @pytest.mark.parametrize("names, lacking", [
        (numbered("m", 4)[:2], "m-00003-of-00004.safetensors"),
        (numbered("m", 4)[2:], "m-00001-of-00004.safetensors"),
        (numbered("m", 2) + numbered("other", 2)[1:], "other-00001-of-00002.safetensors"),
        (["m-00001-of-99999.bin"], "m-00002-of-99999.bin")])
    def test_a_part_of_them(self, names, lacking, tmp_path):
        from quanttune.host.diffusers_files import shards

        index = write_index(tmp_path / "m.safetensors.index.json", names)
        assert shards(index) == ([], f"{index.name} does not list {lacking}")


@pytest.mark.parametrize("old", [False, True])
def test_shards_of_pytorch_that_lack_a_tensor(old, tmp_path):
    """The names in files from before torch 1.6 are not looked at."""
    from quanttune.host.diffusers_files import ModelFolder
    from quanttune.quant import QuantTuneError

    names = [n.replace("safetensors", "bin") for n in numbered("diffusion_pytorch_model", 2)]
    for n, name in enumerate(names):
        torch.save({f"key{n}": torch.ones(1)}, tmp_path / name,
                   _use_new_zipfile_serialization=not old)
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"key0": names[0], "key1": names[1]}}))
    assert ModelFolder(tmp_path).weights("").keys() == {"key0", "key1"}
    index.write_text(json.dumps({"weight_map": {"key0": names[0], "key2": names[1]}}))
    if old:
        assert len(ModelFolder(tmp_path).weight_files("")) == 2
        return
    with pytest.raises(QuantTuneError, match=f"{index.name} lists 'key2', which none of its files "
                                             "has.*; download"):
        ModelFolder(tmp_path).weight_files("")


def test_a_tensor_that_two_files_of_a_folder_have(tmp_path):
    from quanttune.host.diffusers_files import ModelFolder
    from quanttune.quant import QuantTuneError

    names = numbered("diffusion_pytorch_model", 2)
    (tmp_path / "unet").mkdir()
    for n, name in enumerate(names):
        save_file({"a": torch.ones(1), f"key{n}": torch.ones(1)}, tmp_path / "unet" / name)
    write_index(tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json", names)
    with pytest.raises(QuantTuneError) as caught:
        ModelFolder(tmp_path).weights("unet")
    message = str(caught.value)
    assert f"{names[1]} has 'a', which another of its files has, too; download" in message


def test_a_long_list_is_not_gone_through_for_each_of_its_names():
    from quanttune.host.diffusers_files import _unlisted

    class Names(list):
        def __contains__(self, name):
            raise AssertionError("a look through all of them")

    assert _unlisted(Names(numbered("m", 1000))) is None
    assert _unlisted(Names(numbered("m", 1000)[:-1])) == "m-01000-of-01000.safetensors"
