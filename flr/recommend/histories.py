"""Histories of a log in memory, one a user, as :meth:`flr.Recommender.recommend` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from flr.data.csr import user_bounds
from flr.data.events import read_events
from flr.data.frames import find_column, pick
from flr.data.report import ReadReport


class UserHistories(Sequence["list[str]"]):
    """A sequence of histories (item ids, oldest first) that knows whose they are.

    Make one with :meth:`from_frame`. A slice is one, too.

    Attributes:
        users: arrow array [len], the users in the type of the log's column, in order of first appearance.
        column: the name of that column.

    Example:
        >>> log = pa.table({"user_id": [7, 5, 7], "item_id": ["x", "y", "z"], "timestamp": [2, 1, 1]})
        >>> histories = UserHistories.from_frame(log)
        >>> histories.users.to_pylist(), list(histories)
        ([7, 5], [['z', 'x'], ['y']])
    """

    def __init__(self, histories: Sequence[Sequence[str]], users: pa.Array, column: str = "user_id") -> None:
        if len(histories) != len(users):
            raise ValueError(f"users: expected one a history ({len(histories)}), got {len(users)}")
        self._histories = histories
        self.users = users
        self.column = column

    @classmethod
    def from_frame(
        cls, frame: Any, *, user: str | None = None, item: str | None = None, time: str | None = None
    ) -> UserHistories:
        """The histories of a log, one row an event.

        Args:
            frame: pandas, polars, pyarrow or ``datasets.Dataset`` (see :mod:`flr.data.frames`).
            user, item, time: columns; None for "user_id" or "user", "item_id" or "item", "timestamp" or "time". Without
                a column of times the rows are in the order of time.

        Raises:
            ValueError: a column that is missing or of another type, a null.
        """
        table = pick(frame, "frame", user=user, item=item, time=time)
        log = read_events(table, ReadReport("frame"), "frame", user=user, item=item, time=time)
        order = log.order()
        _, ends = user_bounds(log.users[order])
        bounds = np.concatenate([[0], np.unique(ends)])
        names = [log.item_ids[number] for number in log.items[order].tolist()]
        histories = [names[a:b] for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        column = find_column(table.column_names, "user", user, "frame")
        first = np.unique(log.users, return_index=True)[1]
        return cls(histories, table[column].take(pa.array(first)).combine_chunks(), column)

    def __len__(self) -> int:
        return len(self._histories)

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> UserHistories: ...
    def __getitem__(self, index: int | slice) -> list[str] | UserHistories:
        if not isinstance(index, slice):
            return list(self._histories[index])
        rows = range(*index.indices(len(self)))
        return UserHistories([self._histories[row] for row in rows], self.users.take(pa.array(rows)), self.column)
