"""Diffusia's tables: what counts as a model's memory, and the columns of the table of costs."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, torch
from quanttune.benchmarks._sd15 import memory_above_idle

MIB = 2**18  # float32 values

def build():
    passing = torch.ones(600 * MIB)
    return passing[: 200 * MIB].clone()

def run(made):
    (made[: 100 * MIB] + 1).sum()

torch.ones(64).sum()
print(json.dumps(memory_above_idle(build, run)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a peak that can be reset")
def test_memory_is_of_what_stays_and_of_its_run():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True,
                          timeout=550, check=True)
    found = json.loads(done.stdout)
    assert found["built_mib"] == pytest.approx(200, abs=40)
    assert found["peak_mib"] == pytest.approx(300, abs=60)


def test_the_table_of_costs_tells_peaks_beside_times(comfy_inprocess):
    from quanttune.benchmarks.diffusia import tables

    row = {"seconds": 2.0, "spread": 0.1, "ratio": 1.0, "images_per_hour": 90, "weights_mib": 10}
    found = {"cost": {"table": {"setting": "here", "rows": {"a": row, "b": row}}},
             "memory": {"a": {"built_mib": 10.0, "peak_mib": 1234.5}}}
    lines = tables(found, {}).splitlines()
    assert lines[3].endswith("weights, MiB | peak memory, MiB (weights included) |")
    assert lines[5:] == ["| a | 2.00 ± 10% | 1.00 | 90 | 10 | 1,234 |",
                         "| b | 2.00 ± 10% | 1.00 | 90 | 10 |  |"]


def test_rows_that_are_known_are_not_measured_again(tmp_path, comfy_inprocess):
    from quanttune.benchmarks.diffusia import Results

    path, measured = tmp_path / "found.json", []
    for _ in range(2):
        results = Results(path)
        results.keep_only("memory_settings", {"threads": 1}, ("memory",))
        results.once("memory", "a", lambda: measured.append(1) or {"peak_mib": 1.0})
    assert len(measured) == 1
    assert json.loads(path.read_text())["memory"] == {"a": {"peak_mib": 1.0}}
    results.keep_only("memory_settings", {"threads": 2}, ("memory",))
    assert "memory" not in results.found


def test_every_row_of_the_results_is_one_that_can_be_made():
    from pathlib import Path

    from quanttune import benchmarks
    from quanttune.benchmarks._sd15 import ROWS

    found = json.loads((Path(benchmarks.__file__).parent / "results/diffusia.json").read_text())
    assert tuple(found["cost"]["table"]["rows"]) == ROWS == tuple(found["memory"])
