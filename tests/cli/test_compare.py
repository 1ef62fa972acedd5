"""``flr compare``: what a folder holds is given again for the same split, rows and model alone."""

import json
from pathlib import Path

import pytest

from flr.cli import main
from flr.cli.backbone import ModelOptions
from flr.cli.compare import contents
from flr.data import planted_dataset
from flr.train import SFTTrainer

TRAINING = [
    "--modes", "none", "--seeds", "1", "--hidden_size", "16", "--intermediate_size", "16", "--max_steps", "2",
    "--use_cpu", "true", "--report_to", "none",
]  # fmt: skip


def _compare(folder: Path, *words: str) -> dict:
    assert main(["compare", *TRAINING, "--output_dir", str(folder), *words]) == 0
    return json.loads((folder / "compare.json").read_text())


@pytest.mark.parametrize("splits", [("test", "valid"), ("valid", "test")])
def test_every_split_has_its_own_figures_of_one_run(splits, tmp_path, monkeypatch):
    generated = ["--planted_items", "40", "--planted_users", "60"]
    found = {splits[0]: _compare(tmp_path, *generated, "--split", splits[0])}
    monkeypatch.setattr(SFTTrainer, "train", lambda self: pytest.fail("trained again"))
    found[splits[1]] = _compare(tmp_path, *generated, "--split", splits[1])
    for split, outcome in found.items():
        saved = json.loads((tmp_path / "none-0" / split / "metrics.json").read_text())
        row = outcome["rows"][0]
        assert (outcome["split"], row["metrics"]) == (split, saved["metrics"]["item"])
        assert row["intervals"]["mrr"] == saved["intervals"]["item"]["mrr"]
        assert _compare(tmp_path, *generated, "--split", split) == outcome, "read again, seconds included"
    assert found["test"]["rows"][0]["metrics"] != found["valid"]["rows"][0]["metrics"]


def test_other_rows_in_the_same_folder_are_another_run(tmp_path, capsys):
    log, data = tmp_path / "log.csv", tmp_path / "data"

    def prepared(step: int) -> list[str]:
        lines = [f"u{user},i{(user + time * step) % 12},{9 * user + time}" for user in range(40) for time in range(8)]
        log.write_text("\n".join(["user_id,item_id,timestamp", *lines]))
        assert main(["prepare", "csv", "--source", str(log), "--output", str(data)]) == 0
        return ["--data", str(data)]

    _compare(tmp_path / "out", *prepared(1))
    words = ["compare", *TRAINING, "--output_dir", str(tmp_path / "out"), *prepared(5)]
    capsys.readouterr()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "output_dir: expected a folder without a run of other settings" in error
    assert "data.train was" in error


def test_other_weights_in_the_folder_of_the_model_are_another_start(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    dataset, options = planted_dataset(num_items=40, num_users=60), ModelOptions(model=str(tmp_path))
    found = []
    for weights in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        found.append(contents(options, dataset))
    assert found[0].pop("model.files") != found[1].pop("model.files")
    assert found[0] == found[1] == contents(ModelOptions(), dataset)
