"""Augmentation: a pure function of (seed, epoch, row)."""

import itertools

import numpy as np
import pytest

from flr.data import CATALOGUE_USER, Augment, Interaction, Neighbours
from flr.data.augment import row_keys
from tests.helpers.catalogues import DATA

EVERYTHING = Augment(reverse=0.4, prefix=0.3, suffix=0.3, drop_item=0.3, shuffle=0.7)


def one(history, target=99, row=0, epoch=0) -> Interaction:
    return Interaction("u", np.array(history, np.int32), target, row=row, epoch=epoch)


def many(count=2000, length=8):
    return [one(range(length), row=row) for row in range(count)]


def test_off_by_default():
    histories, targets = Augment()([one([3, 1, 2]), one([])])
    assert histories.values.tolist() == [3, 1, 2]
    assert targets.tolist() == [99, 99]
    assert not Augment().enabled


def test_drop_item_rate_and_order():
    histories, _ = Augment(drop_item=0.25)(many())
    assert abs(len(histories.values) / 16000 - 0.75) < 0.02
    for row in range(50):
        kept = histories.row(row).tolist()
        assert kept == sorted(kept)
    histories, _ = Augment(drop_item=1.0)([one([5, 6, 7]), one([]), one([4])])
    assert [histories.row(row).tolist() for row in range(3)] == [[7], [], [4]]


def test_suffix_keeps_the_latest():
    histories, targets = Augment(suffix=1.0)(many())
    lengths = histories.lengths
    assert set(lengths.tolist()) == set(range(1, 9))
    assert abs(lengths.mean() - 4.5) < 0.2
    assert all(histories.row(row)[-1] == 7 for row in range(2000))
    assert set(targets.tolist()) == {99}


def test_reverse_reads_a_row_backwards():
    catalogue = one([3], row=1)._replace(user=CATALOGUE_USER)
    histories, targets = Augment(reverse=1.0)([*many(), one([5], target=6), one([], target=4), catalogue])
    for row in range(2000):
        assert histories.row(row).tolist() == [99, *range(7, int(targets[row]), -1)]
    assert np.abs(np.bincount(targets[:2000]) / 2000 - 1 / 8).max() < 0.03
    assert [histories.row(row).tolist() for row in range(2000, 2003)] == [[6], [], [3]]
    assert targets[2000:].tolist() == [5, 4, 99]
    histories, targets = Augment(reverse=0.25)(many())
    assert abs((targets != 99).mean() - 0.25) < 0.03
    for row in np.flatnonzero(targets == 99).tolist():
        assert histories.row(row).tolist() == list(range(8))


def test_prefix_moves_the_target():
    histories, targets = Augment(prefix=1.0)([*many(), one([5])])
    assert set(histories.lengths[:-1].tolist()) == set(range(1, 8))
    for row in range(2000):
        assert histories.row(row).tolist() == list(range(int(targets[row])))
    assert histories.row(2000).tolist() == [5]
    assert targets[2000] == 99


def test_shuffle_is_local():
    histories, _ = Augment(shuffle=1.0, shuffle_window=3)(many())
    moved = 0
    for row in range(2000):
        items = histories.row(row).tolist()
        assert sorted(items) == list(range(8))
        for (i, a), (j, b) in itertools.combinations(enumerate(items), 2):
            assert i < j
            assert a - b < 3  # items three or more apart keep their order
        moved += items != list(range(8))
    assert moved > 1500
    some, _ = Augment(shuffle=0.2)(many())
    assert (some.values[some.offsets[:-1]] != 0).any()  # which rows are shuffled says nothing of where items go
    still, _ = Augment(shuffle=0.0001)(many(100))
    assert still.row(0).tolist() == list(range(8))


def test_random_numbers_depend_on_seed_epoch_and_row_only():
    base, targets = EVERYTHING(many(64), seed=1)
    for row in range(64):
        alone, target = EVERYTHING([many(64)[row]], seed=1)
        assert alone.values.tolist() == base.row(row).tolist()
        assert target[0] == targets[row]
    for other in (EVERYTHING(many(64), seed=2), EVERYTHING([one(range(8), row=r, epoch=1) for r in range(64)], seed=1)):
        assert other[0].values.tolist() != base.values.tolist()


def test_each_change_has_random_numbers_of_its_own():
    def together(one, other):
        return abs((one & other).mean() - one.mean() * other.mean())

    histories, targets = Augment(prefix=0.5, suffix=0.5)(many(length=20))
    assert together(targets != 99, histories.values[histories.offsets[:-1]] != 0) < 0.03
    drops = Augment(drop_item=0.5)(many())[0]
    last = np.array([7 in drops.row(row) for row in range(2000)])
    assert together(last, Augment(prefix=0.5)(many())[1] != 99) < 0.03
    assert together(last, Augment(reverse=0.5)(many())[1] != 99) < 0.03
    pairs = Neighbours(np.tile([20, 30], (10, 1)).astype(np.int32), np.tile([0.5, 1.0], (10, 1)))
    varied = Augment(single=0.5, neighbour=0.5, neighbours=pairs, decay=1.0)
    histories, targets, sources = varied.with_sources(many())
    assert together(histories.lengths == 1, sources >= 0) < 0.03
    _, targets, sources = Augment(neighbour=1.0, neighbours=pairs, decay=1.0).with_sources(many())
    assert together(targets == 20, sources < 4) < 0.03


def test_rows_from_no_data_set_go_by_content():
    rows = [one([1, 2, 3, 4, 5, 6, 7], row=-1), one([1, 2, 3, 4, 5, 6, 8], row=-1)]
    first, _ = Augment(drop_item=0.5)(rows)
    again, _ = Augment(drop_item=0.5)(rows[::-1])
    assert first.row(0).tolist() == again.row(1).tolist()
    rows = [one([1, 2], row=-1), one([1, 3], row=-1), one([1, 2], target=98, row=-1)]
    assert len(set(row_keys(rows, 0).tolist())) == 3


@pytest.mark.parametrize("name", ["reverse", "prefix", "suffix", "drop_item", "shuffle"])
def test_augment_errors(name):
    with pytest.raises(ValueError, match=rf"{name}: expected a probability in 0\.\.1, got 1\.5"):
        Augment(**{name: 1.5})
    with pytest.raises(ValueError, match="shuffle_window: expected at least 2"):
        Augment(shuffle_window=1)


def test_single_keeps_one_item_and_prefers_late_ones():
    rows = [
        row._replace(row=i)
        for i, row in enumerate([DATA.train[0]._replace(history=np.arange(6, dtype=np.int32))] * 3000)
    ]
    histories, _ = Augment(single=1.0, decay=0.5)(rows, seed=0)
    assert histories.lengths.tolist() == [1] * 3000
    counts = np.bincount(histories.values, minlength=6) / 3000
    expected = 0.5 ** np.arange(6)[::-1]
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)


def test_an_item_without_neighbours_replaces_no_target():
    table = Neighbours(np.array([[5], [0]], np.int32), np.array([[1.0], [0.0]]))
    rows = [one([0], row=0), one([1], row=1)]
    _, targets, sources = Augment(neighbour=1.0, neighbours=table).with_sources(rows)
    assert targets.tolist() == [5, 99]
    assert sources.tolist() == [0, -1]
