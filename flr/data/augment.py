"""Training-time changes to histories, as a pure function of (seed, epoch, row).

No generator is kept: every random number is a hash of the seed, the epoch, the row and a counter. So the same draw of
the same row is changed in the same way whatever the batch, the worker process or the step of a resumed training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .csr import CSR, offsets_of, places_within
from .interactions import Interaction
from .teacher import Taught, Teacher, draw

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PREFIX, _SUFFIX, _DROP, _SHUFFLE = 1, 2, 3, 4  # streams of random numbers of one row
_SINGLE, _NEIGHBOUR, _REVERSE, _TEACHER = 6, 7, 8, 9

#: User of rows that stand for an item of the catalogue: history [i], target one of its neighbours.
CATALOGUE_USER = "<catalogue>"


class Neighbours(NamedTuple):
    """For every item, items that are likely with it (see :func:`flr.train.item_neighbours`)."""

    items: np.ndarray  # int32 [C, n]
    cumulative: np.ndarray  # float64 [C, n], running sums of their weights; the last is 1, or 0 for an item without any


@dataclass(frozen=True)
class Augment:
    """What may be changed in a training row; everything is off by default. Applied in the order listed here.

    Attributes:
        prefix: probability that a row is cut at a random place: the item there becomes the target, those before it the
            history.
        suffix: probability that only a random number of the latest items is kept.
        drop_item: probability that an item of the history is left out (where all would be, the last one stays).
        shuffle: probability that a history is shuffled locally.
        shuffle_window: how far: items that are this many places apart or more keep their order.
        single: probability that one item of the history is all that is kept, drawn with weight decay^age.
        neighbour: probability that the target is replaced: by a neighbour, drawn by weight, of an item of the prompt,
            which is drawn with weight decay^age. Soft targets, one sample at a time, for any codec. Rows of
            CATALOGUE_USER are always replaced.
        decay: of the two above, 0..1.
        neighbours: needed by ``neighbour``.
        reverse: before all others, probability that a row is read backwards, from its target to an item of the history
            that is drawn: that item becomes the target, and the items after it, the latest first, the history. Rows of
            CATALOGUE_USER stay.
        teacher: after all others, whose answer to the history that is left is a part of the target
            (:meth:`taught`); not beside ``neighbours``.

    A history never becomes empty by this. Probabilities are in 0..1.

    Example:
        >>> row = Interaction("ann", np.arange(6, dtype=np.int32), 9, row=3, epoch=0)
        >>> histories, targets = Augment(drop_item=0.5)([row], seed=1)
        >>> again, _ = Augment(drop_item=0.5)([row], seed=1)
        >>> histories.values.tolist() == again.values.tolist(), targets.tolist()
        (True, [9])
    """

    prefix: float = 0.0
    suffix: float = 0.0
    drop_item: float = 0.0
    shuffle: float = 0.0
    shuffle_window: int = 3
    single: float = 0.0
    neighbour: float = 0.0
    decay: float = 0.8
    neighbours: Neighbours | None = None
    reverse: float = 0.0
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        for name in ("reverse", "prefix", "suffix", "drop_item", "shuffle", "single", "neighbour", "decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability in 0..1, got {value}")
        if self.shuffle_window < 2:
            raise ValueError(f"shuffle_window: expected at least 2, got {self.shuffle_window}")
        if self.neighbour and self.neighbours is None:
            raise ValueError("neighbours: expected a table for neighbour > 0, got None")
        if self.teacher is not None and self.neighbours is not None:
            raise ValueError("teacher: expected None beside neighbours, which draw targets too, got a teacher")

    @property
    def enabled(self) -> bool:
        """Whether anything can change but by a teacher."""
        chances = (self.reverse, self.prefix, self.suffix, self.drop_item, self.shuffle, self.single, self.neighbour)
        return max(chances) > 0 or self.neighbours is not None

    def __call__(self, rows: Sequence[Interaction], seed: int = 0) -> tuple[CSR, np.ndarray]:
        """Changed histories and targets (int32 [B]) of ``rows``."""
        return self.with_sources(rows, seed)[:2]

    def with_sources(self, rows: Sequence[Interaction], seed: int = 0) -> tuple[CSR, np.ndarray, np.ndarray]:
        """Histories, targets, and of each replaced target the item whose neighbour it is, else -1 (int64 [B])."""
        histories = CSR.from_rows([row.history for row in rows])
        targets = np.array([row.target for row in rows], np.int32)
        sources = np.full(len(rows), -1, np.int64)
        if not self.enabled or not rows:
            return histories, targets, sources
        keys = row_keys(rows, seed)
        if self.reverse:
            histories, targets = self._reverse(rows, histories, targets, keys)
        starts, ends = histories.offsets[:-1].copy(), histories.offsets[1:].copy()
        if self.prefix:
            coin, place = uniforms(keys, _PREFIX, 2).T
            lengths = ends - starts
            chosen = np.flatnonzero((coin < self.prefix) & (lengths > 1))
            cut = 1 + (place * (lengths - 1)).astype(np.int64)  # 1..length - 1
            ends[chosen] = (starts + cut)[chosen]
            targets[chosen] = histories.values[ends[chosen]]
        if self.suffix:
            coin, place = uniforms(keys, _SUFFIX, 2).T
            lengths = ends - starts
            chosen = (coin < self.suffix) & (lengths > 1)
            starts = np.where(chosen, ends - 1 - (place * lengths).astype(np.int64), starts)  # keeps 1..length
        histories = histories.slice(starts, ends)
        if self.drop_item and histories.values.size:
            histories = self._drop(histories, keys)
        if self.shuffle and histories.values.size:
            histories = self._shuffle(histories, keys)
        if self.single:
            coin, place = uniforms(keys, _SINGLE, 2).T
            chosen = (coin < self.single) & (histories.lengths > 1)
            kept = self._draw(histories, place)
            starts = np.where(chosen, kept, histories.offsets[:-1])
            histories = histories.slice(starts, np.where(chosen, kept + 1, histories.offsets[1:]))
        if self.neighbours is not None and histories.values.size:
            targets, sources = self._neighbours(self.neighbours, rows, histories, targets, keys)
        return histories, targets, sources

    def taught(self, rows: Sequence[Interaction], histories: CSR) -> Taught | None:
        """The teacher's part of the targets of ``rows``, whose histories have become these; None without one."""
        return None if self.teacher is None else self.teacher([row.user for row in rows], histories)

    @staticmethod
    def drawn(taught: Taught, rows: Sequence[Interaction], targets: np.ndarray, seed: int = 0) -> np.ndarray:
        """One item (int32 [B]) of the distribution of each row: soft targets one sample at a time, for any codec."""
        return draw(taught, targets, uniforms(row_keys(rows, seed), _TEACHER, 1)[:, 0])

    def _reverse(
        self, rows: Sequence[Interaction], histories: CSR, targets: np.ndarray, keys: np.ndarray
    ) -> tuple[CSR, np.ndarray]:
        coin, place = uniforms(keys, _REVERSE, 2).T
        starts, ends, lengths = histories.offsets[:-1], histories.offsets[1:], histories.lengths
        whole_catalogue = np.array([row.user == CATALOGUE_USER for row in rows])
        chosen = (coin < self.reverse) & (lengths > 0) & ~whole_catalogue
        drawn = np.where(chosen, starts + (place * lengths).astype(np.int64), starts)
        kept = np.where(chosen, ends - drawn, lengths)  # of a chosen row the target and what came after the drawn item
        offsets, (row, column) = offsets_of(kept), (np.repeat(np.arange(len(kept)), kept), places_within(kept))
        if not histories.values.size:
            return histories, targets
        back = chosen[row]
        source = np.where(back, ends[row] - column, starts[row] + column)
        values = histories.values[np.minimum(source, len(histories.values) - 1)]
        values = np.where(back & (column == 0), targets[row], values).astype(np.int32)
        earlier = histories.values[np.minimum(drawn, len(histories.values) - 1)]
        return CSR(values, offsets), np.where(chosen, earlier, targets)

    def _draw(self, histories: CSR, place: np.ndarray) -> np.ndarray:
        """An index into ``histories.values`` of each row, int64 [B], with weight decay^age; an empty row's start."""
        lengths = histories.lengths
        age = np.arange(int(lengths.max(initial=1)))
        share = np.cumsum(self.decay**age)
        drawn = np.searchsorted(share, place * share[np.maximum(lengths, 1) - 1], side="right")
        drawn = np.minimum(drawn, np.maximum(lengths, 1) - 1)
        return np.where(lengths > 0, histories.offsets[1:] - 1 - drawn, histories.offsets[:-1])

    def _neighbours(
        self, table: Neighbours, rows: Sequence[Interaction], histories: CSR, targets: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        coin, place, which = uniforms(keys, _NEIGHBOUR, 3).T
        whole_catalogue = np.array([row.user == CATALOGUE_USER for row in rows])
        chosen = ((coin < self.neighbour) | whole_catalogue) & (histories.lengths > 0)
        source = histories.values[np.minimum(self._draw(histories, place), len(histories.values) - 1)]
        weights = table.cumulative[source]  # [B, n]
        chosen &= weights[:, -1] > 0
        drawn = np.minimum((weights <= which[:, None]).sum(1), weights.shape[1] - 1)
        replaced = np.where(chosen, table.items[source, drawn], targets).astype(np.int32)
        return replaced, np.where(chosen, source, -1)

    def _drop(self, histories: CSR, keys: np.ndarray) -> CSR:
        lengths, width, row, column = _cells(histories)
        keep = uniforms(keys, _DROP, width)[row, column] >= self.drop_item
        none_left = np.bincount(row, keep, minlength=len(lengths)) == 0
        keep[histories.offsets[1:][none_left & (lengths > 0)] - 1] = True
        return CSR(histories.values[keep], offsets_of(np.bincount(row[keep], minlength=len(lengths))))

    def _shuffle(self, histories: CSR, keys: np.ndarray) -> CSR:
        _, width, row, column = _cells(histories)
        draws = uniforms(keys, _SHUFFLE, width + 1)
        reach = np.where(draws[:, 0] < self.shuffle, float(self.shuffle_window), 0.0)
        place = column + reach[row] * draws[row, column + 1]
        return CSR(histories.values[np.lexsort((place, row))], histories.offsets)


def row_keys(rows: Sequence[Interaction], seed: int) -> np.ndarray:
    """One 64-bit key a row, uint64 [B], from (seed, epoch, row); a row of no data set (-1) is known by its content."""
    epochs = np.array([row.epoch for row in rows], np.uint64)
    numbers = np.array([row.row if row.row >= 0 else _content(row) for row in rows], np.uint64)
    return _mix(_mix(_mix(np.full(len(rows), seed % 2**64, np.uint64)) + epochs) + numbers)


def uniforms(keys: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Random numbers in [0, 1), float64 [B, count], for the keys (uint64 [B]) of rows."""
    counters = _mix(np.arange(count, dtype=np.uint64) + (np.uint64(stream) << np.uint64(32)))
    return (_mix(keys[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64 arrays; sums wrap around."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _content(row: Interaction) -> int:
    data = np.append(np.asarray(row.history, "<i4"), np.array(row.target, "<i4")).astype("<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _cells(histories: CSR) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Lengths, the longest, and row and column of every value."""
    lengths = histories.lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    return lengths, int(lengths.max()), row, places_within(lengths)
