"""Damage to histories: what each kind changes, how much, and that it is the same for everybody."""

import numpy as np
import pytest

from flr.data import CSR
from flr.data.perturb import PERTURBATIONS, perturb

POPULARITY = np.arange(300, dtype=float)
HISTORIES = CSR.from_rows([[*range(20, 30)]] * 400 + [[7], []])
OPTIONS = {"popularity": POPULARITY, "max_history": 8}


def rows_of(kind, severity, **options):
    out = perturb(HISTORIES, kind, severity, **{**OPTIONS, **options})
    return [out.row(place).tolist() for place in range(len(out.offsets) - 1)]


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_nothing_is_changed_at_severity_0_but_what_the_model_does_not_read(kind):
    assert rows_of(kind, 0.0) == [[*range(22, 30)]] * 400 + [[7], []]


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_draws_are_the_same_again_and_others_with_another_seed(kind):
    assert rows_of(kind, 0.5) == rows_of(kind, 0.5)
    assert (rows_of(kind, 0.5) == rows_of(kind, 0.5, seed=1)) == (kind == "truncate")


def test_drop_leaves_the_expected_share_in_order_and_never_nothing():
    rows = rows_of("drop", 0.4)
    assert np.mean([len(row) for row in rows[:400]]) == pytest.approx(8 * 0.6, abs=0.25)
    assert all(row == sorted(row) for row in rows)
    assert rows_of("drop", 1.0) == [[29]] * 400 + [[7], []]


def test_replace_changes_the_expected_share_in_place():
    rows = np.array(rows_of("replace", 0.3)[:400])
    changed = rows != np.arange(22, 30)
    assert changed.mean() == pytest.approx(0.3, abs=0.04)
    assert len(np.unique(rows[changed])) > 150
    assert rows.max() < 300


def test_shuffle_moves_a_share_and_keeps_the_items():
    rows = rows_of("shuffle", 0.5)[:400]
    assert all(sorted(row) == [*range(22, 30)] for row in rows)
    moved = [sum(a != b for a, b in zip(row, range(22, 30), strict=True)) for row in rows]
    assert max(moved) == 4
    assert np.mean(moved) == pytest.approx(3, abs=0.3)  # of 4 items exchanged at random one stays on average


def test_truncate_keeps_the_latest():
    assert rows_of("truncate", 0.5)[:1] == [[26, 27, 28, 29]]
    assert rows_of("truncate", 1.0) == [[29]] * 400 + [[7], []]


def test_poison_puts_popular_items_in():
    rows = rows_of("poison", 0.5)
    assert all(len(row) == 12 for row in rows[:400])
    assert all([i for i in row if i < 297] == [*range(22, 30)] for row in rows[:400])
    assert {i for row in rows for i in row if i >= 297} == {297, 298, 299}
    assert len({tuple(np.flatnonzero(np.array(row) >= 297)) for row in rows[:400]}) > 50


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="kind: expected one of drop"):
        rows_of("burn", 0.5)
    with pytest.raises(ValueError, match="severity"):
        rows_of("drop", 1.5)
