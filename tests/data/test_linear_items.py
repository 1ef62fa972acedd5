"""The linear item-item model: its definition in NumPy, its table, what it refuses."""

import numpy as np
import pytest
import scipy.sparse as sp

from flr.data import CSR, Interactions, NeighbourTable, fit_linear, linear_items, planted_dataset

DATA = planted_dataset(num_items=40, num_users=120, seed=3)


def by_definition(train, size, fit_decay=0.9, backward=0.5, ridge=4.0):
    inputs, outputs = np.zeros((len(train), size)), np.zeros((len(train), size))
    for n in range(len(train)):
        history = train.histories.row(n)
        for age, item in enumerate(history[::-1]):
            inputs[n, item] += fit_decay**age
        outputs[n, train.targets[n]] = 1
    gram, forward = (1 + backward) * inputs.T @ inputs, inputs.T @ outputs
    gram += ridge * np.diag(gram).mean() * np.eye(size)
    return np.linalg.solve(gram, forward + backward * forward.T)


@pytest.mark.parametrize("options", [{}, {"backward": 0.0, "fit_decay": 0.5, "ridge": 0.1}, {"backward": 1.0}])
def test_the_table_is_the_solution(options, monkeypatch):
    monkeypatch.setattr(linear_items, "_ROWS", 17)  # products and solutions in parts
    monkeypatch.setattr(linear_items, "_ITEMS", 7)
    expected = by_definition(DATA.train, 40, **options)
    table = fit_linear(DATA.train, 40, top=None, **options)
    np.testing.assert_allclose(table.similarity.toarray(), expected, atol=2e-6)
    assert (expected < 0).any()
    assert table.history_decay == 0.8
    assert table.popularity.tolist() == np.bincount(DATA.train.targets, minlength=40).tolist()
    kept = fit_linear(DATA.train, 40, top=5, **options).similarity.toarray()
    for row, whole in zip(kept, expected, strict=True):
        largest = np.sort(np.abs(whole))[-5:]
        np.testing.assert_allclose(np.sort(np.abs(row[row != 0])), largest[largest > 1e-7], atol=2e-6)


def test_without_what_came_before_it_is_ridge_regression():
    """The gradient of |X M - Y|² + λ |M|² is 0 there, and M is no such point for another λ."""
    inputs = np.zeros((len(DATA.train), 40))
    for n in range(len(DATA.train)):
        np.add.at(inputs[n], DATA.train.histories.row(n)[::-1], 0.9 ** np.arange(len(DATA.train.histories.row(n))))
    outputs = np.eye(40)[DATA.train.targets]
    matrix = fit_linear(DATA.train, 40, backward=0.0, top=None).similarity.toarray()
    level = 4.0 * (inputs**2).sum(0).mean()
    gradient = inputs.T @ (inputs @ matrix - outputs)
    np.testing.assert_allclose(gradient + level * matrix, 0, atol=1e-3)
    assert np.abs(gradient + 2 * level * matrix).max() > 0.1


def test_probabilities_leave_negative_scores_out_and_fall_back_to_popularity(tmp_path):
    table = fit_linear(DATA.train, 40)
    histories = CSR.from_rows([[1], [2, 7], []])
    scores, shares = table.scores(histories), table.probabilities(histories)
    assert (scores < 0).any()
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares[:2], np.maximum(scores, 0)[:2] / np.maximum(scores, 0)[:2].sum(1, keepdims=True))
    np.testing.assert_allclose(shares[2], table.popularity / table.popularity.sum())
    table.similarity = sp.csr_matrix(np.full((40, 40), -1.0))
    np.testing.assert_allclose(table.probabilities(histories)[0], table.popularity / table.popularity.sum())


def test_a_file_keeps_negative_weights_and_the_older_form_refuses_them(tmp_path):
    table = fit_linear(DATA.train, 40)
    table.save(tmp_path / "table.safetensors")
    loaded = NeighbourTable.load(tmp_path / "table.safetensors", 40)
    np.testing.assert_array_equal(loaded.similarity.toarray(), table.similarity.toarray())
    data = (tmp_path / "table.safetensors").read_bytes()
    (tmp_path / "old.safetensors").write_bytes(data.replace(b"flr-item-knn-2", b"flr-item-knn-1"))
    with pytest.raises(ValueError, match=r"old\.safetensors: expected rows"):
        NeighbourTable.load(tmp_path / "old.safetensors", 40)


def test_no_rows_and_no_histories():
    assert fit_linear(Interactions([], [], []), 3).similarity.nnz == 0
    assert fit_linear(Interactions(["u"], [[]], [1]), 3).similarity.nnz == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_items", 39),
        ("num_items", 25_001),
        ("history_decay", 0.0),
        ("fit_decay", 1.5),
        ("backward", -1.0),
        ("backward", float("nan")),
        ("ridge", 0.0),
        ("top", 0),
    ],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        fit_linear(DATA.train, **{"num_items": 40, name: value})
