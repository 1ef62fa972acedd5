"""The order of training rows: shuffled, as they stand, or in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .augment import uniforms

_ORDER, _BATCHES = 5, 6  # streams of random numbers: of rows, and of whole batches
_MEGABATCH = 50  # batches among which rows of similar length are sought, as in transformers
_FEWEST = 4  # megabatches of an epoch where it has so many batches: else its batches would be the same in every one
_RUN = 4  # batches of similar prompts among which targets of similar length are sought


class EpochSampler(Sampler[tuple[int, int]]):
    """Every row once an epoch, as pairs (epoch, row), in an order that depends on (seed, epoch) alone.

    Return it from a Trainer's ``_get_train_sampler``: the Trainer calls ``set_epoch`` before every epoch and, when it
    resumes, skips the batches already seen, so a killed run goes on with the batches that it would have had.

    Example:
        >>> sampler = EpochSampler(3, seed=0)
        >>> sampler.set_epoch(2)
        >>> sorted(sampler)
        [(2, 0), (2, 1), (2, 2)]
    """

    def __init__(self, size: int, seed: int = 0, shuffle: bool = True) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, row) for row in self.order().tolist())

    def order(self) -> np.ndarray:
        """The rows of the epoch, int64 [size]."""
        return self._shuffled(_ORDER, self.size) if self.shuffle else np.arange(self.size)

    def _shuffled(self, stream: int, count: int) -> np.ndarray:
        key = np.array([(self.seed * 0x9E3779B1 + self.epoch) % 2**64], np.uint64)
        return np.argsort(uniforms(key, stream, count)[0], kind="stable")

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the next iteration."""
        self.epoch = epoch


class LengthGroupedSampler(EpochSampler):
    """Every row once an epoch, rows of similar length in one batch: a function of seed, epoch, lengths and batch.

    Rows are shuffled and cut into megabatches of up to 50 batches (fewer where the epoch would have fewer than four
    megabatches). A megabatch is sorted by prompt length, and each four of its batches by target length; then the
    epoch's batches are shuffled. The longest prompt's batch comes first, so that memory that does not suffice shows at
    once. The rows that are left over for an incomplete last batch are a random choice, the longest prompt excepted.

    Args:
        lengths: int64 [rows], tokens of the rows' prompts.
        batch: rows of a global step's batch, over all processes: each takes its part of rows that are alike, and none
            waits for another one's longer rows.
        targets: int64 [rows], tokens of the rows' targets; None where they are equal.
        seed: of the order.

    Raises:
        ValueError: ``batch`` below 1, or ``targets`` for other rows than ``lengths``.

    Example:
        >>> sampler = LengthGroupedSampler(np.array([3, 9, 4, 8, 3, 9, 4, 8]), batch=2)
        >>> rows = [row for _, row in sampler]
        >>> sorted(rows), 1 in rows[:2] or 5 in rows[:2]
        ([0, 1, 2, 3, 4, 5, 6, 7], True)
    """

    def __init__(self, lengths: np.ndarray, batch: int, targets: np.ndarray | None = None, seed: int = 0) -> None:
        super().__init__(len(lengths), seed)
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        if targets is not None and len(targets) != len(lengths):
            raise ValueError(f"targets: expected a length for each of {len(lengths)} rows, got {len(targets)}")
        self.lengths, self.batch, self.targets = lengths, batch, targets

    def order(self) -> np.ndarray:
        order = self._shuffled(_ORDER, self.size)
        whole = self.size // self.batch * self.batch  # rows in complete batches
        if whole == 0:
            return order
        longest = int(self.lengths[order].argmax())
        order[[0, longest]] = order[[longest, 0]]  # so that it is in a complete batch
        rows, place = order[:whole], np.arange(whole)
        size = max(1, min(whole // (_FEWEST * self.batch), _MEGABATCH)) * self.batch
        megabatch = place // size
        first = rows[0]
        rows = rows[np.lexsort((self.lengths[rows], megabatch))]
        if self.targets is not None:
            run = place % size // (_RUN * self.batch)
            rows = rows[np.lexsort((self.targets[rows], run, megabatch))]
        batches = rows.reshape(-1, self.batch)[self._shuffled(_BATCHES, whole // self.batch)]
        here = int((batches == first).any(1).argmax())
        batches[[0, here]] = batches[[here, 0]]
        return np.concatenate([batches.reshape(-1), order[whole:]])
