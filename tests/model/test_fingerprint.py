"""The digest of a saved model: of what is read with it, and of nothing that lies beside it."""

from __future__ import annotations

import pytest

from flr.model.fingerprint import model_fingerprint
from tests.helpers.models import build_recommender


def test_what_lies_beside_a_model_does_not_count(tmp_path):
    build_recommender("title").save_pretrained(tmp_path)
    before = model_fingerprint(tmp_path)
    for name in ("notes.txt", "factors.json", "metrics.json", "flr_run.json", "README.md", "report.html"):
        (tmp_path / name).write_text("{}")
    assert model_fingerprint(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "catalogue.parquet"])
def test_every_file_that_is_read_counts(tmp_path, name):
    build_recommender("title").save_pretrained(tmp_path)
    before = model_fingerprint(tmp_path)
    with (tmp_path / name).open("ab") as file:
        file.write(b" ")
    assert model_fingerprint(tmp_path) != before
