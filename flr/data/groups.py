"""Groups of items that occur together: how many interests a log tells apart, without a model.

Two items are a pair where more users have both than independence explains,

    P(Poisson(d_i d_j / sum d) >= n_ij) · C (C - 1) / 2 < false_pairs       d_i = sum_j n_ij

so that of all pairs of the catalogue at most ``false_pairs`` are expected by chance; a group is what pairs connect.
Groups tell interests apart where some items never belong together: generated data, one catalogue of several shops.
Where tastes overlap, as in every catalogue of one shop that was tried, all items hang together, in one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from .interactions import Interactions

_MOST_ROWS, _LATEST = 100_000, 20  # rows to count in, items of each of their histories: 200 MB of pairs
_SMALLEST = 1 / 32  # share of the catalogue: half of what a group has where there are 16, the most factors
#: Tried in turn: with few interactions an item no pair is certain, and where users have items of one shop alone none of
#: many uncertain ones is false either.
_LEVELS = tuple(0.5 * 10**power for power in range(7))


@dataclass(frozen=True, eq=False)
class InterestGroups:
    """What :func:`interest_groups` found.

    Attributes:
        group: int32 [C], the group of every item, from 0 for the largest, or -1.
        pairs: how many pairs of items connect them.
    """

    group: np.ndarray
    pairs: int

    @property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.group.max(initial=-1)) + 1

    @property
    def covered(self) -> float:
        """Share of the items that belong to a group."""
        return float((self.group >= 0).mean())

    @property
    def tell_apart(self) -> bool:
        """Whether two groups or more have half of the items."""
        return self.count > 1 and self.covered >= 0.5


def interest_groups(train: Interactions, num_items: int, false_pairs: float | None = None) -> InterestGroups:
    """Groups of at least a 32nd of the items.

    Args:
        train: rows to count in, each user's pairs of items once: of each the latest 20 items and the target, and
            100,000 rows, evenly spread, where there are more.
        num_items: C.
        false_pairs: pairs that chance alone may make in the whole catalogue, > 0. One false pair joins two groups, so
            the default is the least of 0.5, 5, ... 500,000 by which two groups or more have half of the items, or 0.5
            where none does.

    Raises:
        ValueError: ``false_pairs`` or ``num_items`` out of range.

    Example:
        >>> from flr.data import planted_dataset
        >>> dataset = planted_dataset(num_items=120, num_users=1500, num_interests=3)
        >>> found = interest_groups(dataset.train, 120)
        >>> found.count, found.covered
        (3, 1.0)
    """
    from scipy.stats import poisson  # a server and a worker do without

    from .features import cooccurrence

    if false_pairs is not None and false_pairs <= 0:
        raise ValueError(f"false_pairs: expected more than 0, got {false_pairs}")
    counts = cooccurrence(_bounded(train), num_items, decay=1.0, backward=1.0)
    degree = np.asarray(counts.sum(1)).ravel() - counts.diagonal()
    upper = sp.triu(counts, 1).tocoo()
    expected = degree[upper.row] * degree[upper.col] / max(degree.sum(), 1.0)
    chance = poisson.sf(upper.data - 1, expected) * (num_items * (num_items - 1) / 2)
    levels = _LEVELS if false_pairs is None else (false_pairs,)
    tried = []
    for level in levels:
        tried.append(_connected(upper, chance < level))
        if tried[-1].tell_apart:
            return tried[-1]
    return tried[0]


def _bounded(train: Interactions) -> Interactions:
    """So many rows, and so many items of each, that their pairs fit in memory."""
    rows = train.spread(_MOST_ROWS)
    ends = rows.histories.offsets[1:]
    latest = rows.histories.slice(np.maximum(rows.histories.offsets[:-1], ends - _LATEST), ends)
    return Interactions(rows.users, latest, rows.targets)


def _connected(counts: sp.coo_matrix, kept: np.ndarray) -> InterestGroups:
    """What those pairs connect that are ``kept``, bool [pairs]."""
    from scipy.sparse.csgraph import connected_components

    items = counts.shape[0]
    graph = sp.coo_matrix((np.ones(kept.sum()), (counts.row[kept], counts.col[kept])), shape=counts.shape)
    _, label = connected_components(graph, directed=False)
    size = np.bincount(label, minlength=1)
    order = np.argsort(-size, kind="stable")
    large = order[size[order] >= max(2, items * _SMALLEST)]
    number = np.full(len(size), -1, np.int32)
    number[large] = np.arange(len(large))
    return InterestGroups(number[label], int(kept.sum()))
