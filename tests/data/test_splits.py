"""K-cores and splits of a log."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.data import CSR, Catalogue, Interactions, ReadReport, hold_back, load_dataset
from flr.data.events import InteractionLog, LogBuilder
from flr.data.splits import k_core, split_log, titled_catalogue

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=40)


def build(events) -> InteractionLog:
    log = LogBuilder()
    for user, item, time in events:
        log.add(pa.array([f"u{user}"]), pa.array([f"i{item}"]), np.array([time]))
    return log.build()


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 3))
def test_k_core_equals_plain_peeling(events, minimum):
    left = list(events)
    while True:
        kept = [
            e for e in left if sum(f[0] == e[0] for f in left) >= minimum and sum(f[1] == e[1] for f in left) >= minimum
        ]
        if len(kept) == len(left):
            break
        left = kept
    core = k_core(build(events), minimum)
    got = [
        (core.user_names[u], core.item_ids[i], t) for u, i, t in zip(core.users, core.items, core.times, strict=True)
    ]
    assert got == [(f"u{u}", f"i{i}", float(t)) for u, i, t in left]


def cut(times, share):
    """The place in ascending times nearest to the share of them at which the time changes."""
    count = len(times)
    changes = [place for place in range(count + 1) if place in (0, count) or times[place - 1] < times[place]]
    return min(changes, key=lambda place: abs(place - share * count))


def by_definition(events, split, max_history):
    """Part, user, history, target and time of every row, sorted."""
    plain: dict[str, list[tuple[int, str]]] = {}
    for user, item, time in dict.fromkeys(events):
        plain.setdefault(f"u{user}", []).append((time, f"i{item}"))
    rows = []
    for user, sequence in plain.items():
        sequence.sort(key=lambda event: event[0])  # stable: ties stay in the order of the file
        for place in range(1, len(sequence)):
            history = tuple(item for _, item in sequence[max(0, place - max_history) : place])
            left = len(sequence) - place
            part = "train" if len(sequence) < 3 or left > 2 else {1: "test", 2: "valid"}[left]
            rows.append((part, user, history, sequence[place][1], sequence[place][0]))
    if split == "time":
        rows.sort(key=lambda row: row[4])
        times = [row[4] for row in rows]
        first, second = cut(times, 0.8), cut(times, 0.9)
        parts = ["train"] * first + ["valid"] * (second - first) + ["test"] * (len(rows) - second)
        rows = [(part, *row[1:]) for part, row in zip(parts, rows, strict=True)]
    return sorted(rows)


LONG = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 99)), min_size=30, max_size=90)


@settings(max_examples=150, deadline=None)
@given(EVENTS | LONG, st.sampled_from(["time", "leave_one_out"]), st.integers(1, 4))
def test_split_equals_plain_construction(events, split, max_history):
    report = ReadReport("log")
    arguments = {"split": split, "max_history": max_history, "min_interactions": 1, "name": "x", "report": report}
    expected = by_definition(events, split, max_history)
    empty = {"train", "valid", "test"} - {row[0] for row in expected}
    try:
        dataset = split_log(build(events), describe=lambda ids: titled_catalogue(ids, {}, report), **arguments)
    except ValueError as error:
        assert any(f"expected {part} rows from split=" in str(error) for part in empty)  # noqa: PT017
        return
    assert not empty
    names = dataset.catalogue.item_ids
    got = [
        (part, row.user, tuple(names[item] for item in row.history), names[row.target], row.timestamp)
        for part in ("train", "valid", "test")
        for row in getattr(dataset, part)
    ]
    assert sorted(got) == expected
    assert any("leaks" in note for note in report.notes) == (split == "leave_one_out")


def test_leave_one_out_states_its_leak():
    events = [(user, item, 10 * user + item) for user in range(4) for item in range(4)]
    report = ReadReport("log")
    arguments = {"split": "leave_one_out", "max_history": 10, "min_interactions": 1, "name": "x", "report": report}
    split_log(build(events), describe=lambda ids: titled_catalogue(ids, {}, report), **arguments)
    # users one after the other: from user u's test event, the training targets of the later users lie in the future
    assert "38 % of the training targets lie in the future" in report.notes[-1]
    assert "leak" in load_dataset.__doc__
    at_once = build([(user, item, 7) for user, item, _ in events])
    split_log(at_once, describe=lambda ids: titled_catalogue(ids, {}, report), **arguments)
    assert "seen from a test event, 0 % of the training targets" in report.notes[-1]


def test_split_errors():
    log = build([(0, 0, 0), (0, 1, 1), (0, 2, 2)])
    arguments = {"split": "time", "max_history": 1, "min_interactions": 1, "name": "x", "report": ReadReport("log")}
    for change, message in (
        ({"split": "random"}, "split: expected one of"),
        ({"max_history": 0}, "max_history: expected at least 1, got 0"),
        ({"max_history": "5"}, "max_history: expected a whole number, got '5'"),
        ({"max_history": 5.5}, "max_history: expected a whole number, got 5.5"),
        ({"min_interactions": None}, "min_interactions: expected a whole number, got None"),
        ({"min_interactions": -1}, "min_interactions: expected at least 0, got -1"),
        ({}, "expected .* rows from split='time', got none of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            split_log(log, describe=lambda ids: Catalogue(ids, ids), **(arguments | change))


@pytest.mark.parametrize(("scale", "shift"), [(1 / 200, 2012), (1 / 2000, 0), (1, 1_500_000_000)])
@pytest.mark.parametrize("split", ["time", "leave_one_out"])
def test_fractional_times_split_as_whole_ones(scale, shift, split):
    draw = np.random.default_rng(0)
    users, items = draw.integers(0, 20, 400), draw.integers(0, 10, 400)
    whole, other = (
        load_dataset(pa.table({"user_id": users, "item_id": items, "timestamp": times}), split=split)
        for times in (np.arange(400), np.arange(400) * scale / 2 + shift)
    )
    for part in ("train", "valid", "test"):
        assert getattr(other, part).targets.tolist() == getattr(whole, part).targets.tolist()
    fractions = "times are fractions of an unknown unit; rows keep their place among the different times"
    assert (fractions in other.report.notes) is (scale < 1)
    if scale < 1:
        assert other.train.timestamps.tolist() == whole.train.timestamps.tolist()
        leaks = [[note for note in dataset.report.notes if "leaks" in note] for dataset in (whole, other)]
        assert leaks[0] == leaks[1]
        kept, held = hold_back(other.train, 0.1)
        assert held.timestamps.min() > kept.timestamps.max()
    else:
        assert other.test.timestamps.min() >= shift


def rows_of(users: list[str], times: list[int] | None) -> Interactions:
    histories = CSR.from_rows([[0]] * len(users))
    return Interactions(users, histories, list(range(len(users))), None if times is None else np.array(times))


def test_the_latest_rows_are_held_back():
    rest, held = hold_back(rows_of(list("abcdefghij"), [5, 1, 9, 2, 8, 3, 7, 4, 6, 0]), 0.3)
    assert held.targets.tolist() == [2, 4, 6]
    assert rest.targets.tolist() == [0, 1, 3, 5, 7, 8, 9]
    assert held.timestamps.min() > rest.timestamps.max()


def test_rows_of_one_time_stay_together():
    rest, held = hold_back(rows_of(list("abcd"), [1, 2, 2, 2]), 0.4)
    assert (len(rest), len(held)) == (1, 3)


def test_without_times_the_last_rows_of_evenly_spread_users_are_held_back():
    users = [f"u{n // 4}" for n in range(40)]
    rest, held = hold_back(rows_of(users, None), 0.125)
    assert held.targets.tolist() == [3, 11, 19, 27, 35]
    assert sorted(rest.targets.tolist() + held.targets.tolist()) == list(range(40))


@pytest.mark.parametrize(
    ("share", "times"), [(0.0, None), (1.0, None), ("half", None), (0.5, None), (0.5, [3, 3, 3, 3])]
)
def test_a_share_that_cannot_be_held_back(share, times):
    with pytest.raises(ValueError, match=r"^held_back: expected .*, got "):
        hold_back(rows_of(["a", "a", "a", "a"], times), share)
