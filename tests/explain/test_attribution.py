"""Shapley values of factors: exact for few, by rotations for many."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flr.explain.attribution import coalitions, influence_shares


def shapley_by_orders(value, factors):
    total = np.zeros(factors)
    orders = list(itertools.permutations(range(factors)))
    for order in orders:
        before: frozenset[int] = frozenset()
        for k in order:
            total[k] += value(before | {k}) - value(before)
            before |= {k}
    return total / len(orders)


def as_sets(sets):
    return [frozenset(np.flatnonzero(row).tolist()) for row in sets]


@pytest.mark.parametrize("factors", [1, 2, 3, 4, 5])
def test_exact_weights_are_the_mean_over_all_orders(factors):
    sets, weights = coalitions(factors)
    rng = np.random.default_rng(factors)
    value = dict(zip(as_sets(sets), rng.normal(size=len(sets)), strict=True))
    assert len(value) == 2**factors
    values = np.array([value[s] for s in as_sets(sets)])
    np.testing.assert_allclose(weights @ values, shapley_by_orders(value.__getitem__, factors), atol=1e-12)


@pytest.mark.parametrize("factors", [7, 8, 16])
def test_rotations_are_exact_for_pairwise_games_and_always_add_up(factors):
    sets, weights = coalitions(factors)
    assert len(sets) == factors * (factors - 1) + 2
    assert not sets[0].any()
    assert sets[-1].all()
    rng = np.random.default_rng(0)
    alone, pairs = rng.normal(size=factors), np.triu(rng.normal(size=(factors, factors)), 1)
    values = sets @ alone + np.einsum("ai,ij,aj->a", sets, pairs, sets)
    np.testing.assert_allclose(weights @ values, alone + (pairs.sum(0) + pairs.sum(1)) / 2, atol=1e-12)
    values = rng.normal(size=len(sets))
    np.testing.assert_allclose((weights @ values).sum(), values[-1] - values[0], atol=1e-12)


def test_shares():
    shares = influence_shares(np.array([[1.0, -3.0], [0.0, 0.0], [1e-9, 0.0]]))
    np.testing.assert_allclose(shares, [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
