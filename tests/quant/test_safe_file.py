import errno
import json
import os
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quanttune.quant import QuantTuneError
from quanttune.quant.safe_file import (
    is_cut_short,
    read_header,
    read_safetensors,
    write_safetensors,
    written_whole,
)

TENSORS = {
    "b": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "a": torch.randn(3, 4),
    "half": torch.randn(5).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "empty": torch.ones(0, 3),
    "scalar": torch.tensor(2.5),
    "long": torch.tensor([1, 2]),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def test_round_trip(path):
    write_safetensors(path, TENSORS, {"format": "x", "n": [1, 2]})
    metadata, tensors = read_safetensors(path)
    assert metadata == {"format": "x", "n": [1, 2]}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_other_programs_read_it(path):
    write_safetensors(path, TENSORS, {})
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_bytes_do_not_depend_on_order(path, tmp_path):
    other = tmp_path / "other.safetensors"
    write_safetensors(path, TENSORS, {"a": 1})
    write_safetensors(other, dict(reversed(TENSORS.items())), {"a": 1})
    assert path.read_bytes() == other.read_bytes()


def test_strided_tensors(path):
    tensor = torch.randn(4, 6).t()
    write_safetensors(path, {"t": tensor, "u": torch.randn(8)[::2]}, {})
    assert torch.equal(read_safetensors(path)[1]["t"], tensor)


def test_tensors_are_views_of_the_map(path):
    write_safetensors(path, {"a": torch.randn(1000), "b": torch.randn(1000)}, {})
    tensors = read_safetensors(path)[1]
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    span = max(t.data_ptr() for t in tensors.values()) - min(t.data_ptr() for t in tensors.values())
    assert len(storages) == 1 or span == 4000
    tensors["a"].fill_(0)
    assert (read_safetensors(path)[1]["a"] != 0).any()


def test_file_permissions_follow_the_umask(path):
    write_safetensors(path, {"a": torch.ones(1)}, {})
    plain = path.with_name("plain")
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(1)}, {})
    assert path.is_file()


def test_overwriting(path):
    write_safetensors(path, {"a": torch.ones(1)}, {})
    with pytest.raises(QuantTuneError, match="exists already"):
        write_safetensors(path, {"a": torch.zeros(1)}, {}, overwrite=False)
    assert read_safetensors(path)[1]["a"].item() == 1
    write_safetensors(path, {"a": torch.zeros(1)}, {})
    assert read_safetensors(path)[1]["a"].item() == 0


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "not permitted"),
        (errno.EIO, "choose another folder"),
    ],
)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_alone(path, monkeypatch, function, code, cure):
    write_safetensors(path, {"a": torch.ones(1)}, {})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(QuantTuneError) as caught:
        write_safetensors(path, {"a": torch.zeros(9)}, {})
    monkeypatch.undo()
    assert str(path) in str(caught.value) and cure in str(caught.value)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_an_interrupt_leaves_nothing(path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"a": torch.zeros(9)}, {})
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(path, monkeypatch):
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda name, mode="r": real_open("/dev/full", mode.replace("x", "w"))
    )
    with pytest.raises(QuantTuneError, match="disk is full"):
        write_safetensors(path, {"a": torch.zeros(100_000)}, {})
    monkeypatch.undo()
    assert os.listdir(path.parent) == []


def test_a_full_disk_is_told_with_the_room_it_takes(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=200_000))
    with pytest.raises(QuantTuneError, match=r"it takes 4\.0 MB and 200\.0 kB are free"):
        write_safetensors(path, {"a": torch.zeros(1_000_000)}, {})


def test_what_a_killed_process_had_begun_goes_a_day_later(path):
    names = ["model.safetensors.0a1b2c3d.tmp", "model.safetensors.0a1b2c3e.tmp", "notes.tmp"]
    for name in names:
        (path.parent / name).write_bytes(b"half")
    for name in names[::2]:
        os.utime(path.parent / name, (1, 1))
    write_safetensors(path, {"a": torch.ones(1)}, {})
    assert sorted(os.listdir(path.parent)) == sorted([path.name, *names[1:]])


def test_any_file_takes_its_place_only_when_it_is_whole(path):
    with written_whole(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantTuneError, match="could not be written"):
        write_safetensors(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)}, {})


def test_a_target_that_is_a_folder(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(QuantTuneError, match="there is a folder"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_read_only_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(QuantTuneError, match="not permitted"):
            write_safetensors(folder / "x.safetensors", {"a": torch.ones(1)}, {})
    finally:
        folder.chmod(0o700)


def test_types_that_safetensors_does_not_know(path):
    with pytest.raises(QuantTuneError, match="complex"):
        write_safetensors(path, {"a": torch.ones(2, dtype=torch.complex64)}, {})
    assert os.listdir(path.parent) == []


def header(entries, data=b"", length=None):
    body = json.dumps(entries).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = header({"a": entry([2], [0, 8])}, b"\0" * 8)
BAD_FILES = {
    "zero length": (b"", "is empty"),
    "five bytes": (b"hello", "cut short"),
    "a text": (b"hello world, this is a text", "not a safetensors file"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "not a safetensors file"),
    "a zipped pickle": (b"PK\x03\x04" + b"\0" * 100, "pickled checkpoint"),
    "a bare pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "pickled checkpoint"),
    "truncated in the header": (GOOD[:30], "cut short"),
    "truncated in the data": (GOOD[:-3], "cut short"),
    "a huge header": (header({}, length=2**60), "damaged header"),
    "a header longer than the file": (header({}, length=10_000), "cut short"),
    "broken json": (struct.pack("<Q", 8) + b"{'a': 1}" + b"\0" * 8, "damaged header"),
    "no object": (struct.pack("<Q", 8) + b"{[1, 2]}" + b"\0" * 8, "damaged header"),
    "overlap": (
        header({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, b"\0" * 12),
        "damaged header",
    ),
    "a gap": (
        header({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, b"\0" * 12),
        "damaged header",
    ),
    "offsets beyond the file": (header({"a": entry([2**20], [0, 2**22])}), "cut short"),
    "a gigantic shape": (
        header({"a": entry([2**40, 2**40], [0, 8])}, b"\0" * 8),
        "damaged header",
    ),
    "a shape that is not its bytes": (header({"a": entry([5], [0, 8])}, b"\0" * 8), "damaged"),
    "a negative shape": (header({"a": entry([-2], [0, 8])}, b"\0" * 8), "damaged"),
    "an unknown type": (header({"a": entry([2], [0, 8], "F99")}, b"\0" * 8), "damaged"),
    "metadata that is no json": (
        header({"__metadata__": {"quanttune": "{"}, "a": entry([2], [0, 8])}, b"\0" * 8),
        "unreadable QuantTune metadata",
    ),
    "metadata that is a list": (
        header({"__metadata__": {"quanttune": "[]"}, "a": entry([2], [0, 8])}, b"\0" * 8),
        "unreadable QuantTune metadata",
    ),
    "metadata nested without end": (
        header({"__metadata__": {"quanttune": "[" * 200_000}}),
        "unreadable QuantTune metadata",
    ),
}


def assert_one_sentence(error, path):
    """Names the file, ends in a full stop, has one sentence and a cure after a semicolon."""
    text = str(error)
    assert str(path) in text and text.endswith(".") and "\n" not in text
    assert ". " not in text.replace(str(path), "") and ";" in text


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(path, case):
    content, message = BAD_FILES[case]
    path.write_bytes(content)
    with pytest.raises(QuantTuneError, match=message) as caught:
        read_safetensors(path)
    assert_one_sentence(caught.value, path)


def test_a_missing_file_and_a_folder(path):
    with pytest.raises(QuantTuneError, match="does not exist") as caught:
        read_safetensors(path)
    assert_one_sentence(caught.value, path)
    with pytest.raises(QuantTuneError, match="cannot be read") as caught:
        read_safetensors(path.parent)
    assert_one_sentence(caught.value, path.parent)


def test_a_file_of_another_program_has_no_metadata(path):
    path.write_bytes(GOOD)
    metadata, tensors = read_safetensors(path)
    assert metadata is None and list(tensors) == ["a"]


class TestHeader:
    def test_it_is_that_of_the_file(self, path):
        write_safetensors(path, TENSORS, {}, strings={"kind": "x"})
        strings, shapes = read_header(path)
        assert strings["kind"] == "x" and strings["format"] == "pt"
        assert shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}

    def test_data_that_is_cut_short_is_no_error(self, path):
        write_safetensors(path, TENSORS, {})
        assert not is_cut_short(path)
        path.write_bytes(path.read_bytes()[:-1])
        assert is_cut_short(path)
        assert read_header(path)[1].keys() == TENSORS.keys()

    @pytest.mark.parametrize("header", [
        b"[]", b"{", b'{"a": 1}', b'{"a": {}}', b'{"a": {"shape": [-1]}}',
        b'{"a": {"shape": ["x"]}}', b'{"__metadata__": {"a": 1}}', b'{"__metadata__": 3}',
        b'{"a": ' * 100_000])
    def test_damaged(self, header, path):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(QuantTuneError, match="damaged header|not a safetensors file"):
            read_header(path)

    def test_other_files(self, path):
        with pytest.raises(QuantTuneError, match="does not exist"):
            read_header(path)
        torch.save(TENSORS, path)
        with pytest.raises(QuantTuneError, match="pickled"):
            read_header(path)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10280])
def test_a_header_as_long_as_a_pickle_begins(length, path):
    """Its first bytes are then those of a pickled file."""
    body = json.dumps({"a": entry([2], [0, 8])}).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + body + b"\0" * 8)
    assert read_safetensors(path)[1]["a"].tolist() == [0, 0]


@pytest.mark.parametrize("text", [
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    b'"a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"__metadata__": {"x": "1", "x": "2"}, '
    b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"__metadata__": 0, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"__metadata__": {"quanttune": "{\\"a\\": 1, \\"a\\": 2}"}, '
    b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"__metadata__": {"quanttune": "{\\"a\\": NaN}"}, '
    b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
])
def test_headers_that_programs_would_read_differently(text, path):
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(QuantTuneError, match="damaged header|unreadable QuantTune metadata"):
        read_safetensors(path)


def test_a_length_that_no_memory_holds(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert not is_cut_short(path)
