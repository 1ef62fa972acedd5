"""Logs of (user, item, time): built event by event, or read from the columns of a table."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from .frames import codes, find_column, has_column, id_column, missing_rows, time_column
from .report import ReadReport

LATEST = 4102444800  # 2100-01-01, in seconds
_EARLIEST = 315532800  # 1980-01-01: from here to 2100 times in s, ms, µs and ns are told apart by their size
UNITS = {1: "s", 10**3: "ms", 10**6: "µs", 10**9: "ns"}


class LogBuilder:
    """Collects events block by block; users and items are numbered in order of appearance."""

    def __init__(self) -> None:
        self._names: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._codes: tuple[array[int], array[int]] = (array("q"), array("q"))
        self._times: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._codes[0])

    def add(self, users: pa.Array, items: pa.Array, times: np.ndarray | None) -> None:
        """Some events: text [n], text [n], int64 or float64 [n] (None everywhere, where there are no times)."""
        for names, kept, values in zip(self._names, self._codes, (users, items), strict=True):
            encoded = values.dictionary_encode()
            known = [names.setdefault(text, len(names)) for text in encoded.dictionary.to_pylist()]
            numbers = np.array(known, np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
            kept.frombytes(numbers.astype(np.int64).tobytes())
        if times is not None:
            self._times.append(times)

    def build(self, per_second: int | None = None) -> InteractionLog:
        """The events so far; ``per_second`` units of their times are a second, None where that is not known.

        Raises:
            ValueError: whole numbers that a float does not hold beside fractions.
        """
        times = np.concatenate(self._times) if self._times else None
        if times is not None and times.dtype.kind == "f":
            whole = [int(np.abs(part).max(initial=0)) for part in self._times if part.dtype.kind == "i"]
            if max(whole, default=0) >= 2**53:
                raise ValueError(
                    f"time: expected whole numbers alone, or all below 2^53, got {max(whole)} and fractions"
                )
        users, items = (np.frombuffer(kept, np.int64) for kept in self._codes)
        user_names, item_ids = map(list, self._names)
        return InteractionLog(user_names, item_ids, users, items, times, per_second)


@dataclass
class InteractionLog:
    """n events: user and item numbers int64 [n], times int64 or float64 [n] or None (rows are then in their order).

    ``per_second`` of a time's units are a second; None where the unit is not known.
    """

    user_names: list[str]
    item_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    per_second: int | None = None

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

    @property
    def unit(self) -> int | None:
        """How many units of a time are a second: ``per_second``, or what the size of the times shows."""
        return self.per_second or unit_of(self.times)

    @property
    def has_fractions(self) -> bool:
        """Whether times are fractions of a unit that is not known, which no whole number of it stands for."""
        if self.times is None or self.times.dtype.kind != "f" or self.unit is not None:
            return False
        return bool((self.times % 1 != 0).any())

    def stamps(self, order: np.ndarray) -> np.ndarray | None:
        """What rows keep of the times of the events ``order``, int64 [n], in their order.

        Whole seconds where ``per_second`` says so, else whole units; the place among the log's different times, from 0,
        where the times are fractions of an unknown unit.
        """
        if self.times is None:
            return None
        if self.has_fractions:
            return np.unique(self.times, return_inverse=True)[1].astype(np.int64)[order]
        return (self.times[order] // (self.per_second or 1)).astype(np.int64)


def unit_of(times: np.ndarray | None) -> int | None:
    """Units of a second by the size of the times: all of them lie between 1980 and 2100.

    >>> unit_of(np.array([1500000000000, 1600000000000])), unit_of(np.array([3, 17]))
    (1000, None)
    """
    if times is None or not len(times):
        return 1
    low, high = times.min(), times.max()
    return next((unit for unit in UNITS if _EARLIEST * unit <= low and high < LATEST * unit), None)


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
    times, per_second = None, None
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
