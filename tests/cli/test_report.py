"""``flr report``: the page of a run, and of two compared."""

from __future__ import annotations

import json

import pytest

from flr.cli import main
from flr.train.run_folder import begin
from tests.helpers.extras import hide
from tests.helpers.pages import Checker
from tests.helpers.runs import run_folder


def page_of(path):
    text = path.read_text()
    return text, " ".join(" ".join(Checker(text).text).split())


def test_the_page_of_a_run(tmp_path, capsys):
    run = run_folder(tmp_path / "mine", 0.5)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"Wrote {run / 'report.html'}.\n"
    text, shown = page_of(run / "report.html")
    for words in (
        "Training run mine",
        "finished",
        "1,234",
        "Training loss",
        "Regularisers",
        "Gate share of each factor",
    ):
        assert words in shown
    assert "Attention entropy of each factor" in shown
    assert "Overlap of the factors' attention" in shown
    assert "Item <0> ×2.5" in shown
    assert "blue ×1.5" in shown
    assert "HR@10 0.5000" in shown
    for trait, group in (("History length", "0 to 2"), ("Popularity of the target", "0 to 1")):
        assert f"From, to Rows HR@10 NDCG@10 {group}" in shown.partition(f"{trait} ")[2]
    assert text.count("<img ") == text.count("<source media") == 6
    assert 'alt="Training loss: loss 2 to 0.5"' in text


def test_two_runs_compared(tmp_path, capsys):
    a, b = run_folder(tmp_path / "a", 0.5), run_folder(tmp_path / "b", 0.75)
    assert main(["report", str(a), str(b), "--output", str(tmp_path / "both.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    mean, low, high, _ = told["differences"]["valid"]["hr@10"]
    assert mean == pytest.approx(0.25)
    assert 0.1 < low < 0.25 < high < 0.4
    text, shown = page_of(tmp_path / "both.html")
    assert "a and b" in shown
    assert "+0.2500" in shown
    assert 'alt="Training loss: loss, a 2 to 0.5; loss, b 2 to 0.5"' in text
    run_folder(tmp_path / "other", 0.5, users=40)
    assert main(["report", str(a), str(tmp_path / "other"), "--output", str(tmp_path / "c.html")]) == 0
    assert "did not rank the same users" in page_of(tmp_path / "c.html")[1]


def test_a_run_that_has_not_ended_is_shown_from_its_newest_checkpoint(tmp_path):
    run = run_folder(tmp_path / "run", 0.5)
    for name in ("flr_run.json", "factors.json", "valid/ranks.parquet"):
        (run / name).unlink()
    (run / "checkpoint-4").mkdir()
    (run / "trainer_state.json").rename(run / "checkpoint-4" / "trainer_state.json")
    assert main(["report", str(run)]) == 0
    shown = page_of(run / "report.html")[1]
    assert "not finished" in shown
    assert "Training loss" in shown
    assert "Groups of users" not in shown


def test_an_overwritten_run_leaves_nothing_that_would_pass_for_the_new_one_s(tmp_path):
    run = run_folder(tmp_path / "run", 0.5)
    (run / "notes.txt").write_text("mine")
    begin(run, {}, None, overwrite=True)
    assert [path.name for path in run.rglob("*") if path.is_file()] == ["notes.txt"]


def test_what_is_refused(tmp_path, capsys):
    for words, message in (
        (["report"], "runs: expected one or two folders, got 0"),
        (["report", "a", "b", "c"], "runs: expected one or two folders, got 3"),
        (["report", str(tmp_path)], f"runs: expected a folder that flr sft or flr rl wrote, got {tmp_path}"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "trainer_state.json").write_text('{"log_history": 3}')
    assert main(["report", str(tmp_path)]) == 1
    assert "trainer_state.json: expected the log of a training, got int" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_there(monkeypatch, tmp_path, capsys):
    hide(monkeypatch, "matplotlib")
    run = run_folder(tmp_path / "run", 0.5)
    assert main(["report", str(run)]) == 0
    assert "pip install 'flr[plots]'" in " ".join(capsys.readouterr().err.split())
    text, shown = page_of(run / "report.html")
    assert "matplotlib is not installed" in shown
    assert "HR@10 0.5000" in shown
    assert "<img" not in text
