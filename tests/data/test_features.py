"""Features of items: the words of their texts, and co-occurrence."""

import numpy as np

from flr.data import Interactions
from flr.data.features import cooccurrence, reduced, text_tfidf


def test_cooccurrence_by_hand():
    train = Interactions(["u", "u", "v"], [[0, 1], [1, 2], [2]], [2, 3, 0])
    # u: 0 1 2 and 1 2 3 (the pair 1 2 counts once); v: 2 0
    matrix = cooccurrence(train, 4, decay=0.8, backward=0.5).toarray()
    expected = np.zeros((4, 4))
    for i, j, weight in [(0, 1, 1), (1, 2, 1), (0, 2, 0.8), (2, 3, 1), (1, 3, 0.8), (2, 0, 1)]:
        expected[i, j] += weight
        expected[j, i] += weight / 2
    np.testing.assert_allclose(matrix, expected)


def test_a_pair_of_a_user_counts_once_at_its_smallest_gap():
    train = Interactions(["u", "v"], [[0, 1, 0], [1]], [1, 0])
    matrix = cooccurrence(train, 2, decay=0.5, backward=0.0).toarray()
    np.testing.assert_allclose(matrix, [[0.5, 1], [2, 0.5]])  # u: 0 1, 1 0, 0 0 and 1 1 two apart; v: 1 0


def test_no_rows_and_no_words_give_zeros():
    assert cooccurrence(Interactions([], [], []), 3).nnz == 0
    assert not reduced(cooccurrence(Interactions([], [], []), 3), 2).any()
    assert reduced(text_tfidf(["", "?"]), 4).shape == (2, 4)
