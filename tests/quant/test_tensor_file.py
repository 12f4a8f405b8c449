"""Model files read tensor by tensor."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from quanttune.quant import QuantTuneError
from quanttune.quant.tensor_file import DTYPES, load_pickled, load_unpickled, open_tensors
from quanttune.quant.torch_structure import LEGACY_STREAMS, listed_storages, walk


def state(form=""):
    generator = torch.Generator().manual_seed(0)
    whole = {str(dtype): (torch.randn(3, 5, generator=generator) * 9).to(dtype)
             for dtype in DTYPES.values()
             # PyTorch itself reads no fp8 from files of its old form.
             if form != ".ckpt" or "float8" not in str(dtype)}
    return {**whole, "empty": torch.empty(0, 4), "one": torch.tensor(3.0)}


@pytest.fixture(params=["safetensors", "pt", "old"])
def path(request, tmp_path):
    path = tmp_path / f"a.{request.param.replace('old', 'ckpt')}"
    if path.suffix == ".safetensors":
        save_file(state(), path)
    else:
        torch.save({"state_dict": state(path.suffix), "epoch": 3}, path,
                   _use_new_zipfile_serialization=request.param == "pt")
    return path


def test_every_type_and_shape(path):
    file = open_tensors(path)
    expected = state(path.suffix)
    assert file.shapes == {k: tuple(v.shape) for k, v in expected.items()}
    assert file.dtypes == {k: v.dtype for k, v in expected.items()}
    for name, value in expected.items():
        for found in (file.read(name), file.view(name)):
            assert found.dtype == value.dtype
            assert torch.equal(found.view(torch.uint8) if value.dim() else found,
                               value.view(torch.uint8) if value.dim() else value)


def test_what_is_read_is_the_readers_own(path):
    file = open_tensors(path)
    file.read("torch.float32").zero_()
    assert torch.equal(file.read("torch.float32"), state()["torch.float32"])


def test_tensors_that_share_their_memory_or_are_turned(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole, "b": whole[1:], "c": whole.T}, tmp_path / "a.bin")
    file = open_tensors(tmp_path / "a.bin")
    assert torch.equal(file.read("b"), whole[1:])
    assert torch.equal(file.read("c"), whole.T) and file.read("c").is_contiguous()


def refused(match, path):
    with pytest.raises(QuantTuneError, match=match) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500, message


def test_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    refused("is no model file that this program reads", tmp_path / "a.txt")
    for suffix in ("safetensors", "pt"):
        refused("does not exist", tmp_path / f"gone.{suffix}")
        (tmp_path / f"junk.{suffix}").write_bytes(b"junk" * 9)
        refused("is not a safetensors file|is damaged", tmp_path / f"junk.{suffix}")
    (tmp_path / "folder.pt").mkdir()
    refused("is damaged or holds more than weights", tmp_path / "folder.pt")


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_half_a_file(cut, path):
    path.write_bytes(path.read_bytes()[:-cut])
    if path.suffix == ".safetensors":
        refused("is cut short", path)
    else:
        refused("is damaged or holds more than weights", path)


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    save_file(state(), tmp_path / "a.safetensors")
    file = open_tensors(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-len(content) // 2])
    for act in (file.read, file.view):
        with pytest.raises(QuantTuneError, match="is cut short|damaged"):
            for name in file.shapes:
                act(name)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(QuantTuneError, match="cannot be read"):
        file.read("one")


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
    {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]},
    {"dtype": "F32", "shape": [2], "data_offsets": 3},
    {"dtype": "F32", "shape": [2]}, {"dtype": "NEW", "shape": [2], "data_offsets": [0, 8]},
    {"shape": [2], "data_offsets": [0, 8]},
    {"dtype": "I64", "shape": "", "data_offsets": [0, 8]},
    {"dtype": "I64", "shape": [1] * 17, "data_offsets": [0, 8]}])
def test_headers_that_lie(entry, tmp_path):
    text = json.dumps({"x" * 200: entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    refused("a.safetensors", tmp_path / "a.safetensors")


@pytest.mark.parametrize("found", [[], 3, {}, {"a": 1}, {1: torch.zeros(1)}, {"state_dict": {}},
                                   {"model": {}}])
def test_no_weights(found, tmp_path):
    torch.save(found, tmp_path / "a.pt")
    with pytest.raises(QuantTuneError, match="something else than the weights"):
        load_pickled(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_of_more_dimensions_than_any(legacy, tmp_path):
    torch.save({"a": torch.zeros([1] * 17)}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(QuantTuneError, match="a tensor of 17 dimensions"):
        load_pickled(tmp_path / "a.pt")


def test_an_old_file_that_lacks_the_numbers_of_a_tensor(tmp_path):
    """torch fills the storages that are listed and leaves the others as the memory is."""
    path = tmp_path / "a.pt"
    tensors = {"a": torch.ones(3), "b": torch.zeros(2), "c": torch.ones(3)[1:], "d": torch.ones(0)}
    torch.save({**tensors, "e": tensors["a"][:1]}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(path)["e"], torch.ones(1))
    data = path.read_bytes()
    place = 0
    for _ in range(LEGACY_STREAMS - 1):
        place = walk(data, place)
    assert len(listed_storages(path)) == 4
    path.write_bytes(data[:place] + b"\x80\x02]q\x00." + data[walk(data, place):])  # an empty list
    assert torch.load(path, weights_only=True).keys() == {*tensors, "e"}
    with pytest.raises(QuantTuneError, match="has not the numbers of all its tensors"):
        load_pickled(path)


def test_code_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"a": Evil()}, tmp_path / "a.pt")
    refused("holds more than weights", tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()


def test_a_compressed_archive_is_not_read_as_numbers(tmp_path):
    import zipfile

    torch.save({"a": torch.ones(64)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(QuantTuneError, match="compressed archive"):
        load_unpickled(tmp_path / "packed.pt")


@pytest.mark.parametrize("header,size", [
    ({"a": [0, 4], "b": [0, 4]}, 4), ({"a": [0, 4], "b": [2, 6]}, 6), ({"a": [0, 4], "b": [8, 12]},
                                                                       12), ({"a": [0, 4]}, 12),
])
def test_bytes_of_two_tensors_or_of_none(header, size, tmp_path):
    entries = {name: {"dtype": "F32", "shape": [1], "data_offsets": places}
               for name, places in header.items()}
    text = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(QuantTuneError, match="damaged header|belong to no tensor"):
        open_tensors(path)


@pytest.mark.parametrize("value", [torch.ones(1).expand(10**9), torch.eye(3).to_sparse(),
                                   torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)])
@pytest.mark.parametrize("form", [True, False])
def test_tensors_that_are_more_than_their_numbers(form, value, tmp_path):
    torch.save({"a": value}, tmp_path / "a.pt", _use_new_zipfile_serialization=form)
    refused("holds", tmp_path / "a.pt")


def test_a_record_that_unpacks_to_a_great_deal(tmp_path):
    import tracemalloc
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", bytes(2**27))
    tracemalloc.start()
    refused("compressed archive", tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("edit", ["short", "long", "twice"])
def test_a_record_of_another_size_is_not_read_past_its_end(edit, tmp_path):
    import zipfile

    torch.save({"a": torch.ones(64)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, \
            zipfile.ZipFile(tmp_path / "b.pt", "w") as other:
        for name in whole.namelist():
            content = whole.read(name)
            if "/data/" in name:
                content = {"short": content[:100], "long": content + b"x"}.get(edit, content)
                if edit == "twice":
                    with pytest.warns(UserWarning, match="Duplicate"):
                        other.writestr(name, bytes(256))
                        other.writestr(name, content)
                    continue
            other.writestr(name, content)
    refused("another size|of one name", tmp_path / "b.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
class TestPipes:
    """Nobody ever writes into them: a reader that opens one waits for ever."""

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt", "a.pth"])
    def test_are_refused_as_models(self, name, tmp_path):
        from quanttune.quant.qdiffusion import is_qdiffusion
        from quanttune.quant.torch_archive import TensorArchive

        os.mkfifo(tmp_path / name)
        for read in (open_tensors, TensorArchive, load_unpickled):
            if read is load_unpickled and name == "a.safetensors":
                continue
            with pytest.raises(QuantTuneError, match="pipe"):
                read(tmp_path / name)
        assert not is_qdiffusion(tmp_path / name)

    def test_are_refused_as_scales(self, tmp_path):
        from quanttune.quant import load_scale_set

        os.symlink("/dev/zero", tmp_path / "a.safetensors")
        with pytest.raises(QuantTuneError, match="device"):
            load_scale_set(tmp_path / "a.safetensors")
