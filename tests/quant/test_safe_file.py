import gc
import json
import struct
import sys

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.quant.safe_file import is_cut_short, read_header, read_safetensors
from quanttune.quant.whole_file import write_safetensors

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


def test_tensors_are_views_of_the_map(path):
    write_safetensors(path, {"a": torch.randn(1000), "b": torch.randn(1000)}, {})
    tensors = read_safetensors(path)[1]
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    span = max(t.data_ptr() for t in tensors.values()) - min(t.data_ptr() for t in tensors.values())
    assert len(storages) == 1 or span == 4000
    tensors["a"].fill_(0)
    assert (read_safetensors(path)[1]["a"] != 0).any()


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


def test_more_tensors_than_any_model_has(path, monkeypatch):
    monkeypatch.setattr("quanttune.quant.safe_file.MAX_TENSORS", 3)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count in (3, 4):
        text = json.dumps({f"t{n}": entry for n in range(count)}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        if count == 3:
            assert len(read_header(path)[1]) == 3
        else:
            with pytest.raises(QuantTuneError, match="4 tensors, more than any model has"):
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


def test_reading_leaves_nothing_behind(path):
    count = 500
    write_safetensors(path, {f"t{n}": torch.ones(3) for n in range(count)}, {}, True)
    before = []
    for _ in range(4):
        read_safetensors(path)
        gc.collect()
        before.append(sys.getallocatedblocks())
    # The library's own readers keep two integers of each tensor.
    assert min(b - a for a, b in zip(before, before[1:])) < count / 2
