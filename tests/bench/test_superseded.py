"""``flr bench report`` removes a results file once newer files of the device hold all of its rows, and nothing else."""

from __future__ import annotations

import pytest

from bench import report, results

FACTS = {"device": "CPU Some 3.0", "dirty": False, "tier": "default", "threads": 1, "versions": {}}
FACTS |= {"ceilings": {"copy_gb_per_s": 1.0}}


def measured(folder, commit: str, day: int, cases: list[str], **facts):
    rows = [{"suite": "s", "case": case, "variant": "flr"} for case in cases]
    rows = [{**row, "p50_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0} for row in rows]
    return results.append({**FACTS, "commit": commit, "date": f"2026-01-{day:02}T00:00:00Z", **facts}, rows, folder)


@pytest.mark.parametrize(
    ("newer", "gone"),
    [
        ([("b", 2, ["x 1", "y 1"], {})], True),
        ([("b", 2, ["x 1"], {}), ("c", 3, ["y 1"], {})], True),
        ([("b", 2, ["x 1"], {})], False),
        ([("b", 2, ["x 1", "y 2"], {})], False),
        ([("b", 2, ["x 1", "y 1"], {"tier": "quick"})], False),
        ([("b", 2, ["x 1", "y 1"], {"device": "CPU Other"})], False),
        ([("b", 2, ["x 1", "y 1"], {}), ("a", 3, ["x 1"], {})], False),
    ],
    ids=[
        "one file",
        "two together",
        "a case is missing",
        "another case",
        "a quick run",
        "another device",
        "measured on",
    ],
)
def test_what_supersedes_a_file(tmp_path, newer, gone):
    old = measured(tmp_path, "a", 1, ["x 1", "y 1"])
    for commit, day, cases, facts in newer:
        measured(tmp_path, commit, day, cases, **facts)
    assert results.superseded(tmp_path) == ([old] if gone else [])


def test_a_file_of_quick_runs_stays(tmp_path):
    measured(tmp_path, "a", 1, ["x 1"], tier="quick")
    measured(tmp_path, "b", 2, ["x 1"])
    assert results.superseded(tmp_path) == []


def test_a_report_removes_it_and_shows_the_same(tmp_path):
    old = measured(tmp_path / "results", "a", 1, ["x 1"])
    kept = [measured(tmp_path / "results", "b", 2, ["x 1", "y 1"]), measured(tmp_path / "results", "c", 3, ["y 1"])]
    shown = results.newest(tmp_path / "results")
    (tmp_path / "README.md").write_text("<!-- bench:s -->\n<!-- /bench -->\n")
    changed = report.report(tmp_path / "results", tmp_path, figures=False)
    assert changed == [tmp_path / "README.md", old]
    assert not old.exists()
    assert all(path.exists() for path in kept)
    assert results.newest(tmp_path / "results") == shown
    assert report.report(tmp_path / "results", tmp_path, figures=False) == []


def test_the_committed_results_hold_nothing_superseded():
    assert results.superseded() == []
