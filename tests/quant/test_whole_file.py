import errno
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quanttune.quant import QuantTuneError
from quanttune.quant.safe_file import read_safetensors
from quanttune.quant.whole_file import write_safetensors, written_whole
from quanttune.tests.quant.test_safe_file import TENSORS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


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


def test_a_full_disk_that_torch_meets(path):
    """Its writer raises an error of its own, about the end of the archive."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 1000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    path.write_bytes(b"old")
    with pytest.raises(QuantTuneError, match="disk is full"):
        with written_whole(path) as file:
            torch.save({"a": torch.zeros(2**16)}, Full(file))
    assert path.read_bytes() == b"old"


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
