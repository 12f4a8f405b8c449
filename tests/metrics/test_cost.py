"""The cost table and its chart, and peak memory."""

import mmap
import time

import pytest
import torch

from quanttune.metrics import memory
from quanttune.metrics.cost import Cost, CostReport
from quanttune.metrics.memory import peak_memory

REPORT = CostReport((Cost("float", (2.0, 4.0, 3.0), 5.0, 2**20, 2**21),
                     Cost("8 bits", (1.0, 1.0, 6.0), 9.0, 2**19, 2**20)), 2, 10, "here")


def test_ratios_are_of_rounds_not_of_medians():
    assert REPORT.ratio(0) == 1 and REPORT.ratio(1) == 0.5
    assert REPORT.costs[1].median == 1.0 and REPORT.costs[0].median == 3.0
    assert REPORT.images_per_hour(0) == 3600 * 2 / 30
    assert REPORT.costs[0].spread == pytest.approx(1 / 3)
    assert Cost("one", (1.0,), 1.0, 0, 0).spread == 0


def test_tables():
    assert "| 8 bits | 1 |" in REPORT.markdown() and REPORT.markdown().startswith("here")
    lines = REPORT.csv().splitlines()
    assert lines[0].startswith("model,") and lines[2].startswith('"8 bits",1,')
    assert len({line.count(",") for line in lines}) == 1


def test_names_keep_to_their_cells():
    import csv
    import io

    odd = CostReport((Cost('a|b "c", d', (1.0,), 1.0, 1, 1),), 1, 1, "here")
    assert odd.markdown().splitlines()[-1].startswith('| a\\|b "c", d | 1 | 0% |')
    assert next(r for r in csv.reader(io.StringIO(odd.csv())) if r[0] != "model")[0] == (
        'a|b "c", d')


def test_chart():
    assert REPORT.chart().width == 900
    CostReport(REPORT.costs[:1], 1, 1, "x").chart()


@pytest.mark.parametrize("watching", [False, True])
def test_peak_memory_sees_what_is_freed_again(watching, monkeypatch):
    if watching:
        monkeypatch.setattr(memory, "_reset", lambda: False)
    size = 200 * 2**20
    with peak_memory(torch.device("cpu")) as found:
        # Of the system itself: the C library may hold as much of earlier tests, still resident.
        with mmap.mmap(-1, size) as block:
            for _ in range(200):
                block.write(bytes(2**20))
            wait = time.monotonic() + 60
            while watching and found.extra < 0.8 * size and time.monotonic() < wait:
                time.sleep(0.01)  # a busy machine lets the watching thread run when it likes
    assert 0.8 * size < found.extra < 2 * size
    with peak_memory(torch.device("cpu")) as found:
        pass
    assert found.extra < size / 4, "a peak of before does not count"
