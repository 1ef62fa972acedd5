"""Who stands beside whom: pairs of places in one row's sequence, its history and then its target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .interactions import Interactions


class Pairs(NamedTuple):
    """Pairs of places that lie ``gap`` apart: number of the row, earlier and later item, int64 [p] each."""

    gap: int
    row: np.ndarray
    earlier: np.ndarray
    later: np.ndarray


def item_pairs(rows: Interactions) -> Iterator[Pairs]:
    """All ordered pairs of places of every row, gap by gap, from neighbours on.

    >>> [(p.gap, p.earlier.tolist(), p.later.tolist()) for p in item_pairs(Interactions(["u"], [[3, 5]], [7]))]
    [(1, [3, 5], [5, 7]), (2, [3], [7])]
    """
    offsets = rows.histories.offsets
    items = np.insert(rows.histories.values.astype(np.int64), offsets[1:], rows.targets)
    lengths = np.diff(offsets) + 1
    row = np.repeat(np.arange(len(rows)), lengths)
    for gap in range(1, int(lengths.max(initial=1))):
        first = np.flatnonzero(row[gap:] == row[:-gap])
        yield Pairs(gap, row[first], items[first], items[first + gap])
