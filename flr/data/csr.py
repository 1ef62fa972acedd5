"""Rows of different lengths in two arrays, and what is counted over them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class CSR(NamedTuple):
    """Rows of different lengths in two arrays: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray  # int32 [total]
    offsets: np.ndarray  # int64 [rows + 1]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> CSR:
        """Join rows of integers.

        >>> CSR.from_rows([[3, 1], [], [2]]).offsets.tolist()
        [0, 2, 2, 3]
        """
        arrays = [np.asarray(row) for row in rows]
        for position, array in enumerate(arrays):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"rows[{position}]: expected integers [n], got {array.dtype} {list(array.shape)}")
        filled = [array for array in arrays if array.size]
        joined = np.concatenate(filled) if filled else np.zeros(0, np.int32)
        return cls(as_int("rows", joined, np.int32), offsets_of([len(array) for array in arrays]))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]."""
        return np.diff(self.offsets)

    @property
    def ages(self) -> np.ndarray:
        """How many places before its row's end each value stands, int64: 0 for the last."""
        return np.repeat(self.offsets[1:], self.lengths) - 1 - np.arange(len(self.values))

    def row(self, index: int) -> np.ndarray:
        """Row ``index``, a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: np.ndarray) -> CSR:
        """The rows at ``indices`` (int64 [n]), in that order."""
        return self.slice(self.offsets[indices], self.offsets[np.asarray(indices) + 1])

    def slice(self, starts: np.ndarray, ends: np.ndarray) -> CSR:
        """Rows ``values[starts[i]:ends[i]]`` copied side by side; starts, ends int64 [n]."""
        lengths = ends - starts
        offsets = offsets_of(lengths)
        source = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
        return CSR(self.values[source], offsets)


def numbered(values: Iterable[Hashable]) -> np.ndarray:
    """int64 [n]: equal values get equal numbers, 0.. in order of first appearance.

    >>> numbered(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def distinct_texts(values: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Different values, ascending, and the place among them of each one, int64 [n].

    What ``numpy.unique`` gives, whose array has for every text the room of the longest one.

    >>> names, places = distinct_texts(["b", "a", "b"])
    >>> names, places.tolist()
    (['a', 'b'], [1, 0, 1])
    """
    values = list(values)
    names = sorted(set(values))
    place = {name: number for number, name in enumerate(names)}
    return names, np.fromiter(map(place.__getitem__, values), np.int64, len(values))


def distinct(values: np.ndarray) -> np.ndarray:
    """Different values [m] of ``values`` [n], ascending.

    What ``numpy.unique`` gives, which hashes integers before it sorts them: many times as slow for millions of keys of
    which most are different, and about level where few are.

    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    ordered = np.sort(values)
    return ordered[np.concatenate((np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]))]


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where rows of these lengths begin and end when they stand side by side, int64 [rows + 1]."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def places_within(lengths: np.ndarray) -> np.ndarray:
    """The place in its row of every value of rows of these lengths (int64 [rows]), int64 [total].

    >>> places_within(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


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


def as_int(name: str, values: Any, dtype: type[np.signedinteger[Any]]) -> np.ndarray:
    """``values`` as a one-dimensional array of ``dtype``; ValueError where that would change a value."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, dtype)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got dtype {array.dtype}")
    limits = np.iinfo(dtype)
    if array.min() < limits.min or array.max() > limits.max:
        raise ValueError(f"{name}: expected values that fit {np.dtype(dtype)}, got {array.min()}..{array.max()}")
    return array.astype(dtype, copy=False)


def check_whole(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    """ValueError for what is no whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}: expected a whole number, got {value!r:.80}")
    if not least <= value <= most:
        wanted = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
