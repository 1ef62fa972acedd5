"""The benchmark suite's own arithmetic, its files, and that documents show what the committed results say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import figures, harness, report, results, scaling
from flr.cli import main

ROOT = Path(__file__).parents[2]


def planted(ratio=10.0, width=1.1, *, commit="a", date="2026-01-01T00:00:00Z", tier="default", case="x", ms=2.0):
    """A run with one race: ours, a competitor at ``ratio`` with a spread of ``width``, and one that failed."""
    common = {"suite": "s", "case": case, "shape": {"B": 2}, "tier": tier, "check": "passed"}
    times = {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms}
    spread = {"p20": ratio / width, "p50": ratio, "p80": ratio * width}
    rows = [
        {**common, "variant": "flr", **times},
        {**common, "variant": "eager", **times, "ratio": spread, "target": 5.0},
        {**common, "variant": "broken", "failed": "RuntimeError: no"},
    ]
    facts = {"device": "CPU Some 3.0", "commit": commit, "dirty": False, "date": date, "threads": 1, "tier": tier}
    return {**facts, "versions": {"torch": "2"}, "ceilings": {"copy_gb_per_s": 10.0}, "rows": rows}


def saved(folder, *runs):
    for run in runs:
        path = results.append({k: v for k, v in run.items() if k != "rows"}, run["rows"], folder)
    return path


def test_peak_memory_is_what_was_alive_at_a_time():
    def apart():
        torch.empty(1_000_000)
        torch.empty(500_000)

    def together():
        return torch.empty(1_000_000), torch.empty(500_000)

    assert harness.peak_bytes(apart) == 4_000_000
    assert harness.peak_bytes(together) == 6_000_000
    assert harness.peak_bytes(lambda: np.empty(1_000_000), "numpy") == pytest.approx(8_000_000, rel=0.01)


def test_a_race_is_run_in_turns_and_its_ratio_is_that_of_each_round(monkeypatch):
    order = []
    durations = {"flr": iter([3, 1, 1, 2, 4]), "slow": iter([9, 10, 30, 20, 40])}  # the first of each chooses calls

    def seconds(call, calls, clock=None):
        order.append(call())
        return next(durations[order[-1]]) / 1e3

    monkeypatch.setattr(harness, "seconds", seconds)
    monkeypatch.setattr(harness, "peak_bytes", lambda call, memory: None)

    def broken():
        raise RuntimeError("out of luck\nat length")

    race = harness.Race({"flr": lambda: "flr", "slow": lambda: "slow", "broken": broken}, "quick", rounds=4)
    order.clear()
    race.run()
    assert order == ["slow", "flr"] * 4
    ours, slow, failed = race.rows({"bytes": 10**6}, FixedCeilings(), "float32", {"slow": 3.0, "broken": 2.0})
    assert ours["p50_ms"] == 1.5
    assert ours["gb_per_s"] == pytest.approx(10**6 / 1.5e-3 / 1e9)
    assert ours["of_copy"] == ours["of_ceiling"] == pytest.approx(10**6 / 1.5e-3 / 1e10)
    assert slow["ratio"]["p50"] == 10  # of 10, 30, 10, 10; the ratio of medians would be 25 / 1.5
    assert slow["target"] == 3.0
    assert failed["failed"] == "RuntimeError: out of luck"
    assert not {"p50_ms", "ratio", "peak_mb"} & failed.keys()
    assert "peak_mb" not in ours  # not measured is absent


class FixedCeilings:
    copy = 1e10

    def matmul(self, dtype):
        return 1e12


def test_what_ours_raises_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        harness.Race({"flr": lambda: 1 / 0, "other": lambda: 1}, "quick")


def test_one_command_checks_measures_and_writes(tmp_path):
    (tmp_path / "conftest.py").write_text("from bench.conftest import *\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest, torch\n"
        "from bench.harness import label\n"
        "def wrong():\n    raise AssertionError('ours is wrong')\n"
        "@pytest.mark.cases(quick=[{'B': 8}], default=[{'B': 16}, {'B': 32}])\n"
        "@pytest.mark.parametrize('check', [None, wrong])\n"
        "def test_two(shape, check, race):\n"
        "    x = torch.ones(shape['B'], 1000)\n"
        "    p50 = race(label(shape), {'flr': x.sum, 'twice': lambda: (x.sum(), x.sum())}, suite='two', shape=shape,\n"
        "               check=check, bytes_moved=x.nbytes)\n"
        "    assert 0 < p50['flr'] < p50['twice']\n"
    )
    words = ["-m", "pytest", "-q", "--quick", "--benchmark-only", "--results", str(tmp_path / "out"), str(tmp_path)]
    # pytest-benchmark disables itself where pytest-xdist's variables are set, as they are under `pytest -n`
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout  # the wrong one was not timed
    (path,) = (tmp_path / "out").glob("*/*.json")
    document = results.load(path)
    (run,) = document["runs"]
    assert run["commit"] == document["commit"] == path.stem.removesuffix("-dirty")
    assert run["versions"]["torch"] == torch.__version__
    assert run["ceilings"]["copy_gb_per_s"] > 0
    ours, twice = run["rows"]
    assert ours["shape"] == {"B": 8}
    assert ours["check"] == "none given"
    assert ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"]
    assert ours["bytes"] == 8 * 1000 * 4
    assert 1 < twice["ratio"]["p50"] < 4


def test_runs_are_appended(tmp_path):
    first = saved(tmp_path, planted()).read_text()
    assert saved(tmp_path, planted(3.0)) == tmp_path / "cpu-some-3-0/a.json"
    document = results.load(tmp_path / "cpu-some-3-0/a.json")
    assert document["runs"] == [json.loads(first)["runs"][0], planted(3.0)]


def test_a_report_shows_the_newest_commit_of_a_kind_of_work(tmp_path):
    saved(tmp_path, planted(2.0, case="x gone"), planted(3.0, commit="b", date="2026-01-02T00:00:00Z"))
    saved(tmp_path, planted(4.0, commit="b", date="2026-01-03T00:00:00Z"))
    saved(tmp_path, planted(9.0, commit="c", date="2026-01-04T00:00:00Z", tier="quick"))
    devices = results.newest(tmp_path)
    assert list(devices) == ["CPU Some 3.0"]
    assert [(r["case"], r["variant"], r.get("ratio", {}).get("p50")) for r in devices["CPU Some 3.0"]] == [
        ("x", "flr", None),
        ("x", "eager", 4.0),
        ("x", "broken", None),
    ]
    tables = report.tables(devices)
    assert "| s | x | eager | **4.00×** | 3.64-4.40 |  | 5×, **missed** |" in tables["targets"]
    assert "| s x | eager | **4.00×** | 3.64-4.40 |  | 5×: **missed** |" in tables["speed"]
    assert "failed: RuntimeError: no" in tables["s"]
    text = "a\n<!-- bench:speed -->\nold\n<!-- /bench -->\nb\n"
    assert (
        report.render(text, tables, "x.md") == f"a\n<!-- bench:speed -->\n\n{tables['speed']}\n\n<!-- /bench -->\nb\n"
    )
    with pytest.raises(ValueError, match=r"x\.md: expected bench:NAME with NAME one of speed.*got nothing"):
        report.render(text.replace("speed", "nothing"), tables, "x.md")


def test_a_kind_of_work_measured_again_leaves_the_others(tmp_path):
    def kinds(*names, **more):
        rows = [{"suite": "s", "case": f"{name} B2", "variant": "flr", "p50_ms": 1.0} for name in names]
        return {**planted(**more), "rows": rows}

    saved(tmp_path, kinds("search", "build"), kinds("search", commit="b", date="2026-01-02T00:00:00Z"))
    (rows,) = results.newest(tmp_path).values()
    assert [(row["case"], row["run"]["commit"]) for row in rows] == [("search B2", "b"), ("build B2", "a")]


@pytest.mark.parametrize(
    ("ratio", "width", "status"),
    [(10.0, 1.1, 0), (7.0, 1.1, 0), (6.0, 1.1, 1), (6.0, 2.0, 0), (20.0, 1.1, 0)],
    ids=["same", "within the threshold", "regression", "too noisy to tell", "better"],
)
def test_compare_fails_on_a_ratio_that_fell(tmp_path, capsys, ratio, width, status):
    a = saved(tmp_path / "a", planted(9.0), planted(10.0), planted(11.0))  # pooled: 10, from 8.2 to 12.1
    b = saved(tmp_path / "b", planted(ratio, width))
    assert main(["bench", "--json", "compare", str(a), str(b), "--threshold", "1.5"]) == status
    out = json.loads(capsys.readouterr().out)
    assert out["changes"][0]["change"] == pytest.approx(ratio / 10)
    assert out["changes"][0]["a"]["spread"] == pytest.approx(11 / 9)
    assert out["regressions"] == (["s · x · eager"] if status else [])


def studied(folder, *ratios_of_runs):
    """A results file of quick runs; a run is case to (ratio, width)."""
    for run in ratios_of_runs:
        several = [planted(*how, tier="quick", case=case) for case, how in run.items()]
        path = saved(folder, {**several[0], "rows": [row for one in several for row in one["rows"]]})
    return path


def test_a_baseline_has_the_steady_ratios_alone(tmp_path, capsys):
    steady, wild, level, wide = (10.0, 1.1), (10.0, 1.1), (1.2, 1.01), (10.0, 2.0)
    runs = [{"steady": steady, "wild": wild, "level": level, "wide": wide, "gone": steady}] * 2
    study = studied(tmp_path, *runs, {"steady": (12.0, 1.1), "wild": (15.0, 1.1), "level": level, "wide": wide})
    out = tmp_path / "baseline.json"
    assert main(["bench", "baseline", str(out), str(study)]) == 0
    (row,) = results.load(out)["baseline"]
    assert (row["case"], row["variant"]) == ("steady", "eager")
    assert row["ratio"] == pytest.approx({"p20": 9.091, "p50": 10, "p80": 13.2, "spread": 1.2, "ours_ms": 2, "runs": 3})
    assert main(["bench", "baseline", str(out), str(study), "--without", "eager"]) == 1
    assert main(["bench", "baseline", str(out), str(studied(tmp_path / "few", *runs))]) == 1
    assert "expected at least 3 runs of one device, got 2" in capsys.readouterr().err
    assert main(["bench", "baseline", str(out), str(studied(tmp_path / "none", *[{"level": level}] * 3))]) == 1
    assert "expected a steady ratio" in capsys.readouterr().err


@pytest.mark.parametrize(("slower", "status"), [(1, 0), (1.4, 0), (3, 1)])
def test_the_committed_baseline_finds_a_threefold_slowdown_on_any_machine(tmp_path, capsys, slower, status):
    """As .ci/run compares: another, twice faster device with the same ratios passes, ours slower in one case does not."""
    path = ROOT / "bench/quick_baseline.json"
    rows = []
    for index, kept in enumerate(results.load(path)["baseline"]):
        ratio = {key: value / (1 if index else slower) for key, value in kept["ratio"].items()}
        ratio |= {
            end: ratio["p50"] + (ratio[end] - ratio["p50"]) / 2 for end in ("p20", "p80")
        }  # one run's, not the pool's
        (ours,) = planted(case=kept["case"], ms=kept["ratio"]["ours_ms"] / 2)["rows"][:1]
        rows += [{**ours, "suite": kept["suite"]}]
        rows += [{**ours, "suite": kept["suite"], "variant": kept["variant"], "ratio": ratio}]
    run = saved(tmp_path, {**planted(), "rows": rows})
    assert main(["bench", "compare", str(path), str(run), "--threshold", "2"]) == status
    missing = saved(tmp_path / "less", {**planted(), "rows": rows[2:]})
    capsys.readouterr()
    assert (
        main(["bench", "compare", str(path), str(missing), "--threshold", "2"]) == 1
    )  # a case that is gone guards nothing
    assert "MISSING in B" in capsys.readouterr().err


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    a, other = saved(tmp_path / "a", planted()), saved(tmp_path / "b", planted(case="y"))
    (tmp_path / "c.json").write_text("[]")
    assert main(["bench", "compare", str(a), str(other)]) == 1
    assert "expected two files with a ratio in common" in capsys.readouterr().err
    assert main(["bench", "compare", str(a), str(tmp_path / "c.json")]) == 1
    assert "expected a results file" in capsys.readouterr().err
    assert main(["bench", "compare", str(a), str(a), "--threshold", "1"]) == 1
    assert "threshold: expected a factor above 1, got 1.0" in capsys.readouterr().err


def test_growth_laws_are_those_of_the_larger_sizes():
    sizes = [2**i for i in range(10)]
    law = scaling.fit(sizes, [100 + 0.01 * x**2 for x in sizes])
    assert law.points == 5
    assert 0.5 < law.exponent < 2  # the constant still counts
    law = scaling.fit(sizes, [0.5 * x**1.5 * (1.1 if i % 2 else 1 / 1.1) for i, x in enumerate(sizes)])
    assert law.exponent == pytest.approx(1.5, abs=0.08)
    assert 1.05 < law.residual < 1.15
    assert scaling.fit([1, 2], [1, 2]) is None


def test_memory_is_extrapolated_as_a_sum_of_buffers():
    sizes = [2**i for i in range(4, 10)]
    law = scaling.fit_buffers(sizes, [50 + 3 * x + 0.01 * x**2 for x in sizes])
    assert (law.a, law.b, law.c) == pytest.approx((50, 3, 0.01), rel=1e-6)
    assert law.trusted == pytest.approx(1.0)
    assert law.largest(50 + 3 * 5000 + 0.01 * 5000**2, 512) == pytest.approx(5000)
    assert law.largest(1e12, 512) is None  # too far away
    assert law.reaches(50 + 3 * 5000 + 0.01 * 5000**2) == pytest.approx(5000)
    cubic = scaling.fit_buffers(sizes, [x**3 for x in sizes])
    assert cubic.trusted > 1.3  # a law that does not fit says so
    assert cubic.largest(1e9, 512) is None
    assert scaling.fit_buffers(sizes, [7.0] * 6).reaches(1e9) == float("inf")
    assert scaling.fit_buffers(sizes, [7.0] * 6).reaches(5) == 0


def test_documents_show_the_committed_results():
    tables = report.tables(results.newest())
    found = report.documents()
    assert {"README.md", "benchmarks.md", "kernels.md"} <= {path.name for path in found}
    for path in found:
        text = path.read_text()
        assert report.render(text, tables, path.name) == text, f"{path.name} is stale: run flr bench report"


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


def test_bench_without_a_checkout_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flr.__file__", str(tmp_path / "flr/__init__.py"))
    assert main(["bench", "report"]) == 1
    assert "expected a checkout with the folder bench/" in capsys.readouterr().err
