"""The table of docs/benchmarks.md about ten points is that of docs/results/before_after.json."""

from __future__ import annotations

import copy
import json

import pytest

from flr.files import read_json
from scripts import before_after

REPORT = read_json(before_after.ROOT / before_after.RESULT, 1 << 20)


def test_the_page_is_fresh():
    assert before_after.main(["--check"]) == 0


def test_other_figures_are_found(tmp_path, capsys):
    for name in (before_after.PAGE, before_after.RESULT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((before_after.ROOT / name).read_bytes())
    report = copy.deepcopy(REPORT)
    report["points"]["4"]["after"]["full"] = [77.0]
    (tmp_path / before_after.RESULT).write_text(json.dumps(report))
    assert before_after.main(["--check"], tmp_path) == 1
    assert "docs/benchmarks.md: expected what" in capsys.readouterr().err
    assert before_after.main(["--table"], tmp_path) == 0
    assert "| 77 |" in (tmp_path / before_after.PAGE).read_text()


def test_every_point_was_measured_at_both_commits():
    assert list(before_after.POINTS) == [name for name in before_after.POINTS if name in REPORT["points"]]
    for name, point in before_after.POINTS.items():
        result = REPORT["points"][name]
        assert result["sizes"] == point.sizes, f"{name}: measured at other sizes than the script's"
        assert result["run"]["commits"]["before"] != result["run"]["commits"]["after"]
        for side in before_after.SIDES:
            assert {row.key for row in point.rows} <= set(result[side])
            assert {len(values) for values in result[side].values()} == {result["rounds"]}


def test_points_that_were_measured_at_other_commits_are_told_apart():
    report = copy.deepcopy(REPORT)
    report["points"]["2"]["run"]["commits"]["after"] = "abc1234"
    lines = [text for text in before_after.table(report).splitlines() if text.startswith("Points ")]
    others = [text for text in before_after.table(REPORT).splitlines() if text.startswith("Points ")]
    assert len(lines) == len(others) + 1
    assert any(text.startswith("Points 2: commits 6c749f6 and abc1234, ") for text in lines)


def test_targets_are_of_the_number_or_of_its_gain():
    result = {"before": {"x": [4.0, 6.0, 5.0]}, "after": {"x": [2.5, 2.5, 2.5]}}
    of_gain = before_after.Row("x", "text", "s", target=2.0, of_gain=True)
    assert before_after.line("1", of_gain, result) == "| 1. text | 5 s (4 to 6) | 2.5 s | 2.00× | 2× better: met |"
    less = before_after.Row("x", "text", target=2.0)
    assert before_after.line("1", less, result).endswith("| 2.00× | 2: **missed** |")
    more = before_after.Row("x", "text", more_is_better=True, target=2.5)
    assert before_after.line("1", more, result).endswith("| 0.50× | 2.5: met |")


def test_results_that_differ_are_refused():
    same = {"a: items": [3, 1], "b": [1.0, float("-inf")]}
    assert before_after.apart({"before": same, "after": copy.deepcopy(same)}) == 0
    for name, numbers in (("a: items", [1, 3]), ("b", [1.001, 0.0])):
        with pytest.raises(ValueError, match=f"{name}: expected the same within"):
            before_after.apart({"before": same, "after": {**same, name: numbers}})
    with pytest.raises(ValueError, match="same names and lengths"):
        before_after.apart({"before": same, "after": {"b": [1.0, 2.0]}})


def test_a_process_of_another_tree_is_refused(tmp_path):
    class Other(before_after.Worker):
        def __init__(self):
            self.tree = tmp_path

        def _said(self):
            return {"flr": before_after.__file__, "found": {}}

    with pytest.raises(ValueError, match="before: expected flr of"):
        Other().begun()
