"""From a log of (user, item, time) to training, validation and test rows."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence

import numpy as np

from .catalogue import Catalogue
from .csr import check_whole, latest, user_bounds
from .events import InteractionLog
from .interactions import PARTS, Interactions, RecDataset
from .report import ReadReport

SPLITS = ("time", "leave_one_out")
LEAK_NOTE = (
    "leave_one_out leaks: a user's last item is tested wherever it lies in time, so training data contains events "
    "later than other users' test events; "
)


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
        min_interactions: k of the k-core filter, applied before anything else; 0 or 1 for none.
        name, report: of the data set; ``report`` gets counts and notes.
        describe: gives the catalogue of a list of item ids (those that are left, in order of first appearance in the
            source).
    """
    check_splitting(split, max_history, min_interactions)
    if split == "time" and log.times is None:
        raise ValueError(f"split: expected 'leave_one_out' for a log without times, got 'time' ({report.source})")
    if len(log) == 0:
        raise ValueError(f"{report.source}: expected events, got none")
    log = _filtered(log, min_interactions, report)
    used, items = np.unique(log.items, return_inverse=True)
    catalogue = describe([log.item_ids[code] for code in used.tolist()])

    order = log.order()
    users, items, stamps = log.users[order], items[order].astype(np.int32), log.stamps(order)
    start, end = user_bounds(users)
    num_users = int((start == np.arange(len(users))).sum())
    rows = np.flatnonzero(np.arange(len(users)) > start)

    def interactions(chosen: np.ndarray) -> Interactions:
        names = [log.user_names[user] for user in users[chosen].tolist()]
        histories = latest(items, start, chosen, max_history)
        return Interactions(names, histories, items[chosen], None if stamps is None else stamps[chosen])

    if split == "time":
        assert log.times is not None
        times = log.times[order]  # not the stamps, which may be the same for different times
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
    if log.has_fractions:
        report.notes.append("times are fractions of an unknown unit; rows keep their place among the different times")
    report.rows_kept, report.users, report.items = len(log), num_users, len(catalogue)
    return RecDataset(catalogue, parts[0], parts[1], parts[2], name, report)


def check_splitting(split: str, max_history: int, min_interactions: int) -> None:
    """ValueError for an option that :func:`split_log` does not take."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    check_whole("max_history", max_history, 1)
    check_whole("min_interactions", min_interactions, 0)


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


def hold_back(rows: Interactions, share: float) -> tuple[Interactions, Interactions]:
    """Training rows without the latest of them, and those: what supervised training has not seen (``flr rl``).

    With times, the rows at and after the time that leaves nearest to ``share`` of them. Without, the last row of users
    that are evenly spread over the data.

    Args:
        rows: of train.
        share: of the rows, in (0, 1).

    Returns:
        The others and those held back, each in the order of ``rows``.

    Raises:
        ValueError: a share that leaves nothing on one side, or, without times, that exceeds one row a user.

    Example:
        >>> from flr.data import CSR
        >>> rows = Interactions(["a", "a", "b", "b"], CSR.from_rows([[0], [0, 1], [2], [2, 3]]), [1, 2, 3, 4])
        >>> rest, held = hold_back(rows, 0.5)
        >>> rest.targets.tolist(), held.targets.tolist()
        ([1, 3], [2, 4])
    """
    if not isinstance(share, numbers.Real) or not 0 < share < 1:
        raise ValueError(f"held_back: expected a share between 0 and 1, got {share!r:.80}")
    is_held = np.zeros(len(rows), bool)
    if rows.timestamps is not None:
        order = np.argsort(rows.timestamps, kind="stable")
        (cut,) = time_cuts(rows.timestamps[order], (1 - share,)) if len(rows) else (0,)
        is_held[order[cut:]] = True
    else:
        last = np.array(list({user: place for place, user in enumerate(rows.users)}.values()), np.int64)
        wanted = round(share * len(rows))
        if wanted > len(last):
            most = f"at most {len(last) / len(rows):.3f}, a row a user, for rows without times"
            raise ValueError(f"held_back: expected {most}, got {share}")
        is_held[last[np.arange(wanted) * len(last) // max(wanted, 1)]] = True
    if is_held.all() or not is_held.any():
        raise ValueError(f"held_back: expected rows on both sides, got {is_held.sum()} of {len(rows)} held back")
    return rows.select(np.flatnonzero(~is_held)), rows.select(np.flatnonzero(is_held))


def _leak(train: Interactions, test: Interactions) -> str:
    if train.timestamps is None or test.timestamps is None:
        return "how many is not known without times"
    advice = "use split='time' for figures that could be had in use"
    if not len(train) or not len(test):
        return advice
    later = 1 - np.searchsorted(np.sort(train.timestamps), test.timestamps, side="right") / len(train)
    seen = f"seen from a test event, {100 * later.mean():.0f} % of the training targets lie in the future"
    return f"{advice} (here: {seen})"
