"""Generated data with planted interests."""

import numpy as np
import pytest

from flr.data import Interactions, planted_dataset


def test_planted_structure():
    dataset = planted_dataset(num_items=203, num_users=400, num_interests=5, seed=4)
    catalogue = dataset.catalogue
    interest, successor = catalogue.attributes["interest"], catalogue.attributes["successor"]
    assert len(set(catalogue.titles)) == len(set(catalogue.sids)) == len(catalogue) == 203
    assert np.bincount(interest).tolist() == [41, 41, 41, 40, 40]
    assert sorted(successor) == list(range(203))
    assert (interest[successor] == interest).all()
    nouns = {title.split()[-2]: topic for title, topic in zip(catalogue.titles, interest.tolist(), strict=True)}
    assert len(nouns) == 5  # a title's noun names its interest
    codes = np.array([int(sid[0][3:-1]) for sid in catalogue.sids])
    assert 0.6 < (codes == interest).mean() < 1  # a semantic ID only leans to it
    users = [{row.user for row in part} for part in (dataset.train, dataset.valid, dataset.test)]
    assert not users[0] & users[1]
    assert not users[1] & users[2]
    assert not users[0] & users[2]
    by_user: dict[str, set[int]] = {}
    for row in dataset.train:
        by_user.setdefault(row.user, set()).update(interest[[*row.history, row.target]].tolist())
    assert max(map(len, by_user.values())) == 3


def test_planted_chains_follow():
    dataset = planted_dataset(num_users=300, follow=1.0, rotation=1.0, min_events=10, max_events=12, max_history=12)
    interest, successor = dataset.catalogue.attributes["interest"], dataset.catalogue.attributes["successor"]
    for row in dataset.test:
        if len(row.history) < 3:
            continue
        due = row.history[-3]  # three interests in turn: the one served three steps ago is due
        assert interest[due] == interest[row.target]
        assert successor[due] == row.target
        assert len(set(interest[row.history[-3:]])) == 3


def test_planted_stay_makes_bursts():
    def same_interest(stay: float) -> float:
        dataset = planted_dataset(num_users=300, stay=stay)
        interest = dataset.catalogue.attributes["interest"]
        last = dataset.train.histories.values[dataset.train.histories.offsets[1:] - 1]
        return float((interest[last] == interest[dataset.train.targets]).mean())

    assert same_interest(1.0) == 1.0
    assert same_interest(0.0) < 0.2 < 0.5 < same_interest(0.6) < 0.8


def test_planted_is_deterministic_and_grows():
    small, large = planted_dataset(60, 50, seed=9), planted_dataset(60, 500, seed=9)
    assert planted_dataset(60, 50, seed=9).train == small.train
    assert planted_dataset(60, 50, seed=10).train != small.train
    assert small.catalogue == large.catalogue
    assert large.train.select(range(len(small.train))) == small.train
    timed = planted_dataset(60, 50, seed=9, split="time")
    assert timed.train.timestamps.max() < timed.valid.timestamps.min()
    assert timed.valid.timestamps.max() < timed.test.timestamps.min()
    rows = sum(map(len, (timed.train, timed.valid, timed.test)))
    assert rows == sum(map(len, (small.train, small.valid, small.test)))
    assert any("continue the history's last item of their interest" in note for note in small.report.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 5}, "num_items: expected at least 8, got 5"),
        ({"interests_per_user": 5}, r"interests_per_user: expected 1\.\.4"),
        ({"follow": 1.2}, r"follow: expected 0\.\.1, got 1\.2"),
        ({"stay": -0.1}, r"stay: expected 0\.\.1, got -0\.1"),
        ({"split": "row"}, "split: expected 'user' or 'time', got 'row'"),
        ({"min_events": 1}, "min_events: expected at least 2, got 1"),
        ({"max_events": 3}, "max_events: expected at least 6, got 3"),
    ],
)
def test_planted_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        planted_dataset(**arguments)


def test_planted_many_interests_and_series():
    dataset = planted_dataset(num_items=9000, num_users=20, num_interests=30, series_length=1)
    assert len(set(dataset.catalogue.titles)) == 9000
    assert isinstance(dataset.train, Interactions)
