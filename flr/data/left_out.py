"""What item-kNN or a linear model would answer to a user if it had been fitted without that user's rows.

A table knows the targets of the rows that it was fitted on. To refit it for every user is not needed: of user u's own
rows X_u and targets Y_u (:mod:`flr.data.linear_items`; P is the inverse there, x a history's weights)

    T_u     = (I - (1 + backward) P X_uᵀ X_u)⁻¹
    score_u = (x T_u) M - (x T_u) P (X_uᵀ Y_u + backward Y_uᵀ X_u)

is exactly what M without them gives, at the λ of all rows (Woodbury's identity; of M, the entries that are kept). T_u
differs from I, and what is taken off from 0, only between the user's own items, so both are as small as the user's log.
Item-kNN is a sum over users: there T_u is I, and what is taken off is the user's part of M.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from .csr import CSR, distinct, numbered
from .interactions import Interactions
from .item_knn import KEPT_NEIGHBOURS, NeighbourTable
from .linear_items import DEFAULTS, solve
from .pairs import item_pairs

_BACKWARD = 0.5  # of item-kNN
_CELLS = 1 << 26  # of users' matrices that are kept


class OwnPart(NamedTuple):
    """What a user's own rows changed in a table, between n items, ascending."""

    items: np.ndarray  # int64 [n]
    spread: np.ndarray | None  # T_u, float32 [n, n]; None for I
    taken: np.ndarray  # T_u times the user's part, float32 [n, n]


class LeftOut:
    """Scores of a table, user by user, as if it had not seen their rows.

    Args:
        name: what kind of table it is. train: the rows that ``table`` was fitted on.
        table: as :meth:`linear` and :meth:`item_knn` make it.
        part: from a user's rows and their items int64 [n] to what stands in :class:`OwnPart`.

    Example:
        >>> train = Interactions(["ann", "bob"], [[0], [0]], [1, 2])
        >>> left_out = LeftOut.item_knn(train, 3)
        >>> left_out.scores(["ann", "bob", "cho"], CSR.from_rows([[0], [0], [0]])).toarray().tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        name: str,
        train: Interactions,
        table: NeighbourTable,
        part: Callable[[Interactions, np.ndarray], tuple[np.ndarray | None, np.ndarray]],
    ) -> None:
        self.name, self.table, self.train, self._part = name, table, train, part
        number = numbered(train.users)
        self._number = dict(zip(train.users, number.tolist(), strict=True))
        self._order = np.argsort(number, kind="stable")
        self._ends = np.cumsum(np.bincount(number)) if len(number) else np.zeros(0, np.int64)
        self._kept: OrderedDict[int, OwnPart] = OrderedDict()
        self._cells = 0

    @classmethod
    def linear(cls, train: Interactions, num_items: int) -> LeftOut:
        """Of :func:`flr.data.fit_linear`; keeps the inverse, 4 C² bytes."""
        table, inverse = solve(train, num_items, DEFAULTS)
        return cls("linear", train, table, _LinearPart(inverse))

    @classmethod
    def item_knn(cls, train: Interactions, num_items: int) -> LeftOut:
        """Of item-kNN."""
        table = NeighbourTable.fit(train, num_items, backward=_BACKWARD, top=KEPT_NEIGHBOURS)
        return cls("item-knn", train, table, _item_knn_part)

    def scores(self, users: Sequence[str], histories: CSR) -> sp.csr_matrix:
        """Float64 [B, C], of B users and histories; sparse, and without the trace of popularity of the tables.

        A user without rows in ``train`` gets what the whole table says.
        """
        spread, taken = [], []
        decayed = self.table.history_decay**histories.ages
        for row, user in enumerate(users):
            first, last = histories.offsets[row : row + 2]
            items, own = histories.values[first:last].astype(np.int64), decayed[first:last]
            part = self._of(user, items)
            if part is not None:
                place = np.searchsorted(part.items, items)
                taken.append((row, part.items, own @ part.taken[place]))
                if part.spread is not None:
                    items, own = part.items, own @ part.spread[place]
            spread.append((row, items, own))
        found = self.table.weighted(len(users), *_joined(spread))
        row_of, items, values = _joined(taken)
        return (found - sp.csr_matrix((values, (row_of, items)), shape=found.shape)).tocsr()

    def _of(self, user: str, items: np.ndarray) -> OwnPart | None:
        """The user's part, between their items and others of a history."""
        number = self._number.get(user)
        if number is None:
            return None
        part = self._kept.get(number)
        if part is None:
            part = self._kept[number] = self._made(number, items[:0])
            self._cells += len(part.items) ** 2
            while self._cells > _CELLS and len(self._kept) > 1:
                self._cells -= len(self._kept.popitem(last=False)[1].items) ** 2
        self._kept.move_to_end(number)
        place = np.searchsorted(part.items, items).clip(max=len(part.items) - 1)
        if (part.items[place] == items).all():
            return part
        return self._made(number, items)  # and not kept: what a row gets must not hang on what came before it

    def _made(self, number: int, items: np.ndarray) -> OwnPart:
        first = self._ends[number - 1] if number else 0
        rows = self.train.select(self._order[first : self._ends[number]])
        own = distinct(np.concatenate([rows.histories.values, rows.targets, items]).astype(np.int64))
        spread, taken = self._part(rows, own)
        return OwnPart(own, None if spread is None else spread.astype(np.float32), taken.astype(np.float32))


class _LinearPart:
    """T_u and what is taken off, of a linear model. (A class, since workers of a data loader may get it pickled.)"""

    def __init__(self, inverse: np.ndarray) -> None:
        self.inverse = inverse  # P, float32 [C, C]

    def __call__(self, rows: Interactions, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = self.inverse[np.ix_(items, items)].astype(np.float64)
        inputs, outputs = _dense(rows, items)
        left = np.eye(len(items)) - (1 + DEFAULTS.backward) * own @ (inputs.T @ inputs)
        both = inputs.T @ outputs
        right = np.concatenate([np.eye(len(items)), own @ (both + DEFAULTS.backward * both.T)], 1)
        spread, taken = np.split(np.linalg.solve(left, right), 2, axis=1)
        return spread, taken


def _item_knn_part(rows: Interactions, items: np.ndarray) -> tuple[None, np.ndarray]:
    """The user's part of M."""
    size, forward = len(items), np.zeros((len(items), len(items)))
    for pairs in item_pairs(rows):
        earlier, later = (np.searchsorted(items, x) for x in (pairs.earlier, pairs.later))
        forward.reshape(-1)[distinct(earlier * size + later)] += 1 / pairs.gap
    return None, forward + _BACKWARD * forward.T


def _joined(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, item and value of every entry of rows with items int64 [n] and values float [n] each."""
    row = np.repeat([row for row, _, _ in parts], [len(items) for _, items, _ in parts]).astype(np.int64)
    items = np.concatenate([np.zeros(0, np.int64), *(items for _, items, _ in parts)])
    return row, items, np.concatenate([np.zeros(0), *(values for _, _, values in parts)])


def _dense(rows: Interactions, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """X_u and Y_u, float64 [rows, n]."""
    inputs, outputs = np.zeros((len(rows), len(items))), np.zeros((len(rows), len(items)))
    row = np.repeat(np.arange(len(rows)), rows.histories.lengths)
    np.add.at(inputs, (row, np.searchsorted(items, rows.histories.values)), DEFAULTS.fit_decay**rows.histories.ages)
    outputs[np.arange(len(rows)), np.searchsorted(items, rows.targets)] = 1
    return inputs, outputs
