"""The table of item-kNN: what it counts, what it keeps, and its file."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flr.data import CSR, Interactions, NeighbourTable, item_knn
from flr.data.pairs import item_pairs

TRAIN = Interactions(
    ["u", "u", "v", "v", "w"],
    [[0], [0, 1], [3], [3, 1], [1, 1, 4]],
    [1, 2, 1, 2, 0],
)


def by_hand(backward):
    """A_ij + backward · A_ji, each (user, i, j, distance) once."""
    seen = {}
    for user, history, target in zip(TRAIN.users, [[0], [0, 1], [3], [3, 1], [1, 1, 4]], TRAIN.targets, strict=True):
        row = [*history, int(target)]
        for i in range(len(row)):
            for j in range(i + 1, len(row)):
                seen[user, row[i], row[j], j - i] = 1 / (j - i)
    matrix = np.zeros((5, 5))
    for (_, i, j, _), value in seen.items():
        matrix[i, j] += value
    return matrix + backward * matrix.T


def test_counts_are_those_by_hand_and_top_keeps_the_largest():
    whole = by_hand(0.5)
    np.testing.assert_allclose(NeighbourTable.fit(TRAIN, 5).similarity.toarray(), whole)
    kept = NeighbourTable.fit(TRAIN, 5, top=2).similarity.toarray()
    for row, full in zip(kept, whole, strict=True):
        order = np.argsort(-full, kind="stable")[:2]
        expected = np.zeros(5)
        expected[order] = full[order]
        np.testing.assert_allclose(row, expected)
    assert (np.count_nonzero(whole, axis=1) > 2).any()


def test_probabilities_are_scores_over_their_sum_and_popularity_where_nothing_is_known():
    table = NeighbourTable.fit(TRAIN, 6)
    histories = CSR.from_rows([[0, 1], [5], []])
    probabilities, scores = table.probabilities(histories), table.scores(histories)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_allclose(probabilities[0], scores[0] / scores[0].sum())
    np.testing.assert_allclose(probabilities[1:], np.tile(table.popularity / table.popularity.sum(), (2, 1)))
    empty = NeighbourTable.fit(Interactions([], [], []), 3)
    with pytest.raises(ValueError, match="expected training rows"):
        empty.probabilities(CSR.from_rows([[0]]))


def test_a_fit_in_small_parts_is_the_same_table_and_holds_few_pairs(monkeypatch):
    """Ranges of items and blocks of users: bit for bit what one pass over everything gives."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 8, 400)
    histories = CSR.from_rows([rng.zipf(1.5, n).clip(1, 60) - 1 for n in lengths])
    train = Interactions(rng.integers(0, 90, 400).astype(str).tolist(), histories, rng.integers(0, 60, 400))
    whole = [NeighbourTable.fit(train, 61, backward=backward, top=top) for backward, top in ((0.5, None), (0.0, 3))]
    held = []

    class Counts(item_knn._Counts):
        def merged(self):
            found = super().merged()
            held.append(len(found[0]))
            return found

    monkeypatch.setattr(item_knn, "_Counts", Counts)
    monkeypatch.setattr(item_knn, "_BLOCK", 100)
    monkeypatch.setattr(item_knn, "_PAIRS", 200)
    for table, (backward, top) in zip(whole, ((0.5, None), (0.0, 3)), strict=True):
        held.clear()
        parts = NeighbourTable.fit(train, 61, backward=backward, top=top)
        assert len(held) > 10
        for name in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(parts.similarity, name), getattr(table.similarity, name))
    ranges = list(item_knn._ranges(train, 61))
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == 61
    pairs = {first: 0 for first, _ in ranges}
    for found in item_pairs(train):
        for items in (found.earlier, found.later):
            for first, last in ranges:
                pairs[first] += int(((items >= first) & (items < last)).sum())
    assert all(pairs[first] <= 200 or last == first + 1 for first, last in ranges)


def test_a_table_of_a_grown_catalogue_says_the_same_of_known_items():
    table = NeighbourTable.fit(TRAIN, 5, history_decay=0.3)
    histories = CSR.from_rows([[0, 1], [4, 3, 1]])
    scores = table.padded(7).scores(histories)
    np.testing.assert_allclose(scores[:, :5], table.scores(histories))
    assert not scores[:, 5:].any()


@pytest.mark.parametrize("options", [{"history_decay": 0.0}, {"backward": -1.0}, {"top": 0}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NeighbourTable.fit(TRAIN, 5, **options)


def test_a_file_gives_the_same_table(tmp_path):
    table = NeighbourTable.fit(TRAIN, 5, history_decay=0.7)
    table.save(tmp_path / "knn.safetensors")
    first = (tmp_path / "knn.safetensors").read_bytes()
    loaded = NeighbourTable.load(tmp_path / "knn.safetensors", 5)
    histories = CSR.from_rows([[0, 1], [4]])
    np.testing.assert_allclose(loaded.scores(histories), table.scores(histories), rtol=1e-6)
    loaded.save(tmp_path / "knn.safetensors")
    assert (tmp_path / "knn.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("items", torch.tensor([7] * 20, dtype=torch.int32)),
        ("weights", torch.full((20,), float("nan"))),
        ("popularity", torch.tensor([-1.0] * 5)),
        ("offsets", torch.tensor([0, 5, 3, 5, 5, 20])),
        ("offsets", torch.tensor([0, 1])),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, value):
    file = tmp_path / "knn.safetensors"
    NeighbourTable.fit(TRAIN, 5).save(file)
    arrays = load_file(file)
    kept = len(arrays["items"])
    value = value[:kept] if name in ("items", "weights") else value
    if name == "offsets" and len(value) == 6:
        value[-1] = kept
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
    save_file({**arrays, name: value}, file, metadata=about)
    with pytest.raises(ValueError, match=r"knn\.safetensors: expected"):
        NeighbourTable.load(file, 5)


def test_another_file_another_catalogue_and_no_file(tmp_path):
    file = tmp_path / "knn.safetensors"
    with pytest.raises(ValueError, match=r"knn\.safetensors"):
        NeighbourTable.load(file, 5)
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"knn\.safetensors: expected a table of item-kNN"):
        NeighbourTable.load(file, 5)
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"knn\.safetensors: expected a table of item-kNN"):
        NeighbourTable.load(file, 5)
    NeighbourTable.fit(TRAIN, 5).save(file)
    with pytest.raises(ValueError, match="a table of 6 items"):
        NeighbourTable.load(file, 6)


def test_an_opened_table_keeps_its_matrix_in_the_file_and_scores_as_before(tmp_path):
    """float32 as it was saved: a copy in float64 would be every process's own."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50, (300, 6))
    train = Interactions(np.arange(300).astype(str).tolist(), rows[:, :5].tolist(), rows[:, 5])
    NeighbourTable.fit(train, 50).save(tmp_path / "knn.safetensors")
    table = NeighbourTable.load(tmp_path / "knn.safetensors", 50)
    assert table.similarity.data.dtype == np.float32
    assert not table.similarity.data.flags.owndata
    histories = CSR.from_rows([[3, 3, 7], [], [49, 0, 3, 20]])
    age = np.array([2, 1, 0, 3, 2, 1, 0])
    dense = table.similarity.toarray().astype(np.float64)
    wanted = np.zeros((3, 50))
    for row, item, weight in zip([0, 0, 0, 2, 2, 2, 2], histories.values, 0.6**age, strict=True):
        wanted[row] += weight * dense[item]
    wanted += 1e-6 / (1 + table.popularity.max()) * table.popularity
    np.testing.assert_allclose(table.scores(histories), wanted, rtol=1e-12)
