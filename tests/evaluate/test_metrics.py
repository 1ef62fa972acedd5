"""Metrics against definitions written out row by row; bootstrap against closed forms; baselines against loops."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.evaluate.metrics import (
    bootstrap_intervals,
    coverage,
    group_ids,
    paired_difference,
    rank_metrics,
    ranks_from_lists,
    ranks_from_scores,
    row_metrics,
    top_items,
)

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


def slow_rank(scores: list[float], target: int, titles: list[str] | None) -> int:
    """Sort so that every tie stands before the target; the first entry that counts as the target gives the rank."""
    if titles is None:
        titles = [str(i) for i in range(len(scores))]
    best: dict[str, float] = {}
    for title, score in zip(titles, scores, strict=True):
        best[title] = max(best.get(title, -math.inf), score)
    own = titles[target]
    if best[own] == -math.inf:
        return 0
    order = sorted(best, key=lambda t: (-best[t], t == own))
    return order.index(own) + 1


LEVELS = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5])


@QUICK
@given(st.data())
def test_ranks_from_scores_and_lists(data):
    count = data.draw(st.integers(1, 8))
    titles = data.draw(st.lists(st.sampled_from("abcd"), min_size=count, max_size=count))
    rows = data.draw(st.lists(st.lists(LEVELS, min_size=count, max_size=count), min_size=1, max_size=4))
    targets = [data.draw(st.integers(0, count - 1)) for _ in rows]
    scores, groups = torch.tensor(rows), group_ids(titles)
    by_item = ranks_from_scores(scores, torch.tensor(targets))
    by_title = ranks_from_scores(scores, torch.tensor(targets), torch.from_numpy(groups))
    assert by_item.tolist() == [slow_rank(r, t, None) for r, t in zip(rows, targets, strict=True)]
    assert by_title.tolist() == [slow_rank(r, t, titles) for r, t in zip(rows, targets, strict=True)]

    # a list of everything that may be given ranks as the scores do
    order = np.argsort(-np.array(rows), axis=1, kind="stable")
    listed = np.take_along_axis(np.array(rows), order, 1)
    items = np.where(listed == -math.inf, -1, order)
    assert ranks_from_lists(items, listed, np.array(targets)).tolist() == by_item.tolist()
    assert ranks_from_lists(items, listed, np.array(targets), groups).tolist() == by_title.tolist()

    # a shorter list ranks the same or says that the target is not there
    k = data.draw(st.integers(0, count))
    for level, full in ((None, by_item), (groups, by_title)):
        short = ranks_from_lists(items[:, :k], listed[:, :k], np.array(targets), level)
        for row, (a, b) in enumerate(zip(short.tolist(), full.tolist(), strict=True)):
            label = np.arange(count) if level is None else level
            inside = any(i >= 0 and label[i] == label[targets[row]] for i in items[row, :k])
            assert (a > 0) == inside
            assert a <= b


@QUICK
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_metrics_are_their_definition(ranks):
    found = rank_metrics(np.array(ranks))
    n = len(ranks)
    for k in (1, 5, 10, 20):
        assert found[f"hr@{k}"] == pytest.approx(sum(1 <= r <= k for r in ranks) / n)
    for k in (5, 10, 20):
        assert found[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in ranks if 1 <= r <= k) / n)
    assert found["mrr"] == pytest.approx(sum(1 / r for r in ranks if r) / n)
    assert set(found) == {"hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr"}


def test_ties_and_the_missing_count_against():
    scores = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [-torch.inf, 1.0, 0.0]])
    assert ranks_from_scores(scores, torch.tensor([0, 0, 0])).tolist() == [3, 1, 0]
    same_title = torch.from_numpy(group_ids(["x", "x", "y"]))
    assert ranks_from_scores(scores, torch.tensor([0, 0, 0]), same_title).tolist() == [2, 1, 1]
    assert rank_metrics(np.array([0]))["mrr"] == 0


def test_coverage_counts_items_of_the_first_ten():
    lists = np.array([[*range(10), 50], [*range(5), 20, 21, -1, -1, -1, -1]])
    assert coverage(lists, 100) == 12 / 100
    assert coverage(np.full((3, 5), -1), 7) == 0


def test_the_first_of_equal_items_are_taken():
    scores = torch.tensor(list(itertools.product([-math.inf, 0.0, 1.0], repeat=5)))
    for k in range(1, 7):
        best, items = top_items(scores, k)
        for row, values, found in zip(scores.tolist(), best.tolist(), items.tolist(), strict=True):
            order = sorted(range(5), key=lambda item, row=row: (-row[item], item))[:k]
            assert values == [row[item] for item in order]
            given = [item for item in order if row[item] > -math.inf]
            assert found[: len(given)] == given


def test_refuses():
    with pytest.raises(ValueError, match="NaN"):
        ranks_from_scores(torch.tensor([[float("nan")]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="scores: expected"):
        ranks_from_scores(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups: expected"):
        ranks_from_scores(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one row"):
        rank_metrics(np.zeros(0, dtype=np.int64))
    with pytest.raises(ValueError, match="ranks: expected"):
        row_metrics(np.array([-1]))
    with pytest.raises(ValueError, match="clusters"):
        bootstrap_intervals({"x": np.ones(3)}, ["a"])
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(np.ones(3), np.ones(4))


def test_bootstrap_intervals():
    generator = np.random.default_rng(0)
    values = (generator.random(4000) < 0.1).astype(float)
    interval = bootstrap_intervals({"x": values}, seed=1)["x"]
    half = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / len(values))  # normal approximation
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_intervals({"x": values}, seed=1)["x"] == interval
    assert bootstrap_intervals({"x": values}, seed=2)["x"] != interval
    # every row four times: drawing rows makes the interval half as wide, drawing users does not
    users = [f"u{i}" for i in range(4000)] * 4
    rows = bootstrap_intervals({"x": np.tile(values, 4)})["x"]
    clustered = bootstrap_intervals({"x": np.tile(values, 4)}, users)["x"]
    assert (rows.high - rows.low) == pytest.approx(half, rel=0.15)
    assert (clustered.high - clustered.low) == pytest.approx(2 * half, rel=0.15)


def test_paired_difference_sees_what_two_intervals_do_not():
    generator = np.random.default_rng(0)
    a = (generator.random(3000) < 0.10).astype(float)
    b = np.maximum(a, generator.random(3000) < 0.01)
    x, y = bootstrap_intervals({"x": a})["x"], bootstrap_intervals({"x": b})["x"]
    difference = paired_difference(a, b)
    assert y.low < x.high, "the intervals overlap"
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.p_value < 0.01
    nothing = paired_difference(a, a)
    assert (nothing.mean, nothing.low, nothing.high, nothing.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_are_those_of_users_drawn_again_with_all_their_rows(level):
    """The draws of numpy's generator, each resampling written out; a user's rows count as many times as the user."""
    generator = np.random.default_rng(5)
    a, b = generator.random(12), generator.random(12) + 0.1
    rows = [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9], [10, 11]]
    users = [f"u{user}" for user, own in enumerate(rows) for _ in own]
    drawn = np.random.default_rng(4).integers(0, 4, (301, 4))
    means = {
        name: np.array([np.concatenate([x[rows[user]] for user in draw]).mean() for draw in drawn])
        for name, x in (("a", a), ("a - b", a - b), ("b - a", b - a))
    }
    options = {"samples": 301, "level": level, "seed": 4}

    def bounds(name):
        return pytest.approx(np.quantile(means[name], [(1 - level) / 2, (1 + level) / 2]))

    assert bootstrap_intervals({"a": a, "b": b}, users, **options)["a"] == bounds("a")
    for name, found in (
        ("b - a", paired_difference(a, b, users, **options)),
        ("a - b", paired_difference(b, a, users, **options)),
    ):
        tail = min((means[name] <= 0).sum(), (means[name] >= 0).sum())
        assert 0 < tail < 150
        assert (found.low, found.high) == bounds(name)
        assert found.p_value == pytest.approx(2 * (tail + 1) / 302)
        assert found.mean == pytest.approx((b - a).mean() * (1 if name == "b - a" else -1))


def test_resamplings_made_in_blocks_are_all_different(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_intervals({"x": values}, samples=300, seed=2)["x"]
    monkeypatch.setattr("flr.evaluate.metrics._RESAMPLED_CELLS", 50)
    assert bootstrap_intervals({"x": values}, samples=300, seed=2)["x"] == pytest.approx(whole, rel=1e-12)


def test_a_long_name_of_one_user_takes_no_room_in_the_others():
    """Intervals depend on the order of names alone, and texts are never an array as wide as the longest."""
    values, users = np.random.default_rng(0).random(300), [f"u{n % 100:02d}" for n in range(300)]
    short = bootstrap_intervals({"x": values}, users)
    long = [f"{user}{'x' * 100_000}" if user == "u07" else user for user in users]
    tracemalloc.start()
    try:
        assert bootstrap_intervals({"x": values}, long, samples=1000) == short
        assert tracemalloc.get_traced_memory()[1] < 10e6, "an array of such texts has 120 MB"
    finally:
        tracemalloc.stop()
