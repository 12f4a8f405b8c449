"""A server that is mistreated: the benchmark's kinds cut down, and what they have to notice."""

import random
import signal
from collections import Counter

import pytest
import torch

from quanttune.benchmarks import abuse
from quanttune.benchmarks._server_abuse import clients, cycles, disk, kills, part, replaced
from quanttune.benchmarks._server_abuse.notice import Notice
from quanttune.quant.whole_file import write_safetensors
from quanttune.tests.harness.server import ComfyServer, host_environment

servers = pytest.mark.server


@pytest.fixture(scope="module")
def start(comfy_inprocess):
    """Starts servers as this test run knows them."""

    def started(folder):
        server = ComfyServer(host_environment(), folder)
        server.wait(300)
        return server

    return started


@servers
def test_cancelled_graphs_leave_the_server_unharmed(comfy_server):
    found = cycles.run(comfy_server, 12, seed=3, warm=5, longest=0.5, say=lambda line: None)
    assert found.same and not found.errors
    assert sum(found.ended.values()) >= 12 and found.ended["interrupted"]
    assert len(found.rss) == 12 and min(found.rss) > 100


@servers
def test_two_clients_get_their_own_pictures(comfy_server):
    found = clients.run(comfy_server, 3, seed=1, say=lambda line: None)
    assert found.jobs == [3, 3] and not found.wrong


@servers
def test_a_full_disk_and_a_kill_while_a_state_is_written(start, tmp_path):
    """One server after another over one folder, the output of which is a small disk."""
    try:
        with disk.small_disk(tmp_path / "output"):
            server = start(tmp_path)
            try:
                found = disk.run(server, ["quantized UNet", "scales"], say=lambda line: None)
                assert len(found) == 2 and not any(f.wrong for f in found), found
                job = kills.JOBS["Train Scales"]
                expected = kills.undisturbed(server, job, "scales-whole")
                done = kills.Kill("Train Scales", "a state's write", 0.0)
                kills.kill(server, job, "scales-0", done.stage, random.Random(0),
                           expected.seconds)
                assert server.process.returncode == -signal.SIGKILL
                kills.look(server, job, "scales-0", done)
                server.stop()
                server = start(tmp_path)
                kills.look_again(server, job, "scales-0", done, expected)
                assert not done.wrong
            finally:
                server.stop()
    except disk.NoSmallDisk as reason:
        pytest.skip(f"no small disk can be made: {reason}")


@servers
def test_a_file_replaced_under_a_loaded_model(start, tmp_path):
    found = replaced.run(
        start, tmp_path, long=24, say=lambda line: None,
        cases=lambda way, by, when: (way, by, when) in {
            ("renamed", "cut short", "running"), ("written into", "cut short", "idle"),
            ("written into", "8 bits", "running")})
    assert len(found) == 3 and not any(r.wrong for r in found), found
    assert [r.running for r in found][:1] == ["unharmed"]


def test_growth_is_of_the_medians_after_warming_up():
    assert cycles.growth([900.0] * 10 + [100.0] * 10 + [110.0] * 10, 10, 10) == pytest.approx(0.1)
    assert cycles.growth([100.0] * 9 + [500.0], 2, 4) == 0.0
    found = cycles.Cycles(Counter(success=4), rss=[1.0] * 4, anonymous=[9.0, 1.0, 1.0, 2.0])
    told = part.summary(found, 1)
    assert told["growth"] == 0.0 and told["growth_anonymous"] == 1.0
    assert told["growth_in_use"] == {}
    found.in_use = [{"cycles": n, "given_out": mib, "free": 1.0, "python_blocks": 100}
                    for n, mib in ((100, 10.0), (200, 40.0), (300, 50.0))]
    assert cycles.growth_in_use(found.in_use, 200) == {"given_out": 0.25, "python_blocks": 0.0}
    assert part.summary(found, 1)["growth_in_use"] == {"given_out": 4.0, "python_blocks": 0.0}


def test_stages_of_kills_that_run_again_replace_their_own_numbers_alone():
    def killed(job, stage, moment):
        return {"job": job, "stage": stage, "moment": moment}

    before = {"disk": {"nodes": []}, "kills": {"seconds": {"LoRA Train": {}}, "kills": [
        killed("Train QAT", "saving", 0.1), killed("LoRA Train", "saving", 0.2)]}}
    found = {"kills": {"seconds": {"Train QAT": {"step": 1.0}}, "kills": [
        killed("Train QAT", "saving", 0.3), killed("Train QAT", "preparing", 0.4)]}}
    told = part.merged(before, found)
    assert told["disk"] == {"nodes": []} and set(told["kills"]["seconds"]) == {
        "LoRA Train", "Train QAT"}
    assert [kill["moment"] for kill in told["kills"]["kills"]] == [0.2, 0.3, 0.4]
    assert part.merged({}, found)["kills"]["kills"] == found["kills"]["kills"]


def test_an_unknown_kill_is_refused_before_a_server_starts(capsys):
    with pytest.raises(SystemExit):
        abuse.main(["--part", "server", "--kind", "kills", "--kill", "Train QAT:lunch"])
    assert "Train QAT:saving" in capsys.readouterr().err


def test_half_a_file_of_a_whole_ones_name_is_noticed(tmp_path):
    path = tmp_path / "scales.safetensors"
    write_safetensors(path, {"a": torch.arange(9.0)}, {})
    assert not kills.whole(path) and kills.values(path)
    path.write_bytes(path.read_bytes()[:-8])
    assert "cut short" in kills.whole(path)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK half")
    assert "damaged" in kills.whole(tmp_path / "checkpoint.pt")


def test_a_file_that_is_begun_is_noticed_at_once(tmp_path):
    notice = Notice([tmp_path / "runs"])
    try:
        assert not notice.wait(".tmp", 1, 0.05)
        (tmp_path / "runs" / "a.txt").touch()
        (tmp_path / "runs" / "b.tmp").touch()
        assert notice.wait(".tmp", 1, 60) and not notice.wait(".tmp", 1, 0.05)
    finally:
        notice.close()
