"""``flr factors``: tables, files, and a pruned model that other commands take."""

import json

import pytest
import torch

import flr
from flr.cli import main

DATA = ["--planted_items", "40", "--planted_users", "60"]
TRAINING = [
    "--use_cpu",
    "true",
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
    "--max_steps",
    "2",
    "--anchor",
    "last",
]
SHAPE = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        argv = ["sft", *DATA, *TRAINING, *SHAPE, "--num_factors", "3", "--seed", str(ord(name))]
        assert main([*argv, "--output_dir", str(root / name)]) == 0
    return root


def test_it_measures_compares_prunes_and_training_goes_on(runs, tmp_path, capsys):
    models, pruned = f"{runs / 'a'},{runs / 'b'}", tmp_path / "pruned"
    argv = ["factors", *DATA, "--models", models, "--kinds", "interest", "--max_users", "20"]
    assert main([*argv, "--prune", str(pruned), "--keep", "2", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "How alike" in shown
    assert f"Wrote {pruned}: 2 factors" in shown.replace("\n", " ")
    saved = json.loads((tmp_path / "out" / "factors_needed.json").read_text())
    assert saved["kinds"] == ["0", "1", "2", "3"]
    assert len(saved["without"]) == len(saved["path"]) == 3
    assert saved["stability"][0][0] == 1
    assert (tmp_path / "out" / "factors_needed.png").stat().st_size > 5000
    whole, fewer = (flr.from_pretrained(folder) for folder in (runs / "a", pruned))
    assert torch.equal(fewer.flr.key, whole.flr.key[saved["path"][1][0]])
    assert flr.from_pretrained(pruned).config.flr["num_factors"] == 2
    more = ["sft", *DATA, *TRAINING, "--model", str(pruned), "--output_dir", str(tmp_path / "more")]
    assert main(more) == 0
    assert flr.from_pretrained(tmp_path / "more").config.flr["num_factors"] == 2
    assert main([*argv, "--prune", str(pruned)]) == 1
    assert "prune: expected a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "colour"], "kinds: expected one of sid, interest, series, volume, successor, got 'colour'"),
        (["--keep", "1"], "keep: expected --prune FOLDER beside it, got 1 alone"),
        (["--split", "all"], "split: expected train, valid or test, got 'all'"),
        (["--max_users", "0"], "max_users: expected None or an integer >= 1, got 0"),
    ],
)
def test_mistakes(runs, capsys, options, message):
    assert main(["factors", *DATA, "--models", str(runs / "a"), *options]) != 0
    assert message in capsys.readouterr().err
