import errno
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from quanttune.quant import paging
from quanttune.quant.paging import PagedStore, page_out

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux drops pages")
MIB = 2**20


def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 1001), (64, 4, 3, 3)])
def test_a_stored_tensor_is_equal_and_writable(tmp_path, dtype, shape):
    store = PagedStore(tmp_path / "not there yet")
    tensors = [torch.randint(0, 100, shape).to(dtype) for _ in range(3)]
    copies = [store.put(t) for t in tensors]
    for tensor, copy in zip(tensors, copies):
        page_out(copy)
        assert copy.dtype == dtype and torch.equal(copy, tensor)
        copy.add_(1)
        assert not torch.equal(copy, tensor), "the copy is its own"


def test_what_the_system_cannot_drop_keeps_its_values():
    tensor = torch.randint(0, 255, (5 * MIB,), dtype=torch.uint8)
    expected = tensor.clone()
    page_out(tensor)
    page_out(tensor[3:70])
    assert torch.equal(tensor, expected)


@linux
def test_a_stored_tensor_takes_no_memory_once_it_is_paged_out(tmp_path):
    copy = PagedStore(tmp_path).put(torch.ones(128 * MIB, dtype=torch.uint8))
    before = resident()
    assert int(copy.view(torch.int64).max()) == 0x0101010101010101
    assert resident() - before > 100 * MIB
    page_out(copy)
    assert resident() - before < 20 * MIB
    assert copy[-1] == 1


@linux
def test_the_files_are_nowhere_to_be_seen_and_none_stays_open(tmp_path):
    gc.collect()  # files that other tests have left open
    store, opened = PagedStore(tmp_path), len(os.listdir("/proc/self/fd"))
    copies = [store.put(torch.full((10,), float(i))) for i in range(50)]
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) <= opened
    assert [float(copy.sum()) for copy in copies] == [10.0 * i for i in range(50)]


@linux
def test_a_nearly_full_disk_is_left_alone(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": paging.LEFT_FREE})
    monkeypatch.setattr(paging.shutil, "disk_usage", lambda folder: usage)
    tensor = torch.ones(10)
    assert PagedStore(tmp_path).put(tensor) is tensor


@pytest.mark.parametrize("fails", ["fdatasync", "makedirs"])
def test_a_disk_that_fails_leaves_the_tensor_where_it_is(fails, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    tensor = torch.ones(10)
    assert PagedStore(tmp_path).put(tensor) is tensor
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_other_systems_keep_everything_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(paging, "_advise", lambda: None)
    tensor = torch.ones(10)
    assert PagedStore(tmp_path).put(tensor) is tensor
    page_out(tensor)


class Model:
    """Refers to itself, as the host's models do."""

    def __init__(self):
        self.model = self


def test_memory_is_given_back_once_the_garbage_of_a_model_was_collected(monkeypatch):
    given = []
    monkeypatch.setattr(paging, "_trim", lambda: given.append)
    gc.collect()
    given.clear()
    model, other = Model(), Model()
    for one in (model, other):
        paging.give_back_after(one)
    gc.collect()
    assert not given, "both are there"
    one = None
    del model
    gc.collect()
    assert given == [0]
    gc.collect()
    assert len(given) == 1, "once a model"
    assert gc.callbacks.count(paging._collected) == 1
    del other
    gc.collect()
    assert len(given) == 2
    monkeypatch.setattr(paging, "_trim", lambda: None)  # a system that knows no such call
    paging.give_back_after(Model())
    gc.collect()
