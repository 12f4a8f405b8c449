"""Benchmark Model on MODELs: turns, what is counted, refusals."""

import time

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def measure(given, channels=4, width=24, **options):
    from quanttune.host.benchmark import benchmark

    row = [[torch.randn(1, 7, width), {}]]
    return benchmark(given, {"samples": torch.zeros(2, channels, 8, 8)}, row, row,
                     **{"cfg": 5.0, "runs": 3, "warm_up": 2, "steps": 10, **options})


def test_models_take_turns(monkeypatch):
    from quanttune.host import benchmark

    source = models.small_model()
    quantized, _ = quantize(source, 4)
    order, step = [], benchmark.one_step

    def count(patcher, *args):
        order.append(patcher is quantized)
        return step(patcher, *args)

    monkeypatch.setattr(benchmark, "one_step", count)
    found = measure([("float", source), ("4 bits", quantized)])
    assert order == [False, False, True, True] + [False, True] * 4
    assert [len(c.seconds) for c in found.costs] == [3, 3]
    assert all(s > 0 for c in found.costs for s in c.seconds)
    assert found.costs[1].weight_bytes < 0.4 * found.costs[0].weight_bytes
    assert found.batch == 2 and "batch 2" in found.setting


def test_the_same_model_twice_costs_about_the_same(monkeypatch):
    from quanttune.host import benchmark

    # Of this process alone: what else the machine does counts for nothing.
    monkeypatch.setattr(benchmark.time, "perf_counter", time.process_time)
    source = models.small_model()
    found = measure([("a", source), ("b", source.clone())], runs=7)
    assert found.costs[0].weight_bytes == found.costs[1].weight_bytes
    assert 0.2 < found.ratio(1) < 5


def test_nothing_is_laid_out_before_the_peak_is_measured(monkeypatch, integer_products):
    """Two MODELs of the same integers, which one of them has used already."""
    from quanttune.host import benchmark
    from quanttune.host.dynamic_int8 import dynamic_int8
    from quanttune.host.ops import scaled_layers

    first, _ = dynamic_int8(models.small_model(), precision="float32")
    second, step, before = first.clone(), benchmark.one_step, []

    def look(patcher, *args):
        layers = scaled_layers(patcher.model).values()
        before.append(sum(m.int8_ready is not None for m in layers))
        return step(patcher, *args)

    monkeypatch.setattr(benchmark, "one_step", look)
    measure([("first", first), ("second", second)], runs=1)
    measure([("second", second)], runs=1)
    count = before[1]
    assert count > 0
    assert before == [0, count, 0, count, *[count] * 4, 0, count, *[count] * 2]


def test_refusals():
    from quanttune.quant import QuantTuneError

    source = models.small_model()
    with pytest.raises(QuantTuneError, match="at least 1"):
        measure([("a", source)], runs=0)
    with pytest.raises(QuantTuneError, match="'a' cannot run.*models of one family"):
        measure([("a", source)], width=5)


def test_the_hosts_stop_ends_it():
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        measure([("a", models.small_model())])
