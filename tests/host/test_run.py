"""Runs that start anew: the one before is put aside, and comes back from whatever cuts that off."""

import os

import pytest


@pytest.fixture
def run(host_folders):
    """The module, and the folder of the run "owl" with a state in it."""
    from quanttune.host import run as module

    folder = module.run_folder("owl")
    fill(folder, "first")
    return module, folder


def fill(folder, what, state=True):
    folder.mkdir(parents=True)
    (folder / "loss.csv").write_text(what)
    if state:
        (folder / "checkpoint.pt").write_text(what)


def held(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def beside(folder):
    return sorted(p.name for p in folder.parent.iterdir())


class Killed(BaseException):
    """Stands for a process that ends here."""


def killed(module, monkeypatch, after):
    """Start "owl" anew in a process that is killed ``after`` a rename, its set-up, or a part of the
    deletion."""
    from pathlib import Path

    real, calls = Path.rename, []

    def gone(*args, **kwargs):
        raise Killed

    def rename(self, target):
        calls.append(real(self, target))
        if after == f"rename {len(calls)}":
            die()

    def die():
        # From here on nothing of the process happens any more.
        patch.setattr(Path, "rename", gone)
        patch.setattr(module.shutil, "rmtree", gone)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if after == "rmtree":
            patch.setattr(module.shutil, "rmtree", gone)
        with pytest.raises(Killed), module.replaced("owl", anew=True):
            fill(module.run_folder("owl"), "second", state=False)
            if after == "set up":
                die()


def test_a_run_is_gone_once_another_is_set_up(run):
    module, folder = run
    with module.replaced("owl", anew=True):
        assert not folder.exists()
        fill(folder, "second", state=False)
    assert held(folder) == {"loss.csv": "second"} and beside(folder) == ["owl"]


def test_a_run_is_as_it_was_where_another_cannot_be_set_up(run):
    module, folder = run
    with pytest.raises(ValueError), module.replaced("owl", anew=True):
        fill(folder, "second")
        raise ValueError
    assert held(folder)["checkpoint.pt"] == "first" and beside(folder) == ["owl"]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("after", ["rename 1", "set up"])
def test_a_kill_while_another_is_set_up_loses_nothing(run, monkeypatch, after, anew):
    module, folder = run
    killed(module, monkeypatch, after)
    (left,) = [name for name in beside(folder) if name != "owl"]
    assert left.startswith(".owl.") and left.endswith(".old")
    assert folder.exists() == (after == "set up")
    found = []
    with pytest.raises(ValueError), module.replaced("owl", anew):
        found += beside(folder)
        raise ValueError  # so that the run stays what was put back
    assert ("owl" in found) == (not anew)
    assert held(folder) == {"loss.csv": "first", "checkpoint.pt": "first"}
    assert beside(folder) == ["owl"]


@pytest.mark.parametrize("after", ["rename 2", "rmtree"])
def test_what_a_kill_left_of_a_deletion_is_deleted(run, monkeypatch, after):
    module, folder = run
    killed(module, monkeypatch, after)
    assert [name[-5:] for name in beside(folder)] == [".gone", "owl"]
    (folder.parent / beside(folder)[0] / "checkpoint.pt").unlink(missing_ok=True)
    with module.replaced("owl", anew=False):
        assert held(folder) == {"loss.csv": "second"} and beside(folder) == ["owl"]


def test_a_deletion_that_windows_refuses_stops_no_training(run, monkeypatch):
    """A file of the former run that another program looks at keeps its folder from a new name."""
    from pathlib import Path

    module, folder = run
    real = Path.rename

    def rename(self, target):
        if str(target).endswith(module.DONE):
            raise PermissionError(13, "Access is denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
        with module.replaced("owl", anew=True):
            fill(folder, "second", state=False)
    (left,) = [name for name in beside(folder) if name != "owl"]
    assert held(folder.parent / left) == {"loss.csv": "first"}
    with module.replaced("owl", anew=False):
        assert held(folder) == {"loss.csv": "second"} and beside(folder) == ["owl"]


def test_the_first_run_of_all_warns_of_nothing(host_folders, caplog):
    from quanttune.host import run as module

    assert not module.run_folder("owl").parent.exists()
    with module.replaced("owl", anew=False):
        pass
    assert caplog.messages == []


def test_a_run_with_a_state_is_never_replaced_by_what_was_put_aside(run):
    """Earlier versions could be killed while they deleted it under that name."""
    module, folder = run
    fill(folder.with_name(".owl.01234567.old"), "older")
    with module.replaced("owl", anew=False):
        assert held(folder)["checkpoint.pt"] == "first" and beside(folder) == ["owl"]


def test_the_last_of_several_comes_back(run):
    module, folder = run
    for number, name in enumerate(("89abcdef", "01234567", "76543210")):
        path = folder.with_name(f".owl.{name}.old")
        fill(path, name)
        os.utime(path, (number % 2 + 1, number % 2 + 1))
    for name in ("loss.csv", "checkpoint.pt"):
        (folder / name).unlink()
    with module.replaced("owl", anew=False):
        assert held(folder)["checkpoint.pt"] == "01234567" and beside(folder) == ["owl"]


def test_what_belongs_to_others_stays(run, tmp_path):
    module, folder = run
    others = [".owl.01234567.old2", ".owlet.01234567.old", ".owl.0123456.old", ".owl.0123456G.gone",
              "owl.01234567.old", ".owl.x.01234567.old"]
    for name in others:
        fill(folder.with_name(name), "other")
    (folder.parent / ".owl.11111111.gone").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (folder.parent / ".owl.22222222.gone").symlink_to(tmp_path / "elsewhere")
    with module.replaced("owl", anew=False):
        pass
    assert beside(folder) == sorted(
        [*others, "owl", ".owl.11111111.gone", ".owl.22222222.gone"])
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_progress_is_told_to_the_page_that_queued_alone(run, monkeypatch):
    import types

    module, _ = run
    told = []
    progress = types.SimpleNamespace(
        steps=4, seconds_per_step=1.0, record=types.SimpleNamespace(step=2, loss=0.5),
        trainer=types.SimpleNamespace(history=[types.SimpleNamespace(loss=0.5)]))
    host = types.SimpleNamespace(client_id="page", send_progress_text=lambda *a: told.append(a))
    monkeypatch.setattr(module, "server", lambda: host)
    module.tell(progress, "5")
    ((text, node, client),) = told
    assert text.startswith("step 2/4  loss 0.5000") and (node, client) == ("5", "page")
    module.tell(progress, None)
    host.client_id = None
    module.tell(progress, "5")
    monkeypatch.setattr(module, "server", lambda: None)
    module.tell(progress, "5")
    assert len(told) == 1
