import os
import subprocess
import sys
from pathlib import Path

import pytest

from quanttune.quant import QuantTuneError
from quanttune.training.run_lock import alone

OTHER = """
import sys
from pathlib import Path
from quanttune.training.run_lock import alone
with alone(Path(sys.argv[1])):
    print("holds it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A second program that trains the run ``tmp_path / "runs" / "owl"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path / "runs" / "owl")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / ".dev" / "site")})
    assert process.stdout.readline() == "holds it\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_program_is_refused_and_another_run_is_not(other, tmp_path):
    with pytest.raises(QuantTuneError, match="'owl' in .* trained by another program; wait"):
        with alone(tmp_path / "runs" / "owl"):
            pytest.fail("let in")
    with alone(tmp_path / "runs" / "cat"):
        pass


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_the_run_is_free_when_the_other_one(how, other, tmp_path):
    other.communicate() if how == "ends" else other.kill()
    other.wait()
    for _ in range(2):  # and again after one's own
        with alone(tmp_path / "runs" / "owl"):
            pass


def test_a_failure_inside_frees_it_too(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), alone(tmp_path / "owl"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [], "nothing was begun, and nothing is left"


def test_the_folder_may_be_renamed_and_deleted_meanwhile(tmp_path):
    folder = tmp_path / "owl"
    folder.mkdir()
    with alone(folder):
        folder.rename(tmp_path / "aside")
        folder.mkdir()
        (tmp_path / "aside").rmdir()
        with pytest.raises(QuantTuneError, match="another program"), alone(folder):
            pytest.fail("let in")


def test_where_no_lock_can_be_had_one_trains_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with alone(tmp_path / "file" / "owl"):  # the trainer says what is wrong with the place
        pass
    import filelock

    def refuse(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    with alone(tmp_path / "owl"):
        pass


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_first_holds_it_for_all(first, tmp_path, monkeypatch):
    from types import SimpleNamespace

    import accelerate.utils

    def broadcast(found):
        return found if first else [None, said]

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
    ranks, said = SimpleNamespace(num_processes=2, is_main_process=first), None
    with alone(tmp_path / "owl", ranks):
        if first:
            with pytest.raises(QuantTuneError, match="another program"):
                with alone(tmp_path / "owl", ranks):
                    pytest.fail("let in")
        else:  # which asks for no lock of its own
            with alone(tmp_path / "owl"):
                pass
    if not first:
        said = "what the first process met"
        with pytest.raises(QuantTuneError, match=said), alone(tmp_path / "owl", ranks):
            pytest.fail("let in")
