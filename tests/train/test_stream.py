"""What an update learns, and the rule by which it is kept."""

import numpy as np
import pytest

from flr.data import Catalogue, Interactions, RecDataset
from flr.data.growth import joined
from flr.evaluate import EvalResult
from flr.train.stream import decide, stream
from scripts.stream_study import the_stream, with_clock

KNOWN = Catalogue(["a", "b", "c"], ["A", "B", "C"])
ITEMS = Catalogue(["d", "b", "a"], ["D", "B", "A"])
NEW = Interactions([f"u{n}" for n in range(6)], [[1]] * 6, [0, 2, 0, 2, 0, 2], np.arange(100, 106))
NEWEST = Interactions(["v", "w"], [[0], [2]], [2, 0], [200, 201])
DATA = RecDataset(ITEMS, NEW, NEWEST, NEWEST.select([]), "new")
OLD = Interactions([f"o{n}" for n in range(50)], [[0]] * 50, np.arange(50) % 3, np.arange(50))
REPLAY = RecDataset(KNOWN, OLD, OLD.select([0]), OLD.select([]), "old")


def test_new_rows_and_a_share_of_old_ones():
    found = stream(KNOWN, "id", DATA, REPLAY, share=0.75, seed=1)
    assert found.growth.catalogue.item_ids == ["a", "b", "c", "d"]
    assert (found.new_rows, found.replay_rows, len(found.train), len(found.everything)) == (6, 18, 24, 56)
    assert found.train.targets[:6].tolist() == [3, 0, 3, 0, 3, 0]
    assert len(set(found.train.users)) == 24  # drawn once each
    assert found.valid.targets.tolist() == [0, 3]
    same, other = (stream(KNOWN, "id", DATA, REPLAY, share=0.75, seed=seed).train.users for seed in (1, 2))
    assert same == found.train.users != other
    assert stream(KNOWN, "id", DATA, REPLAY, share=0.99).replay_rows == 50  # all there are
    assert stream(KNOWN, "id", DATA, REPLAY, share=0.0).replay_rows == 0
    alone = stream(KNOWN, "id", DATA)
    assert (alone.replay_rows, len(alone.train)) == (0, 6)
    assert alone.notes == [
        "1 items that the data no longer have stay in the catalogue",
        "no old rows beside the new ones: a model may forget what it is not shown",
    ]


def test_rows_before_a_time_are_old():
    found = stream(KNOWN, "id", DATA, share=0.5, since=104)
    assert (found.new_rows, found.replay_rows) == (2, 2)
    assert found.train.timestamps[:2].tolist() == [104, 105]
    assert found.train.timestamps.max() == 105
    millis = Interactions(NEW.users, NEW.histories, NEW.targets, (1_500_000_000 + np.arange(6)) * 1000)
    shown = stream(KNOWN, "id", RecDataset(ITEMS, millis, NEWEST, NEWEST.select([]), "ms"), since=1_500_000_004)
    assert shown.train.timestamps[:2].tolist() == [1_500_000_004_000, 1_500_000_005_000]
    both = stream(KNOWN, "id", DATA, REPLAY, share=0.9, since=104)
    assert (both.new_rows, both.replay_rows, len(both.everything)) == (2, 18, 56)
    late = RecDataset(ITEMS, NEW, NEW.select([0, 5]), NEW.select([]), "mixed")
    assert "some rows that decide (valid) are older" in stream(KNOWN, "id", late).notes[1]


def result(ranks: list[int]) -> EvalResult:
    size = len(ranks)
    both = {level: np.array(ranks) for level in ("item", "title")}
    users = [f"u{n}" for n in range(size)]
    empty = np.zeros((size, 20), np.int64), np.zeros((size, 20), np.float32)
    return EvalResult("model", users, np.zeros(size, np.int64), both, *empty, 9, samples=1)


def test_what_one_user_lost_is_chance_however_many_rows_that_user_has():
    """Of eleven users one has thirty rows, all of which are ranked worse; the others' are ranked as before."""
    before, after = result([1] * 40), result([2] * 30 + [1] * 10)
    before.users[:30] = after.users[:30] = ["u0"] * 30
    kept, why, figures = decide(before, after, np.ones(40, bool))
    assert kept, why
    assert figures["known"]["difference"][0] < 0 == figures["known"]["difference"][2]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ([1] * 30, [2] * 30, False),  # worse everywhere
        ([1] * 30, [1] * 30, True),
        ([2] * 30, [1] * 30, True),
        ([1, 2] * 15, [2, 1] * 15, True),  # chance explains it
        ([1] * 30, [1] * 29 + [2], True),
        ([1] * 30, [1] * 20 + [0] * 10, False),
    ],
)
def test_an_update_is_kept_unless_it_is_worse_beyond_chance(before, after, kept):
    """Rows with new targets, which the old model cannot answer, neither save an update nor condemn it."""
    for new in ([], [1] * 200, [0] * 200):
        known = np.arange(30 + len(new)) < 30
        found, why, figures = decide(result(before), result([*after, *new]), known)
        assert found is kept
        assert why.startswith("kept: " if kept else "not kept: ")
        assert figures["known"]["rows"] == 30
        assert figures.get("new", {"rows": 0})["rows"] == len(new)


def test_without_a_known_target_an_update_is_kept():
    found, why, figures = decide(None, result([1, 0]), np.zeros(2, bool))
    assert found
    assert why == "kept: the old model knows none of the 2 targets"
    assert figures["new"]["before"] == 0


def test_rows_without_times_get_a_clock_that_keeps_each_users_order():
    users = ["u", "v", "u", "u", "v", "w"]
    rows = with_clock(Interactions(users, [[0]] * 6, range(6)))
    times = dict(zip(range(6), (rows.timestamps / 10**9).tolist(), strict=True))
    assert times[0] < times[2] < times[3]
    assert times[1] < times[4]
    for row, (first, last) in {0: (0, 1 / 3), 2: (1 / 3, 2 / 3), 3: (2 / 3, 1), 1: (0, 0.5), 4: (0.5, 1)}.items():
        assert first <= times[row] <= last
    whole = RecDataset(
        Catalogue("abcdef", "abcdef"), rows.select([0, 1, 2]), rows.select([3]), rows.select([4, 5]), "x"
    )
    plain = [Interactions(part.users, part.histories, part.targets) for part in (whole.train, whole.valid, whole.test)]
    start, parts = the_stream(RecDataset(whole.catalogue, *plain, "x"), 3, None)
    assert [len(start), *map(len, parts)] == [3, 1, 1, 1]
    ordered = joined(start, *parts)
    assert ordered.targets.tolist() == np.argsort(rows.timestamps).tolist()
    few = the_stream(RecDataset(whole.catalogue, *plain, "x"), 3, 1)
    assert len({user for part in (few[0], *few[1]) for user in part.users}) == 1
