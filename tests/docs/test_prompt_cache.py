"""The figures of docs/training.md on kept prompts are those of docs/results, and the script measures what it says."""

import json
import shutil

from scripts import prompt_cache
from tests.helpers.models import tiny_model


def test_the_page_is_fresh():
    assert prompt_cache.main(["--check"]) == 0


def test_another_measurement_is_another_page(tmp_path, capsys):
    for name in (prompt_cache.PAGE, prompt_cache.RESULT):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(prompt_cache.ROOT / name, tmp_path / name)
    model = tiny_model(vocab_size=1000)
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--lengths", "7", "--repeats", "1"]
    assert prompt_cache.main([*arguments, "--check"], tmp_path) == 1
    assert "docs/training.md: expected what" in capsys.readouterr().err
    assert prompt_cache.main([], tmp_path) == 0
    rows = json.loads((tmp_path / prompt_cache.RESULT).read_text())["rows"]
    assert [(row["step"], row["prompt_tokens"]) for row in rows] == [("sft", 7), ("rl", 7)]
    assert rows[0]["bytes_per_token"] == 4 * (32 + 2 * 2 * 2 * 8)  # states; layers, keys and values, heads, size
    assert "| supervised | 7 |" in (tmp_path / prompt_cache.PAGE).read_text()
