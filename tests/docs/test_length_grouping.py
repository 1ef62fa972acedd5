"""The tables of docs/training.md are those of docs/results, and padding is counted there as in training."""

import json

import numpy as np
import pytest

from scripts import length_grouping
from tests.helpers.models import trainable
from tests.helpers.training import sft_trainer


def test_the_page_is_fresh():
    assert length_grouping.main(["tables", "--check"]) == 0


def test_other_figures_are_found(tmp_path, capsys):
    for name in (length_grouping.PAGE, length_grouping.RESULTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((length_grouping.ROOT / name).read_bytes())
    result = json.loads((tmp_path / length_grouping.RESULTS).read_text())
    result["speed"][0]["speedup"] = 77
    (tmp_path / length_grouping.RESULTS).write_text(json.dumps(result))
    assert length_grouping.main(["tables", "--check"], tmp_path) == 1
    assert "docs/training.md: expected what" in capsys.readouterr().err
    assert length_grouping.main(["tables"], tmp_path) == 0
    assert "| 77.00 |" in (tmp_path / length_grouping.PAGE).read_text()


def test_padding_is_that_of_a_training(tmp_path):
    train = sft_trainer(tmp_path, *trainable("title"), logging_strategy="no")
    order = np.array([row for _, row in train._get_train_sampler()])
    assert length_grouping.padding(train, order) == pytest.approx(train.train().metrics["padding"], abs=1e-4)
