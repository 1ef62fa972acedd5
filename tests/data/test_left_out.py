"""Scores as if a user had not been there: against tables that were fitted without each of them."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from flr.data import CSR, Interactions, NeighbourTable, left_out, planted_dataset
from flr.data.left_out import LeftOut

DATA = planted_dataset(num_items=40, num_users=60, seed=3)
DATA = replace(DATA, train=DATA.train.select(np.random.default_rng(0).permutation(len(DATA.train))))  # users mixed
SIZE = 40
USERS = list(dict.fromkeys(DATA.train.users))


def weights(histories, decay):
    found = np.zeros((len(histories.lengths), SIZE))
    row = np.repeat(np.arange(len(found)), histories.lengths)
    np.add.at(found, (row, histories.values), decay**histories.ages)
    return found


def solved(train, ridge):
    """M of these rows, at a given λ."""
    inputs, outputs = weights(train.histories, 0.9), np.eye(SIZE)[train.targets]
    forward = inputs.T @ outputs
    return np.linalg.solve(1.5 * inputs.T @ inputs + ridge * np.eye(SIZE), forward + 0.5 * forward.T)


def without(user):
    return DATA.train.select(np.flatnonzero(np.array(DATA.train.users) != user))


def of(user):
    return DATA.train.select(np.flatnonzero(np.array(DATA.train.users) == user))


def test_a_linear_model_is_exactly_that_without_the_user():
    found = LeftOut.linear(DATA.train, SIZE)
    ridge = 4 * 1.5 * (weights(DATA.train.histories, 0.9) ** 2).sum(0).mean()
    whole = solved(DATA.train, ridge)
    for user in USERS[:12]:
        rows = of(user)
        asked = weights(rows.histories, 0.8)
        expected = asked @ solved(without(user), ridge)
        scores = found.scores(rows.users, rows.histories).toarray()
        np.testing.assert_allclose(scores, expected, atol=2e-6)
        assert np.abs(scores - asked @ whole).max() > 1e-3  # which makes a difference


@pytest.mark.parametrize("seed", [0, 1])
def test_item_knn_is_exactly_that_without_the_user(seed):
    found = LeftOut.item_knn(DATA.train, SIZE)
    for user in np.random.default_rng(seed).permutation(USERS)[:6]:
        rows = of(user)
        table = NeighbourTable.fit(without(user), SIZE)
        expected = weights(rows.histories, table.history_decay) @ table.similarity.toarray()
        np.testing.assert_allclose(found.scores(rows.users, rows.histories).toarray(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "item_knn"])
def test_histories_with_items_of_others_and_strangers(kind, monkeypatch):
    """Whatever is asked, in whatever order, with whatever is kept."""
    monkeypatch.setattr(left_out, "_CELLS", 500)  # two users' parts or three
    found = getattr(LeftOut, kind)(DATA.train, SIZE)
    fresh = getattr(LeftOut, kind)(DATA.train, SIZE)
    generator = np.random.default_rng(0)
    users = [*generator.choice(USERS[:5], 30), "nobody"]
    rows = [generator.integers(0, SIZE, n % 7) for n in range(31)]
    together = found.scores(users, CSR.from_rows(rows)).toarray()
    assert found._cells == sum(len(part.items) ** 2 for part in found._kept.values()) <= 500
    assert 1 < len(found._kept) < 5
    for n, (user, row) in reversed(list(enumerate(zip(users, rows, strict=True)))):
        np.testing.assert_array_equal(fresh.scores([user], CSR.from_rows([row])).toarray()[0], together[n])
    table = found.table
    whole = weights(CSR.from_rows(rows[-1:]), table.history_decay) @ table.similarity.toarray()
    np.testing.assert_allclose(together[-1], whole[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "item_knn"])
def test_workers_that_get_it_pickled_answer_the_same(kind):
    found = getattr(LeftOut, kind)(DATA.train, SIZE)
    rows = DATA.train.select(np.arange(20))
    before = found.scores(rows.users, rows.histories).toarray()
    after = pickle.loads(pickle.dumps(found)).scores(rows.users, rows.histories).toarray()
    np.testing.assert_array_equal(before, after)


def test_nobody_and_nothing():
    found = LeftOut.item_knn(Interactions([], [], []), 3)
    assert found.scores(["ann"], CSR.from_rows([[1]])).toarray().tolist() == [[0, 0, 0]]
    assert found.scores([], CSR.from_rows([])).shape == (0, 3)
    assert LeftOut.linear(DATA.train, SIZE).scores(USERS[:1], CSR.from_rows([[]])).nnz == 0
