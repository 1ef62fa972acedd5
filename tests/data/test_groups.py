"""Groups of items that occur together: planted interests, several shops in one catalogue, and where there are none."""

import numpy as np
import pytest

from flr.data import Interactions, interest_groups, planted_dataset


@pytest.mark.parametrize("interests", [2, 3, 4, 6])
def test_the_planted_interests_are_found(interests):
    right = 0
    for seed in range(10, 20):
        mixed = min(3, interests)
        dataset = planted_dataset(200, 1500, interests, interests_per_user=mixed, seed=seed)
        found = interest_groups(dataset.train, 200)
        planted = dataset.catalogue.attributes["interest"]
        pairs = {(int(a), int(b)) for a, b in zip(found.group, planted, strict=True)}
        right += found.count == interests and len(pairs) == interests  # the groups are the interests themselves
    assert right >= 8


def _shop(items, users, rng, first=0):
    """Rows of users whose tastes overlap: an item is drawn near the last one, on a ring."""
    rows = []
    for user in range(users):
        at = np.cumsum(rng.integers(-20, 21, 8)) + rng.integers(items)
        rows.append((f"{first}-{user}", (at[:-1] % items + first).tolist(), int(at[-1] % items) + first))
    return rows


def test_tastes_that_overlap_are_one_group_and_two_shops_are_two():
    rng = np.random.default_rng(0)
    one = _shop(300, 1500, rng)
    assert interest_groups(Interactions(*zip(*one, strict=True)), 300).count <= 1
    both = [*one, *_shop(150, 600, rng, first=300)]
    found = interest_groups(Interactions(*zip(*both, strict=True)), 450)
    assert found.count == 2
    assert found.covered > 0.9
    assert set(found.group[:300]) <= {0, -1}  # the larger one comes first
    assert set(found.group[300:]) <= {1, -1}


def test_where_pairs_are_rare_uncertain_ones_count():
    """Two shops of 2,000 items each, some three interactions an item: no pair is beyond chance among eight million."""
    rng = np.random.default_rng(2)
    rows = [*_shop(2000, 600, rng), *_shop(2000, 600, rng, first=2000)]
    train = Interactions(*zip(*rows, strict=True))
    assert interest_groups(train, 4000, false_pairs=0.5).count == 0
    found = interest_groups(train, 4000)
    assert found.count == 2
    assert {*found.group[:2000].tolist()} & {*found.group[2000:].tolist()} <= {-1}


def test_pairs_are_counted_by_user_and_chance_is_taken_off():
    """Items that everybody has occur together, and no more than independence says."""
    rng = np.random.default_rng(1)
    rows = [(f"u{n}", rng.permutation(12)[:6].tolist(), int(rng.integers(12))) for n in range(400)]
    assert interest_groups(Interactions(*zip(*rows, strict=True)), 12, false_pairs=0.01).pairs == 0
    again = [("one", [0, 1], 2)] * 50  # one user, whatever the number of rows
    assert interest_groups(Interactions(*zip(*again, strict=True)), 12).pairs == 0


def test_of_a_long_history_the_latest_items_count():
    rng = np.random.default_rng(3)
    rows = _shop(100, 400, rng)
    before = [(user, [*rng.permutation(100)[:13].tolist(), *history], target) for user, history, target in rows]
    longer = [(user, [*rng.permutation(100)[:50].tolist(), *history], target) for user, history, target in before]
    cut, whole = (interest_groups(Interactions(*zip(*some, strict=True)), 100) for some in (before, longer))
    assert cut.pairs == whole.pairs > 0
    assert np.array_equal(cut.group, whole.group)


def test_an_empty_log_has_no_groups_and_bad_arguments_are_named():
    empty = Interactions([], [], [])
    assert interest_groups(empty, 5).group.tolist() == [-1] * 5
    with pytest.raises(ValueError, match="false_pairs: expected more than 0, got 0"):
        interest_groups(empty, 5, false_pairs=0)
    with pytest.raises(ValueError, match="num_items: expected above the largest item index 3"):
        interest_groups(Interactions(["u"], [[1]], [3]), 2)
