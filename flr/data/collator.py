"""Batches for supervised training, and the data set that feeds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from flr.config import IGNORE

from .augment import Augment
from .csr import CSR, numbered, places_within
from .interactions import Interaction, Interactions
from .processor import RecProcessor
from .prompt import finish_batch, left_pad
from .teacher import Taught


class SFTCollator:
    """Joins interactions to a training batch: prompts on the left, target tokens on the right.

    A row is [padding | prompt | thoughts | target | padding]; in every row the target begins in the same column.

    Args:
        processor: makes the prompts.
        augment: what to change in histories, nothing by default; use none for validation.
        seed: of the augmentation; with the epoch and the number that :class:`InteractionDataset` writes into a row it
            decides how that row is changed, so a resumed run sees the same batches.

    Example:
        >>> from flr.data import Catalogue, build_tokenizer
        >>> catalogue = Catalogue(["x", "y", "z"], ["Blue", "Green", "Red"])
        >>> processor = RecProcessor(build_tokenizer(catalogue, "id"), catalogue)
        >>> rows = InteractionDataset(Interactions(["ann", "bob"], [[0, 1], [2]], [2, 0]))
        >>> batch = SFTCollator(processor)([rows[0], rows[1]])
        >>> processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][1])
        ['<|pad|>', '<|bos|>', '<|item_2|>', '<|thought|>', '<|item_0|>']
        >>> batch["labels"].tolist()
        [[-100, -100, -100, -100, 6], [-100, -100, -100, -100, 4]]
    """

    def __init__(self, processor: RecProcessor, augment: Augment | None = None, seed: int = 0) -> None:
        self.processor = processor
        self.augment = Augment() if augment is None else augment
        self.seed = seed
        self._one_token = int(np.diff(processor.item_codec.offsets).max()) == 1

    @property
    def is_soft(self) -> bool:
        """Whether batches have soft targets."""
        return self._one_token and (self.augment.teacher is not None or self.augment.neighbours is not None)

    def __call__(self, rows: Sequence[Interaction]) -> dict[str, torch.Tensor]:
        """A batch of ``rows``.

        Returns:
            What the processor returns, now [B, L + S], and labels int64 [B, L + S]: the token where input_ids holds a
            target's token, -100 elsewhere. Where targets are drawn, from neighbours or from what a teacher says, and
            every item is one token, also soft_targets int64 and soft_weights float32 [B, n]: the tokens and weights
            that each target was drawn from, so that the expectation can stand for the draw; a row's weights sum to 1.
        """
        if not rows:
            raise ValueError("rows: expected at least one interaction, got none")
        histories, targets, sources = self.augment.with_sources(rows, self.seed)
        codec = self.processor.item_codec
        if not (targets.min() >= 0 and targets.max() < len(codec)):
            raise ValueError(f"rows: expected targets in 0..{len(codec) - 1}, got {targets.min()}..{targets.max()}")
        taught = self.augment.taught(rows, histories)
        if taught is not None and not self._one_token:
            targets = self.augment.drawn(taught, rows, targets, self.seed)
        sequences = CSR(codec.tokens, codec.offsets).take(targets)
        lengths = sequences.lengths
        longest = int(lengths.max())
        arrays = left_pad(self.processor.prompts(histories), self.processor.pad_token_id, extra=longest)
        row = np.repeat(np.arange(len(rows)), lengths)
        column = arrays["input_ids"].shape[1] - longest + places_within(lengths)
        labels = np.full_like(arrays["input_ids"], IGNORE)
        arrays["input_ids"][row, column] = labels[row, column] = sequences.values
        arrays["attention_mask"][row, column] = 1
        batch = finish_batch({**arrays, "labels": labels})
        if self.is_soft:
            items, weights = self._soft(taught, sources)
            items = np.concatenate([items, targets[:, None]], 1)
            batch["soft_targets"] = torch.from_numpy(codec.tokens[items].astype(np.int64))
            rest = np.maximum(1 - weights.sum(1, keepdims=True), 0)
            batch["soft_weights"] = torch.from_numpy(np.concatenate([weights, rest], 1).astype(np.float32))
        return batch

    def _soft(self, taught: Taught | None, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items and weights [B, n] of which targets were drawn, beside what the rows' own weigh."""
        if taught is not None:
            return taught.items, taught.weights
        table, known = self.augment.neighbours, np.maximum(sources, 0)
        assert table is not None
        return table.items[known], np.diff(table.cumulative[known], prepend=0.0, axis=1) * (sources >= 0)[:, None]


class InteractionDataset(Dataset[Interaction]):
    """Interactions for a DataLoader or ``transformers.Trainer``.

    Rows carry their number and the epoch, from which :class:`SFTCollator` derives its random numbers. The epoch comes
    with the index where that is a pair (epoch, row), as a sampler of :mod:`flr.data.sampler` gives; else it is
    the one last set by ``set_epoch`` (a DataLoader's persistent workers do not see that, so prefer the sampler).

    Example:
        >>> rows = InteractionDataset(Interactions(["ann", "bob"], [[4, 2], [7]], [5, 2]))
        >>> rows[1].row, rows[1].epoch, rows[(3, 1)].epoch
        (1, 0, 3)
    """

    def __init__(self, interactions: Interactions) -> None:
        self.interactions = interactions
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.interactions)

    def __getitem__(self, index: int | tuple[int, int]) -> Interaction:
        epoch, row = index if isinstance(index, tuple) else (self.epoch, index)
        return self.interactions[row]._replace(epoch=epoch)

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the rows given from now on."""
        self.epoch = epoch


def expand_prefixes(
    interactions: Interactions, *, min_history: int = 1, max_history: int | None = None
) -> Interactions:
    """All prefixes of the histories as further rows: after [a, b], c also after [a], b.

    The given rows come first, unchanged. A new row is left out where another row of the same user has the same target
    and a history that ends with the new row's history: rows of a log are sliding windows over one sequence, so without
    that every event would come back once a window. New rows carry the timestamp of their source: theirs, which is not
    known, is not later.

    Args:
        interactions: the rows.
        min_history: items that a new history has at least, >= 1.
        max_history: items that a new history keeps at most (the latest ones), None for all.

    Example:
        >>> rows = expand_prefixes(Interactions(["ann", "ann"], [[1, 2, 3], [2, 3, 4]], [4, 5]))
        >>> [(row.history.tolist(), row.target) for row in rows]
        [([1, 2, 3], 4), ([2, 3, 4], 5), ([1], 2), ([1, 2], 3)]
    """
    if min_history < 1:
        raise ValueError(f"min_history: expected at least 1, got {min_history}")
    if max_history is not None and max_history < min_history:
        raise ValueError(f"max_history: expected None or at least min_history ({min_history}), got {max_history}")
    values, offsets = interactions.histories
    given = len(interactions)
    extra = np.maximum(np.diff(offsets) - min_history, 0)  # new rows of every row
    source = np.repeat(np.arange(given), extra)
    starts, ends = offsets[:-1][source], offsets[:-1][source] + min_history + places_within(extra)
    targets = values[ends] if len(ends) else np.zeros(0, np.int32)
    if max_history is not None:
        starts = np.maximum(starts, ends - max_history)
    rows = np.concatenate([np.arange(given), source])
    all_starts, all_ends = np.concatenate([offsets[:-1], starts]), np.concatenate([offsets[1:], ends])
    all_targets = np.concatenate([interactions.targets, targets])
    user = numbered(interactions.users)[rows]
    groups = [user, all_targets.astype(np.int64)]
    dominated = _ends_another(values, all_starts, all_ends, groups, np.arange(len(rows)) < given)
    chosen = np.concatenate([np.arange(given), given + np.flatnonzero(~dominated[given:])])
    times = interactions.timestamps
    return Interactions(
        [interactions.users[row] for row in rows[chosen].tolist()],
        interactions.histories.slice(all_starts[chosen], all_ends[chosen]),
        all_targets[chosen],
        None if times is None else times[rows[chosen]],
    )


def _ends_another(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray, groups: list[np.ndarray], last: np.ndarray
) -> np.ndarray:
    """Whether a row ``values[start:end]`` is the ending of another row of its group (bool [rows]).

    Read backwards and sorted, a row that another one ends with begins its next neighbour. Of equal rows all but one
    count; that one is marked in ``last`` if any is.
    """
    if len(starts) == 0:
        return np.zeros(0, bool)
    width = int((ends - starts).max())
    places = ends[:, None] - 1 - np.arange(width)
    inside = places >= starts[:, None]
    backwards = np.full(places.shape, -1, np.int32)  # [rows, width], -1 past the row's beginning
    backwards[inside] = values[places[inside]]
    keys: list[Any] = [last, *(backwards[:, column] for column in reversed(range(width))), *groups]
    order = np.lexsort(keys)
    row, neighbour = order[:-1], order[1:]
    same = np.logical_and.reduce([group[row] == group[neighbour] for group in groups])
    same &= ((backwards[row] == backwards[neighbour]) | (backwards[row] < 0)).all(axis=1)
    result = np.zeros(len(starts), bool)
    result[row[same]] = True
    return result
