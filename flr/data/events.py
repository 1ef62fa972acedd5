"""Logs of (user, item, time): built event by event, or read from the columns of a table."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from .frames import codes, find_column, has_column, id_column, missing_rows, time_column
from .report import ReadReport


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

    def build(self, timed: bool = True, per_second: int = 1) -> InteractionLog:
        """The events so far; ``timed`` False where the source has no times, ``per_second`` their units in a second."""
        return InteractionLog(
            list(self.users),
            list(self.items),
            np.array(self.user_codes, np.int64),
            np.array(self.item_codes, np.int64),
            np.array(self.times, np.float64) if timed else None,
            per_second,
        )


@dataclass
class InteractionLog:
    """n events: user and item numbers int64 [n], times int64 or float64 [n] or None (rows are then in their order).

    ``per_second`` of a time's units are a second; it is 1 where the unit is not known.
    """

    user_names: list[str]
    item_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    per_second: int = 1

    def __len__(self) -> int:
        return len(self.users)

    def select(self, keep: np.ndarray) -> InteractionLog:
        """The events that ``keep`` (mask or indices) names; users and items keep their numbers."""
        times = None if self.times is None else self.times[keep]
        return replace(self, users=self.users[keep], items=self.items[keep], times=times)

    def order(self) -> np.ndarray:
        """int64 [n]: the events by user, then time, then place in the source."""
        order = np.argsort(self.times, kind="stable") if self.times is not None else np.arange(len(self))
        return order[np.argsort(self.users[order], kind="stable")]

    def seconds(self, order: np.ndarray) -> np.ndarray | None:
        """Times of the events ``order``, whole ones of the unit of ``Interactions.timestamps``, int64."""
        return None if self.times is None else np.floor(self.times[order] // self.per_second).astype(np.int64)


def read_events(
    table: pa.Table,
    report: ReadReport,
    name: str,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    shown: str | None = None,
    max_bad_share: float = 0.0,
) -> InteractionLog:
    """The events of a table.

    A row with a null, an empty id, or a float that is no time is malformed; its line is the row's number from 1.

    Args:
        table: with the columns that ``user``, ``item`` and ``time`` name (see ``frames.ALIASES`` for None; a table
            without a column of times gives a log without).
        report: gets counts and the first malformed rows.
        name: of the table, for errors.
        shown: the same for the report's rows, which may be shorter.
        max_bad_share: malformed rows allowed, 0..1.

    Raises:
        ValueError: a column that is missing, ambiguous or of another type, or too many malformed rows.
    """
    names = table.column_names
    columns: list[tuple[str, pa.Array]] = []
    for role, asked in (("user", user), ("item", item)):
        column = find_column(names, role, asked, name)
        columns.append((column, id_column(table, column, name)))
    (_, users), (_, items) = columns
    times, per_second = None, 1
    if has_column(names, "time", time):
        column = find_column(names, "time", time, name)
        times, per_second = time_column(table, column, name)
        columns.append((column, times))
    report.rows_read += table.num_rows
    bad = np.zeros(table.num_rows, bool)
    for column, values in columns:
        missing = missing_rows(values)
        for row in np.flatnonzero(missing & ~bad).tolist():
            report.add_bad(shown or name, row + 1, f"{column}: expected a value, got {values[row].as_py()!r}")
        bad |= missing
    report.check(max_bad_share)
    good = np.flatnonzero(~bad)
    (user_codes, user_names), (item_codes, item_ids) = codes(users, good), codes(items, good)
    moments = None if times is None else times.take(pa.array(good)).to_numpy(zero_copy_only=False)
    return InteractionLog(user_names, item_ids, user_codes, item_codes, moments, per_second)
