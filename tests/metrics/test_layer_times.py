"""What follows from the times of layers, and how calls take turns."""

import pytest

from quanttune.metrics import layer_times
from quanttune.metrics.layer_times import REST, LayerTimes, take_turns
from quanttune.quant.plan import FLOAT, BitPlan

SHAPES = {"input_blocks.0.0": (32, 4, 3, 3), "a.attn1.to_q": (64, 64), "a.ff.net.2": (64, 128),
          "label_emb.0": (8, 8)}
TIMES = LayerTimes(SHAPES, {"input_blocks.0.0": 1.0, "a.attn1.to_q": 2.0, "a.ff.net.2": 4.0,
                            "label_emb.0": 0.0},
                   {"input_blocks.0.0": None, "a.attn1.to_q": 2.5, "a.ff.net.2": 1.0,
                    "label_emb.0": None}, 10.0, "float32", "here")


def test_shares():
    assert TIMES.rest == 3.0 and TIMES.seconds(()) == 10.0
    assert TIMES.fastest() == {"a.ff.net.2"}
    assert TIMES.share({"a.ff.net.2"}) == pytest.approx(0.7)
    assert TIMES.share(SHAPES) == pytest.approx(0.75), "no integers: float; slower ones count"
    plan = BitPlan({**dict.fromkeys(SHAPES, FLOAT), "a.ff.net.2": 8})
    assert TIMES.share({n for n, bits in plan.bits.items() if bits}) == pytest.approx(0.7)


def test_layers_that_sum_to_more_than_the_step_leave_no_rest():
    short = LayerTimes(SHAPES, TIMES.floats, TIMES.integers, 5.0)
    assert short.rest == 0 and short.share(()) == 1.0
    assert short.share({"a.ff.net.2"}) == pytest.approx(4 / 7)


def test_groups_take_what_is_faster():
    assert TIMES.by_group() == {
        "feed-forward": (4.0, 1.0), "self-attention queries and keys": (2.0, 2.0),
        "first and last": (1.0, 1.0), "time embedding": (0.0, 0.0)}


def test_report_says_why_a_layer_stays():
    report = TIMES.report()
    assert report.startswith("here\n") and "takes 10 s" in report and f"3 s in {REST}" in report
    assert "0.70 of that time, the least" in report
    assert "a.attn1.to_q (1.25 x the time)" in report
    assert "input_blocks.0.0 (no integer product)" in report
    assert "label_emb.0 (not used in a step)" in report
    assert "and 2 more" in TIMES.report(1)


def test_chart():
    assert TIMES.chart().width == 768


def test_turns_are_taken_and_the_median_counts(monkeypatch):
    """By a clock of its own: each call takes what it says, the first a long time."""
    now, order = [0.0], []
    monkeypatch.setattr(layer_times.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        left = iter([100.0, *seconds])

        def run():
            order.append(name)
            now[0] += next(left)
        return run

    waits, before = [], []
    found = take_turns({"a": call("a", [9.0, 1.0, 5.0, 2.0]), "b": call("b", [9.0, 3.0, 3.0, 4.0])},
                       3, lambda: waits.append(1), before=lambda: before.append(1))
    assert found == {"a": 2.0, "b": 3.0}
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert len(before) == 8 and len(waits) == 16


def test_short_calls_are_repeated(monkeypatch):
    now, count = [0.0], []
    monkeypatch.setattr(layer_times.time, "perf_counter", lambda: now[0])

    def run():
        count.append(1)
        now[0] += 0.25

    assert take_turns({"a": run}, 2, lambda: None, least=1.0) == {"a": 0.25}
    assert len(count) == 2 + 2 * 4


def test_what_is_raised_before_ends_it():
    def stop():
        raise KeyboardInterrupt

    ran = []
    with pytest.raises(KeyboardInterrupt):
        take_turns({"a": lambda: ran.append(1)}, 1, lambda: None, before=stop)
    assert not ran
