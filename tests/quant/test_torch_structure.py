"""Structures of PyTorch files are walked through before torch reads them."""

import time
import zipfile

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.quant.tensor_file import load_unpickled
from quanttune.quant.torch_archive import TensorArchive
from quanttune.quant.torch_structure import check_structure, walk

STATE = {
    "a": torch.ones(3),
    "b": [1, 2.5, None, True, (3, "x" * 300)],
    "c": {"d": {1, 2}},
    5: 2**80,
    "bytes": torch.arange(4, dtype=torch.uint8),
    "neg": -3,
    "big": 70_000,
}


def archive(path, structure):
    """A file with another structure."""
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as whole:
        records = {n: whole.read(n) for n in whole.namelist()}
    with zipfile.ZipFile(path, "w") as other:
        for name, content in records.items():
            other.writestr(name, structure if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("form", [True, False])
def test_what_torch_writes_passes(form, tmp_path):
    path = tmp_path / "a.pt"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    torch.save(
        {**STATE, "optimizer": optimizer.state_dict()}, path, _use_new_zipfile_serialization=form
    )
    check_structure(path)
    assert torch.equal(load_unpickled(path)["a"], STATE["a"])


@pytest.mark.parametrize(
    "structure",
    [
        b"\x80\x02ctorch\n" + b"F" * 60_000 + b"\n.",
        b"\x80\x02c" + b"t" * 60_000 + b"\nx\n.",
        b"\x80\x02(i",
        b"\x80\x02X\xff\xff\xff\x7fab",
        b"\x80\x02X",
        b"\x80\x02K",
        b"",
        b"\x80\x02N",
        b"\x80\x04\x95\0\0\0\0\0\0\0\0.",
    ],
)
def test_other_structures_are_refused_at_once(structure, tmp_path):
    path = archive(tmp_path / "a.pth", structure)
    start = time.process_time()
    for read in (load_unpickled, TensorArchive):
        with pytest.raises(QuantTuneError, match="a.pth is damaged or holds more than"):
            read(path)
    # torch alone takes half a minute for the first: its patterns go through the name again and
    # again.
    assert time.process_time() - start < 5


def test_a_stream_ends_where_it_says():
    assert walk(b"\x80\x02N.rest", 0) == 4
    with pytest.raises(ValueError, match="cut short"):
        walk(b"\x80\x02N", 0)
