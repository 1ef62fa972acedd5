"""What commands say and where: results on standard output, all else on standard error; one live line on a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from flr.cli import COMMANDS, main, voice
from flr.cli.compare import MODES
from flr.cli.quickstart import REINFORCED
from flr.evaluate import EvalResult
from tests.helpers.serving import save

DATA = ["--planted_items", "40", "--planted_users", "60"]
SFT = [
    "sft", *DATA, "--hidden_size", "16", "--intermediate_size", "16", "--num_attention_heads", "2", "--codec", "id",
    "--per_device_train_batch_size", "64", "--num_train_epochs", "2", "--use_cpu", "true",
]  # fmt: skip
RAW = ("'eval_", "'train_runtime'", "Writing model shards", "Loading weights", "it/s]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that ``flr sft`` trained, and what the command said, as a user sees it who pipes the results on."""
    folder = tmp_path_factory.mktemp("voice") / "model"
    code = "import sys; from flr.cli import main; sys.exit(main())"
    words = [*SFT, "--output_dir", str(folder)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return folder, done.stdout, done.stderr


def test_a_training_says_its_results_apart_from_its_course(run):
    folder, out, err = run
    assert out.startswith("Best valid NDCG@10: 0.")
    assert out.endswith(f"Saved in {folder}.\n")
    assert out.count("\n") == 1
    lines = err.splitlines()
    heads = next(place for place, line in enumerate(lines) if line.split()[:4] == ["epoch", "loss", "HR@10", "NDCG@10"])
    rows = [line.split() for line in lines[heads + 1 :]]
    assert [row[0] for row in rows] == ["1", "2"]
    assert " ".join(rows[0][6:]) == "best so far"
    state = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    told = [line for line in state if "eval_ndcg@10" in line][:2]
    assert [row[2:4] for row in rows] == [[f"{x['eval_hr@10']:.4f}", f"{x['eval_ndcg@10']:.4f}"] for x in told]
    assert not any(raw in out + err for raw in RAW)
    assert "\x1b" not in out + err


def test_generated_data_are_said_first(run):
    lines = run[2].splitlines()
    assert lines[0].startswith("Generated data, which show")
    assert lines[1].startswith("Data 'planted': 40 items; ")


def test_evaluate_into_a_pipe(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["evaluate", "--model", str(run[0]), *DATA, "--card", "false"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert {"metric", "HR@10", "NDCG@10", "MRR", "Coverage@10"} <= set(rows)
    assert len(rows["NDCG@10"].split()) == 7  # of three scorers, one line a metric however narrow the window is
    assert out.count("NDCG@10") == 1  # no two items share a title, so there is one table
    assert not set(out) & set("│┃━\x1b")
    assert "predictions over" not in err
    assert not any(raw in out + err for raw in RAW)


def test_quiet_and_json(run, capsys):
    words = ["recommend", "--model", str(run[0]), "--history", "item_1", "item_2", "--k", "3"]
    assert main([*words, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.startswith("item_")]) == 3
    assert err == ""
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["recommendations"][0]) == 3
    assert "After item_1 → item_2" in err
    assert main([*words, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["recommendations"][0]) == 3
    assert err == ""
    assert main([*words, "--quiet", "--verbose"]) == 1
    assert "quiet: expected no --verbose beside it, got both" in capsys.readouterr().err


def test_verbose_shows_what_the_libraries_say(tmp_path, capfd):
    words = [*SFT, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "a"), "--verbose"]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert "eval_ndcg@10" in err
    assert "Writing model shards" in err
    assert out.count("\n") == 1


def test_a_terminal_has_one_live_line(tmp_path, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=150, highlight=False)
    monkeypatch.setattr(voice, "_err", screen)
    drawn = []
    refresh = voice.Progress.get_renderables

    def spy(self):
        drawn.extend((task.description, task.total, task.fields["facts"]) for task in self.tasks)
        return refresh(self)

    monkeypatch.setattr(voice.Progress, "get_renderables", spy)
    move = voice.Progress.update
    monkeypatch.setattr(voice.Progress, "update", lambda self, *a, **k: (move(self, *a, **k), self.refresh()))
    assert main([*SFT, "--output_dir", str(tmp_path / "b")]) == 0
    stages = {stage for stage, _, _ in drawn}
    assert {"epoch 1 of 2", "epoch 2 of 2", "ranking valid"} <= stages
    assert any(facts.startswith("loss ") for _, _, facts in drawn)
    text = screen.file.getvalue()
    assert "steps/s" in text
    assert "best so far" in text


def test_titles_are_no_markup(capsys):
    table = voice.table("After Blue [import] → [/b] Emma", "item", "[/dim] jazz")
    table.add_row(*voice.plain("[bold]Kind of Blue[/bold] [Remastered]", ""))
    voice.result(table)
    told = capsys.readouterr().out
    for text in ("[bold]Kind of Blue[/bold] [Remastered]", "After Blue [import] → [/b] Emma", "[/dim] jazz"):
        assert text in told


def test_names_of_what_is_evaluated_are_no_markup(capsys):
    ranks = {level: np.array([1]) for level in ("item", "title")}
    found = EvalResult("runs [/v2]", ["u"], np.array([0]), ranks, np.array([[0]]), np.zeros((1, 1), np.float32), 1)
    voice.result(found.table())
    assert "runs [/v2]" in capsys.readouterr().out


def test_what_the_package_logs_is_a_warning_in_the_same_voice(capsys, monkeypatch):
    import logging
    import types

    def talk(argv):
        logging.getLogger("flr").warning("prompts have at most %d tokens", 7)
        return 0

    monkeypatch.setitem(sys.modules, "flr.cli.merge", types.SimpleNamespace(main=talk))
    assert main(["merge"]) == 0
    assert capsys.readouterr().err == "Warning: prompts have at most 7 tokens\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_through_the_voice(command):
    import importlib
    import inspect

    source = inspect.getsource(importlib.import_module(f"flr.cli.{command}"))
    assert re.search(r"\bprint\(", source) is None
    assert "Console(" not in source


@pytest.mark.parametrize("variant", ["anchor", "none"])
def test_explain_of_a_model_without_factors_says_so(tmp_path, capsys, monkeypatch, variant):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "plain", variant=variant)
    assert main(["explain", "--model", "plain", "--history", "item_1"]) == 1
    err = capsys.readouterr().err
    assert f"model: expected one with factors, got plain of the variant {variant}, which has none to explain" in err
    assert not (tmp_path / "explanation.html").exists()


@pytest.mark.parametrize(("given", "near"), [("lama", "llama"), ("qwen", "qwen2"), ("gtp2", "gpt2")])
def test_an_unknown_architecture_names_the_nearest(capsys, given, near, tmp_path):
    assert main([*SFT, "--architecture", given, "--output_dir", str(tmp_path)]) == 1
    assert f"got '{given}'; did you mean {near}?" in capsys.readouterr().err


def test_unknown_items_get_suggestions(run, capsys):
    for command in ("recommend", "explain"):
        assert main([command, "--model", str(run[0]), "--history", "itm_3"]) == 1
        assert "did you mean 'item_3'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_fits_one_screen(tmp_path, monkeypatch):
    """A terminal of 24 rows and 80 columns, whose last row is the prompt."""
    monkeypatch.chdir(tmp_path)
    screen = {"force_terminal": True, "width": 80, "height": 24, "highlight": False}
    for name in ("_out", "_err"):
        monkeypatch.setattr(voice, name, Console(file=io.StringIO(), **screen))
    notes = []
    monkeypatch.setattr(voice, "note", notes.append)
    assert main(["quickstart", "--quick", "true"]) == 0
    out = Text.from_ansi(voice._out.file.getvalue()).plain
    lines = [*notes, *out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 23
    assert not any(raw in out for raw in RAW)
    assert [line.split()[0] for line in lines[5:14]] == [*MODES, REINFORCED]
    assert any(line.startswith("Wrote quickstart/report.html") for line in lines)
    assert "8 of 8, offsets-mixture: epoch 1 of 1" in Text.from_ansi(voice._err.file.getvalue()).plain
