"""From a log of (user, item, time) to training, validation and test rows."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .catalogue import Catalogue
from .interactions import CSR, PARTS, Interactions, RecDataset
from .report import ReadReport

SPLITS = ("time", "leave_one_out")
LEAK_NOTE = (
    "leave_one_out leaks: a user's last item is tested wherever it lies in time, so training data contains events "
    "later than other users' test events; use split='time' for figures that could be had in use"
)


@dataclass
class LogBuilder:
    """Collects events one by one; users and items are numbered in order of appearance."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user_codes: array[int] = field(default_factory=lambda: array("q"))
    item_codes: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))  # exact for integers up to 2^53

    def add(self, user: str, item: str, time: float) -> None:
        """One event."""
        self.user_codes.append(self.users.setdefault(user, len(self.users)))
        self.item_codes.append(self.items.setdefault(item, len(self.items)))
        self.times.append(time)

    def build(self, timed: bool = True) -> InteractionLog:
        """The events so far; ``timed`` False where the source has no times."""
        return InteractionLog(
            list(self.users),
            list(self.items),
            np.array(self.user_codes, np.int64),
            np.array(self.item_codes, np.int64),
            np.array(self.times, np.float64) if timed else None,
        )


@dataclass
class InteractionLog:
    """n events: user and item numbers int64 [n], times float64 [n] or None (rows are then in the order of time)."""

    user_names: list[str]
    item_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None

    def __len__(self) -> int:
        return len(self.users)

    def select(self, keep: np.ndarray) -> InteractionLog:
        """The events that ``keep`` (mask or indices) names; users and items keep their numbers."""
        times = None if self.times is None else self.times[keep]
        return InteractionLog(self.user_names, self.item_ids, self.users[keep], self.items[keep], times)


def k_core(log: InteractionLog, minimum: int) -> InteractionLog:
    """The largest part of ``log`` in which every user and every item has at least ``minimum`` events.

    >>> log = InteractionLog(["a", "b"], ["x", "y"], np.array([0, 0, 1]), np.array([0, 0, 1]), None)
    >>> len(k_core(log, 2))
    2
    """
    while len(log):
        enough = np.bincount(log.users)[log.users] >= minimum
        enough &= np.bincount(log.items)[log.items] >= minimum
        if enough.all():
            break
        log = log.select(enough)
    return log


def split_log(
    log: InteractionLog,
    split: str,
    max_history: int,
    min_interactions: int,
    name: str,
    report: ReadReport,
    describe: Callable[[list[str]], Catalogue],
    time_scale: float = 1.0,
) -> RecDataset:
    """Rows of ``log``: every event with an earlier one of its user is a target, the latest before it are its history.

    ``split="time"``: all rows in order of their target's time, cut 8:1:1 where the time changes, so that no training
    target is as late as a test target. ``split="leave_one_out"``: a user's last event is for test, the one before for
    validation, the others for training (users with fewer than three events: training only). **Leave-one-out leaks the
    future**: training data contains events later than other users' test events, which a model in use would not have;
    the report says by how much.

    Args:
        log: the events.
        split: "time" or "leave_one_out".
        max_history: items of a history, at least 1.
        min_interactions: k of the k-core filter, applied before anything else; 1 for none.
        name, report: of the data set; ``report`` gets counts and notes.
        describe: gives the catalogue of a list of item ids (those that are left, in order of first appearance in the
            source).
        time_scale: what one unit of the log's times is in the unit of ``timestamps``.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    for option, value in (("max_history", max_history), ("min_interactions", min_interactions)):
        if value < 1:
            raise ValueError(f"{option}: expected at least 1, got {value}")
    if split == "time" and log.times is None:
        raise ValueError("split: expected 'leave_one_out' for a log without times, got 'time'")
    log = _filtered(log, min_interactions, report)
    used, items = np.unique(log.items, return_inverse=True)
    catalogue = describe([log.item_ids[code] for code in used.tolist()])

    order = np.argsort(log.times, kind="stable") if log.times is not None else np.arange(len(log))
    order = order[np.argsort(log.users[order], kind="stable")]  # by user, then time, then place in the file
    users, items = log.users[order], items[order].astype(np.int32)
    times = None if log.times is None else np.floor(log.times[order] * time_scale).astype(np.int64)
    start, end = user_bounds(users)
    num_users = int((start == np.arange(len(users))).sum())
    rows = np.flatnonzero(np.arange(len(users)) > start)

    def interactions(chosen: np.ndarray) -> Interactions:
        names = [log.user_names[user] for user in users[chosen].tolist()]
        histories = latest(items, start, chosen, max_history)
        return Interactions(names, histories, items[chosen], None if times is None else times[chosen])

    if split == "time":
        assert times is not None
        rows = rows[np.argsort(times[rows], kind="stable")]
        parts = [interactions(part) for part in np.split(rows, time_cuts(times[rows], (0.8, 0.9)))]
    else:
        left = end[rows] - rows  # 1 for a user's last event
        enough = end[rows] - start[rows] >= 3
        masks = [~enough | (left > 2), enough & (left == 2), enough & (left == 1)]
        parts = [interactions(rows[mask]) for mask in masks]
        report.notes.append(LEAK_NOTE + _leak(parts[0], parts[2]))
    for part_name, part in zip(PARTS, parts, strict=True):
        if len(part) == 0:
            hint = "rows of one time stay together under 'time', and 'leave_one_out' needs users with three events"
            raise ValueError(
                f"{report.source}: expected {part_name} rows from split={split!r}, got none of {len(rows)} "
                f"({num_users} users; {hint})"
            )
    report.rows_kept, report.users, report.items = len(log), num_users, len(catalogue)
    return RecDataset(catalogue, parts[0], parts[1], parts[2], name, report)


def latest(items: np.ndarray, start: np.ndarray, chosen: np.ndarray, max_history: int) -> CSR:
    """The latest ``max_history`` items before each ``chosen`` event, of its user, whose events begin at ``start``.

    >>> latest(np.array([7, 8, 9]), np.zeros(3, np.int64), np.array([1, 2]), max_history=1).values.tolist()
    [7, 8]
    """
    return CSR(items, np.zeros(1, np.int64)).slice(np.maximum(start[chosen], chosen - max_history), chosen)


def user_bounds(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every event its user's first event and the end of its user's events, int64 [n] each; ``users`` ascends.

    >>> [bound.tolist() for bound in user_bounds(np.array([0, 0, 3]))]
    [[0, 0, 2], [2, 2, 3]]
    """
    first = np.flatnonzero(np.diff(users, prepend=-1))
    counts = np.diff(first, append=len(users))
    start = np.repeat(first, counts)
    return start, start + np.repeat(counts, counts)


def titled_catalogue(item_ids: Sequence[str], titles: dict[str, str], report: ReadReport) -> Catalogue:
    """A catalogue whose items without a title carry their id as title; the report says how many."""
    missing = sum(1 for item in item_ids if not titles.get(item))
    if missing:
        report.notes.append(f"{missing} of {len(item_ids)} items have no title; their id stands in")
    return Catalogue(item_ids, [titles.get(item) or item for item in item_ids])


def _filtered(log: InteractionLog, min_interactions: int, report: ReadReport) -> InteractionLog:
    """The events of ``log`` without duplicates and in its k-core; ``report`` notes the others."""
    log = _without_duplicates(log, report)
    core = k_core(log, min_interactions)
    if len(core) == 0:
        wanted = f"events after the {min_interactions}-core filter"
        raise ValueError(f"{report.source}: expected {wanted}, got none of {len(log)}")
    if len(log) > len(core):
        report.notes.append(f"{len(log) - len(core)} events left out by the {min_interactions}-core filter")
    return core


def _without_duplicates(log: InteractionLog, report: ReadReport) -> InteractionLog:
    if log.times is None or len(log) == 0:
        return log
    order = np.lexsort((log.items, log.times, log.users))  # stable: of equal events the first in the file comes first
    ordered = log.select(order)
    assert ordered.times is not None
    same = (np.diff(ordered.users) == 0) & (np.diff(ordered.items) == 0) & (ordered.times[1:] == ordered.times[:-1])
    if not same.any():
        return log
    report.notes.append(f"{int(same.sum())} events left out that repeat another's user, item and time")
    keep = np.ones(len(log), bool)
    keep[order[1:][same]] = False
    return log.select(keep)


def time_cuts(times: np.ndarray, shares: Sequence[float]) -> list[int]:
    """Places in ascending ``times`` nearest to the shares at which the time changes."""
    changes = np.concatenate([[0], np.flatnonzero(np.diff(times)) + 1, [len(times)]])
    return [int(changes[np.abs(changes - share * len(times)).argmin()]) for share in shares]


def _leak(train: Interactions, test: Interactions) -> str:
    if train.timestamps is None or test.timestamps is None or not len(train) or not len(test):
        return ""
    later = 1 - np.searchsorted(np.sort(train.timestamps), test.timestamps, side="right") / len(train)
    return f" (here: seen from a test event, {100 * later.mean():.0f} % of the training targets lie in the future)"
