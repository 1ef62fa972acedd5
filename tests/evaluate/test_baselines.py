"""Popularity and item-kNN against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from flr.data import CSR, Catalogue, Interactions
from flr.evaluate import evaluate_scorer
from flr.evaluate.baselines import ItemKNN, Popularity
from flr.evaluate.metrics import group_ids


def toy_interactions(seed: int = 0, rows: int = 60, items: int = 12) -> Interactions:
    generator = np.random.default_rng(seed)
    histories = [generator.integers(0, items, generator.integers(0, 6)) for _ in range(rows)]
    return Interactions(
        [f"u{i}" for i in generator.integers(0, 20, rows)], CSR.from_rows(histories), generator.integers(0, items, rows)
    )


def test_popularity_ranks_by_training_targets():
    train, test = toy_interactions(0), toy_interactions(1)
    counts = [int((train.targets == i).sum()) for i in range(12)]
    expected = [sum(c >= counts[t] for c in counts) for t in test.targets]
    assert Popularity(train, 12).ranks(test, batch_size=7).tolist() == expected


@pytest.mark.parametrize(("decay", "backward"), [(0.7, 0.5), (0.8, 0.0), (1.0, 1.0)])
def test_item_knn_is_its_formula(decay, backward):
    train, test = toy_interactions(0), toy_interactions(1)
    seen = set()
    for row in train:
        sequence = [*row.history.tolist(), row.target]
        for a in range(len(sequence)):
            for b in range(a + 1, len(sequence)):
                seen.add((row.user, sequence[a], sequence[b], b - a))
    similarity = np.zeros((12, 12))
    for _, i, j, d in seen:
        similarity[i, j] += 1 / d
        similarity[j, i] += backward / d
    expected = np.zeros((len(test), 12))
    for n, row in enumerate(test):
        for age, item in enumerate(reversed(row.history.tolist())):
            expected[n] += decay**age * similarity[item]
    model = ItemKNN(train, 12, decay, backward)
    np.testing.assert_allclose(model.scores(test.histories), expected, atol=2e-6)
    assert (model.ranks(test, batch_size=9) >= 1).all()
    groups = group_ids([f"title {i // 2}" for i in range(12)])
    assert (model.ranks(test, groups) <= model.ranks(test)).all()


def test_baselines_refuse_a_catalogue_too_small():
    for kind in (Popularity, ItemKNN):
        with pytest.raises(ValueError, match="num_items"):
            kind(toy_interactions(), 5)
    with pytest.raises(ValueError, match="history_decay"):
        ItemKNN(toy_interactions(), 12, history_decay=0)


def test_batches_are_cut_so_that_scores_of_all_items_fit(monkeypatch):
    """The ranks are those of whole batches, and no more users are scored at a time than the bound says."""
    monkeypatch.setattr("flr.evaluate.metrics._MAX_SCORES", 40)  # three users of twelve items
    train, test = toy_interactions(0), toy_interactions(1)
    ranker = Popularity(train, 12)
    sizes, scores = [], ranker.scores

    def watched(histories):
        sizes.append(len(histories.offsets) - 1)
        return scores(histories)

    ranker.scores = watched
    cut = ranker.ranks(test)
    catalogue = Catalogue([str(i) for i in range(12)], [str(i) for i in range(12)])
    assert evaluate_scorer(ranker, test, catalogue).ranks["item"].tolist() == cut.tolist()
    assert set(sizes) == {3}
    monkeypatch.undo()
    assert Popularity(train, 12).ranks(test).tolist() == cut.tolist()
