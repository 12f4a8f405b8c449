"""A mapped file that is replaced, written into, deleted."""

import os

import pytest

from quanttune.quant import QuantTuneError
from quanttune.quant.mapped_file import MappedFile


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 1000)
    os.utime(path, (1, 1))
    return path


def test_another_file_of_that_name_and_none_at_all_are_no_harm(file):
    mapped = MappedFile.of(file)
    mapped.check()
    with open(file, "rb"):  # its number is not given to another file meanwhile
        (file.parent / "new").write_bytes(b"y" * 500)
        os.replace(file.parent / "new", file)
        mapped.check()
        file.unlink()
        mapped.check()


@pytest.mark.parametrize("content", [b"", b"x" * 400, b"y" * 1000], ids=["empty", "cut", "other"])
def test_what_is_written_into_the_file_is_told(file, content):
    mapped = MappedFile.of(file)
    file.write_bytes(content)
    with pytest.raises(QuantTuneError, match=r"model\.safetensors was written to"):
        mapped.check()
