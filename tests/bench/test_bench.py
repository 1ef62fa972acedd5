"""Files of results, what is compared and reported, and that documents show what the committed results say."""

import json
from pathlib import Path

import pytest

from bench import report, results
from flr.cli import main
from tests.helpers.results import planted, saved

ROOT = Path(__file__).parents[2]


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
    assert tables["s-brief"].endswith("| x | 2.00 ms | eager **4.00×** (3.64-4.40) |")  # what failed has no time
    held = [{**row, "peak_mb": 3.0 + place} for place, row in enumerate(devices["CPU Some 3.0"])]
    assert report.brief(held, "s").endswith("| x | 2.00 ms, 3.00 MB | eager **4.00×** (3.64-4.40), 4.00 MB |")
    assert "| s | Some 3.0 | 0 of 1 | 4.00× eager, x | 4.00× eager, x |" in tables["summary"]
    text = "a\n<!-- bench:speed -->\nold\n<!-- /bench -->\nb\n"
    assert (
        report.render(text, tables, "x.md") == f"a\n<!-- bench:speed -->\n\n{tables['speed']}\n\n<!-- /bench -->\nb\n"
    )
    with pytest.raises(ValueError, match=r"x\.md: expected bench:NAME with NAME one of summary, speed.*got nothing"):
        report.render(text.replace("speed", "nothing"), tables, "x.md")


def test_the_summary_hides_no_loss():
    """A line a suite and device, with the lowest of all ratios, and with targets that failed counted as missed."""
    rows = [
        {"suite": suite, "case": f"{case} B2", "variant": variant, **more}
        for suite, case, variant, more in (
            ("a_b", "step", "flr", {"p50_ms": 1.0}),
            ("a_b", "step", "eager", {"ratio": {"p50": 9.0, "p20": 8.0, "p80": 10.0}, "target": 5}),
            ("a_b", "build", "other", {"failed": "no", "target": 2}),
            ("a_b", "build", "compiled", {"ratio": {"p50": 0.5, "p20": 0.4, "p80": 0.6}}),
            ("a_b", "build", "host", {"ratio": {"p50": 0.1, "p20": 0.1, "p80": 0.1}}),  # ours in another form
            ("c", "x", "eager", {"ratio": {"p50": 2.0, "p20": 2.0, "p80": 2.0}}),
        )
    ]
    lines = report.summary({"CPU Some(R) Thing Processor": rows, "GPU": rows[:2]}).splitlines()[2:]
    assert lines == [
        "| a b | Some Thing | 1 of 2 | 9.00× eager, step | 0.500× compiled, build |",
        "| a b | GPU | 1 of 1 | 9.00× eager, step | 9.00× eager, step |",
        "| c | Some Thing | none set | 2.00× eager, x | 2.00× eager, x |",
    ]


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
    assert "expected at least 3 runs of a device, got {'CPU Some 3.0': 2}" in capsys.readouterr().err
    assert main(["bench", "baseline", str(out), str(studied(tmp_path / "none", *[{"level": level}] * 3))]) == 1
    assert "expected a steady ratio" in capsys.readouterr().err


def test_of_several_processors_the_lowest_ratio_counts(tmp_path):
    steady, level = {"both": (10.0, 1.1), "one": (10.0, 1.1)}, {"both": (4.0, 1.1), "one": (1.2, 1.01)}
    first, second = (tmp_path / f"{name}.json" for name in ("first", "second"))
    assert main(["bench", "baseline", str(first), str(studied(tmp_path, *[steady] * 3))]) == 0
    runs = [{**planted(*how, tier="quick", case=case), "device": "CPU Other"} for case, how in level.items()]
    other = saved(tmp_path / "other", *[{**runs[0], "rows": [row for run in runs for row in run["rows"]]}] * 3)
    assert main(["bench", "baseline", str(second), str(first), str(other)]) == 0
    document = results.load(second)
    assert document["device"] == "CPU Some 3.0, CPU Other"
    assert [(row["case"], row["ratio"]["p50"]) for row in document["baseline"]] == [("both", 4.0)]


def test_a_variant_is_added_to_a_baseline_that_stays_as_it_was(tmp_path, capsys):
    """Its ratios may be low; those of the others are neither replaced nor dropped by the new runs."""
    old, new = (tmp_path / f"{name}.json" for name in ("old", "new"))
    assert main(["bench", "baseline", str(old), str(studied(tmp_path, *[{"x": (10.0, 1.1)}] * 3))]) == 0
    runs = [planted(*how, tier="quick", case="x") for how in ((5.0, 1.5), (0.8, 1.1))]
    runs[1]["rows"][1]["variant"] = "rival"
    both = {**runs[0], "device": "CPU Other", "rows": [row for run in runs for row in run["rows"]]}
    other = saved(tmp_path / "other", *[both] * 3)
    assert main(["bench", "baseline", str(new), str(old), str(other), "--added", "rival"]) == 0
    found = {row["variant"]: row["ratio"]["p50"] for row in results.load(new)["baseline"]}
    assert found == {"eager": 10.0, "rival": 0.8}
    assert main(["bench", "baseline", str(new), str(old), str(other), "--added", "rival", "nobody"]) == 1
    assert "added: expected variants with a steady ratio" in capsys.readouterr().err


@pytest.mark.parametrize(("slower", "status"), [(1, 0), (1.4, 0), (3, 1)])
def test_the_committed_baseline_finds_a_threefold_slowdown_on_any_machine(tmp_path, capsys, slower, status):
    """As .ci/run compares: another device, twice faster with the same ratios passes; slower in one case fails."""
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
    assert "MISSING in B" in capsys.readouterr().out


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    a, other = saved(tmp_path / "a", planted()), saved(tmp_path / "b", planted(case="y"))
    (tmp_path / "c.json").write_text("[]")
    assert main(["bench", "compare", str(a), str(other)]) == 1
    assert "expected two files with a ratio in common" in capsys.readouterr().err
    assert main(["bench", "compare", str(a), str(tmp_path / "c.json")]) == 1
    assert "expected a results file" in capsys.readouterr().err
    assert main(["bench", "compare", str(a), str(a), "--threshold", "1"]) == 1
    assert "threshold: expected a factor above 1, got 1.0" in capsys.readouterr().err


def test_documents_show_the_committed_results():
    tables = report.tables(results.newest())
    found = report.documents()
    assert {"README.md", "benchmarks.md", "kernels.md"} <= {path.name for path in found}
    for path in found:
        text = path.read_text()
        assert report.render(text, tables, path.name) == text, f"{path.name} is stale: run flr bench report"


def test_bench_without_a_checkout_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flr.__file__", str(tmp_path / "flr/__init__.py"))
    assert main(["bench", "report"]) == 1
    assert "expected a checkout with the folder bench/" in capsys.readouterr().err


def test_the_worst_of_a_suite_is_shown_and_what_is_ours_is_no_competitor(tmp_path):
    rows = [
        {**planted(ratio, case=case)["rows"][1], "variant": variant}
        for case, variant, ratio in (
            ("x", "eager", 4.0),
            ("y", "sdpa", 0.5),
            ("z", "thoughts", 0.1),
            ("w", "eager", 2.0),
        )
    ]
    ours = [planted(case=case)["rows"][0] for case in "xyzw"]
    saved(tmp_path, {**planted(), "rows": [*ours, *rows]})
    table = report.tables(results.newest(tmp_path))["worst"].splitlines()
    assert len(table) == 5
    assert table[-1].startswith("| s | y | sdpa | **0.500×** |")


def test_rows_of_a_withdrawn_competitor_are_shown_no_more(tmp_path):
    (suite, word, variant), until = next(iter(results.WITHDRAWN.items()))
    for date, left in (("2026-01-01T00:00:00Z", 0), (f"{until}T00:00:00Z", 1)):
        row = {**planted(case=f"{word} B2")["rows"][1], "suite": suite, "variant": variant}
        saved(tmp_path / date, {**planted(date=date), "rows": [row]})
        assert sum(map(len, results.newest(tmp_path / date).values())) == left


def test_a_test_of_the_server_may_take_as_long_as_both_start_ups():
    from bench.conftest import TIMEOUT
    from bench.harness import START_SECONDS

    assert min(TIMEOUT.values()) > 2 * START_SECONDS
