"""Metrics by user group."""

import tracemalloc

import numpy as np
import pytest

from flr.evaluate import EvalResult, by_trait


def result_of(ranks, lengths):
    size = len(ranks)
    ranks = np.asarray(ranks)
    return EvalResult(
        name="m",
        users=[str(i) for i in range(size)],
        targets=np.arange(size) % 7,
        ranks={"item": ranks, "title": ranks},
        items=np.zeros((size, 20), np.int64),
        scores=np.zeros((size, 20), np.float32),
        num_items=50,
        traits={"history_length": np.asarray(lengths)},
    )


def test_groups_part_the_rows_by_the_trait_and_equal_values_stay_together():
    lengths = np.array([1] * 40 + [2] * 5 + [3] * 15 + [9] * 20)
    ranks = np.where(lengths == 9, 1, 0)  # found in the longest histories alone
    groups = by_trait(result_of(ranks, lengths), "history_length")
    spans = [(group["low"], group["high"], group["rows"]) for group in groups]
    assert spans == [(1, 1, 40), (2, 3, 20), (9, 9, 20)]
    assert [group["metrics"]["hr@10"] for group in groups] == [(0, 0, 0), (0, 0, 0), (1, 1, 1)]


def test_intervals_are_those_of_the_group_s_own_users():
    rng = np.random.default_rng(0)
    ranks, lengths = rng.integers(0, 20, 400), rng.integers(1, 30, 400)
    whole = result_of(ranks, lengths)
    groups = by_trait(whole, "history_length", parts=2)
    assert sum(group["rows"] for group in groups) == 400
    mean = sum(group["rows"] * group["metrics"]["ndcg@10"][0] for group in groups) / 400
    assert mean == pytest.approx(whole.metrics["item"]["ndcg@10"])
    for group in groups:
        value, low, high = group["metrics"]["ndcg@10"]
        whole_low, whole_high = whole.intervals["item"]["ndcg@10"]
        assert low < value < high
        assert high - low > 1.15 * (whole_high - whole_low)  # half the users
    with pytest.raises(ValueError, match="trait: expected one of history_length, got 'age'"):
        by_trait(whole, "age")


def test_traits_are_saved(tmp_path):
    result_of([1, 0, 2], [4, 5, 6]).save(tmp_path)
    assert EvalResult.load(tmp_path).traits["history_length"].tolist() == [4, 5, 6]


def test_a_long_name_of_one_user_takes_no_room_in_the_others():
    result = result_of([1, 0, 2] * 100, [4, 5, 6] * 100)
    result.users[299] += "x" * 100_000
    tracemalloc.start()
    try:
        assert len(by_trait(result, "history_length")) == 3
        assert tracemalloc.get_traced_memory()[1] < 10e6, "an array of such texts has 120 MB"
    finally:
        tracemalloc.stop()
