"""Rankings on damaged histories."""

import numpy as np
import pytest

from flr.cli.robustness import KINDS
from flr.data import Interactions
from flr.data.perturb import PERTURBATIONS, perturb
from flr.evaluate import evaluate_scorer, robustness
from flr.evaluate.baselines import ItemKNN
from tests.helpers.catalogues import DATA

POPULARITY = np.bincount(DATA.train.targets, minlength=len(DATA.catalogue))


def test_measurements_are_those_of_the_evaluation_by_hand(tmp_path):
    knn = ItemKNN(DATA.train, len(DATA.catalogue))
    rankers = {"knn": lambda rows: evaluate_scorer(knn, rows, DATA.catalogue)}
    options = {"popularity": POPULARITY, "max_history": 10}
    found = robustness(rankers, DATA.test, kinds=["replace"], severities=[0.5, 1.0], **options)
    by_kind = {(row["kind"], row["severity"]): row for row in found}
    clean = evaluate_scorer(knn, DATA.test, DATA.catalogue).metrics["item"]["ndcg@10"]
    assert by_kind["clean", 0.0]["ndcg@10"][0] == pytest.approx(clean)
    histories = perturb(DATA.test.histories, "replace", 0.5, **options)
    damaged = Interactions(DATA.test.users, histories, DATA.test.targets)
    value = evaluate_scorer(knn, damaged, DATA.catalogue).metrics["item"]["ndcg@10"]
    row = by_kind["replace", 0.5]
    assert row["ndcg@10"][0] == pytest.approx(value)
    assert row["change"][0] == pytest.approx(value - clean)
    assert row["change"][1] <= row["change"][0] <= row["change"][2]
    assert by_kind["replace", 1.0]["change"][2] < 0  # nothing is left of the history


def test_cold_items_and_users_are_ranked_on_clean_rows():
    """An item with fewer than five training targets, a user with fewer than four items in the history."""
    knn, popularity = ItemKNN(DATA.train, len(DATA.catalogue)), (POPULARITY - 4).clip(0)
    rankers = {"knn": lambda rows: evaluate_scorer(knn, rows, DATA.catalogue)}
    found = robustness(rankers, DATA.test, kinds=[], severities=[], popularity=popularity, max_history=10)
    by_kind, counts, lengths = (
        {row["kind"]: row for row in found},
        popularity[DATA.test.targets],
        DATA.test.histories.lengths,
    )
    for kind, values, bound in (("cold items", counts, 5), ("cold users", lengths, 4)):
        assert bound in values
        rows = DATA.test.select(np.flatnonzero(values < bound))
        expected = evaluate_scorer(knn, rows, DATA.catalogue)
        assert by_kind[kind]["rows"] == len(rows)
        value = expected.metrics["item"]["ndcg@10"]
        assert by_kind[kind]["ndcg@10"] == pytest.approx([value, *expected.intervals["item"]["ndcg@10"]])


def test_the_command_has_the_kinds_that_there_are():
    assert KINDS == PERTURBATIONS
