"""Figures are drawn from rows of the results."""

from pathlib import Path

from bench import figures, report, results
from tests.helpers.results import planted

ROOT = Path(__file__).parents[2]


def test_figures_show_the_committed_results():
    drawn = figures.chosen(results.newest())
    assert {"speedup", "roofline", "kernels"} <= drawn.keys()
    for name, rows in drawn.items():
        svg = (ROOT / f"docs/figures/{name}.svg").read_text()
        assert f"data {figures.digest(rows)}" in svg, f"{name}.svg is stale: run flr bench report"


def test_figures_are_drawn_from_rows(tmp_path):
    rows = [
        {"suite": "scaling", "case": f"step: L={n}", "variant": "flr", "p50_ms": 2.0 * n, "peak_mb": 1.0 * n}
        | {"shape": {"operation": "step", "varied": "L", "L": n, "B": 2}, "tier": "full"}
        for n in (1, 2, 4, 8)
    ]
    devices = {"CPU Some 3.0": [{**row, "run": planted()} for row in rows]}
    (path,) = figures.draw(devices, tmp_path)
    assert "step" in path.read_text()
    assert figures.draw(devices, tmp_path) == []
    devices["CPU Some 3.0"][0]["p50_ms"] = 3.0
    assert figures.draw(devices, tmp_path) == [path]
    assert "| step, B2 | L | 1 … 8 | 16.0 ms, 8.00 MB |" in report.growth(devices["CPU Some 3.0"])


def test_the_speed_ups_are_few_bars_that_hold_every_row():
    rows = figures.chosen(results.newest())["speedup"]
    groups = figures.kinds_of_work(rows)
    assert len(groups) <= 10
    assert sum(len(group) for *_, group in groups) == len(rows)
    for words, against, group in groups:
        assert len({(row["suite"], row["variant"], row["target"]) for row in group}) == 1
        assert against.startswith(f"against {group[0]['variant']}")
        assert group[0]["case"].split()[0] in words
