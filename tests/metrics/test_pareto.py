"""Fronts by hand, tables and the chart."""

from quanttune.metrics.pareto import Point, chart, csv, front, markdown

POINTS = [Point("float", 200, 16, 1.0, 0.0, 1.0), Point("8", 100, 8, 1.2, 0.01, 0.99),
          Point("plan", 90, 7.2, 1.3, 0.005), Point("4", 50, 4, 0.8, 0.2),
          Point("bad", 60, 5, 2, 0.3)]


def test_fronts():
    assert [p.name for p in front(POINTS)] == ["4", "plan", "float"]
    assert [p.name for p in front(POINTS, "time")] == ["4", "float"]
    assert front(POINTS[:1]) == POINTS[:1]


def test_a_broken_one_is_no_front_and_hides_none():
    broken = Point("2", 1, 2, 0.1, float("nan"))
    for cost in ("size", "time"):
        assert front([broken, *POINTS], cost) == front(POINTS, cost)


def test_of_equals_one_stays():
    twins = [Point("a", 10, 1, 1, 0.1), Point("b", 10, 1, 1, 0.1)]
    assert len(front(twins)) == 1


def test_tables():
    text = markdown(POINTS)
    assert text.splitlines()[2].startswith("| float | 0.0 | 16.00 | 1.00 | 0.00% | 1.000 | size")
    rows = csv(POINTS).splitlines()
    assert len(rows) == 6 and rows[4].endswith('"size, time"') and rows[5].endswith('""')


def test_chart():
    assert chart(POINTS).width == 1200
    chart(POINTS[1:])
