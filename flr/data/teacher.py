"""A teacher without layers: part of a row's target is what item-kNN or a linear model answers to the history.

    t(i | row) = (1 - weight) [i is the row's target] + weight · q(i | history)
    q(i | h)   ∝ max(score_i(h), 0)^(1 / temperature)      of the ``top`` largest scores

Knowledge distillation (Hinton, Vinyals, Dean, 2015, "Distilling the Knowledge in a Neural Network") from a model that
is fitted in one step. What it adds to a single target is which other items would have fitted, over the whole
catalogue. A user is answered as if the teacher had not seen that user's rows (:mod:`flr.data.left_out`), whose targets
it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .csr import CSR
from .interactions import Interactions
from .left_out import LeftOut
from .linear_items import MOST_LINEAR_ITEMS

METHODS = {"linear": LeftOut.linear, "item-knn": LeftOut.item_knn}
_TRIED = 4096  # rows by which auto chooses


class Taught(NamedTuple):
    """The teacher's part of B targets."""

    items: np.ndarray  # int32 [B, n], in no order
    weights: np.ndarray  # float32 [B, n], of a row their sum is the teacher's weight, or 0 where it knows nothing


class Teacher:
    """What :class:`flr.data.Augment` takes as ``teacher``.

    Args:
        left_out: who answers.
        weight: the teacher's share of a target, in (0, 1].
        temperature: of its answers, > 0; below 1 sharpens.
        top: items of an answer, >= 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> train = Interactions(["ann", "bob", "cho"], [[0], [0], [0]], [1, 1, 2])
        >>> taught = Teacher.fit(train, 3, method="item-knn", temperature=1.0)(["ann"], CSR.from_rows([[0]]))
        >>> sorted(zip(taught.items[0].tolist(), taught.weights[0].tolist()))[-2:]  # of bob and cho
        [(1, 0.25), (2, 0.25)]
    """

    def __init__(self, left_out: LeftOut, weight: float = 0.5, temperature: float = 0.5, top: int = 100) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"weight: expected more than 0 and at most 1, got {weight}")
        if not 0 < temperature < np.inf:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        if top < 1:
            raise ValueError(f"top: expected at least 1, got {top}")
        self.left_out, self.weight, self.temperature = left_out, weight, temperature
        self.top = min(top, len(left_out.table))

    @classmethod
    def fit(cls, train: Interactions, num_items: int, method: str = "auto", **options: Any) -> Teacher:
        """Fit who answers.

        Args:
            train: rows to learn from. num_items: C.
            method: "linear" (:func:`flr.data.fit_linear`; at most ``MOST_LINEAR_ITEMS`` items), "item-knn", or "auto":
                the one that ranks targets of ``train`` better without their users' rows; item-kNN where there are too
                many items for the other.
            options: ``weight``, ``temperature`` and ``top``.

        Raises:
            ValueError: an argument out of range.
        """
        if method not in ("auto", *METHODS):
            raise ValueError(f"method: expected auto or one of {', '.join(METHODS)}, got {method!r}")
        methods = METHODS if num_items <= MOST_LINEAR_ITEMS else ("item-knn",)
        found = [METHODS[name](train, num_items) for name in (methods if method == "auto" else (method,))]
        rows = train.spread(_TRIED)
        best = max(found, key=lambda left_out: _ndcg(left_out, rows)) if len(found) > 1 else found[0]
        return cls(best, **options)

    def follows_from(self) -> Iterator[Any]:
        """What its answers follow from, for a digest; not what was solved, whose last bits are a processor's."""
        rows = self.left_out.train
        yield from (self.left_out.name, len(self.left_out.table), self.weight, self.temperature, self.top)
        yield from (*rows.histories, rows.targets, *rows.users)

    def __call__(self, users: Sequence[str], histories: CSR) -> Taught:
        """The teacher's part of the targets of rows of these users, B of each.

        A row's part depends on its user and its history alone.
        """
        items = np.zeros((len(users), self.top), np.int32)
        weights = np.zeros((len(users), self.top), np.float32)
        found = self.left_out.scores(users, histories)
        for row, (first, last) in enumerate(pairwise(found.indptr.tolist())):
            known, scores = _largest(found.indices[first:last], found.data[first:last], self.top)
            if len(known):
                shares = (scores / scores.max()) ** (1 / self.temperature)
                items[row, : len(known)] = known
                weights[row, : len(known)] = self.weight * shares / shares.sum()
        return Taught(items, weights)


def draw(taught: Taught, targets: np.ndarray, places: np.ndarray) -> np.ndarray:
    """One item of each row's whole distribution: its target (int32 [B]), or one of the teacher's.

    Args:
        taught: of B rows. targets: int32 [B]. places: float64 [B], uniform in [0, 1).
    """
    share = taught.weights.cumsum(1, dtype=np.float64)
    column = (share <= places[:, None]).sum(1)
    own = column >= share.shape[1]
    drawn = taught.items[np.arange(len(targets)), np.minimum(column, share.shape[1] - 1)]
    return np.where(own, targets, drawn).astype(np.int32)


def _ndcg(left_out: LeftOut, rows: Interactions) -> float:
    """Mean NDCG@10 of the targets of ``rows``; ties against them, scores of 0 and below count as no answer."""
    total = 0.0
    scores = left_out.scores(rows.users, rows.histories)
    for (first, last), target in zip(pairwise(scores.indptr.tolist()), rows.targets.tolist(), strict=True):
        items, own = scores.indices[first:last], scores.data[first:last]
        level = own[items == target]
        if level.size and level[0] > 0 and (rank := int((own >= level[0]).sum())) <= 10:
            total += 1 / np.log2(rank + 1)
    return total / max(1, len(rows))


def _largest(items: np.ndarray, scores: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Those with the ``top`` largest scores above 0."""
    if len(scores) > top:
        kept = np.argpartition(scores, len(scores) - top)[len(scores) - top :]
        items, scores = items[kept], scores[kept]
    above = scores > 0
    return items[above], scores[above]
