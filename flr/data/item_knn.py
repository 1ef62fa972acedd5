"""Item-kNN: what followed the items of a history in the training rows. A ranker without learning, and a part of others.

    A_ij     = sum over distinct (user, i, j, d) of 1 / d      j stands d places after i in a row of the user's
    M        = A + backward · Aᵀ
    score_j  = sum over history items i of history_decay^age(i) · M_ij       age 0 for the latest item

plus a trace of popularity, which orders what is level otherwise. Rows of one user overlap, hence the distinct. The
sequence of a row is its history and its target.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flr.files import atomic_file, check_regular, shown

from .csr import CSR, distinct, numbered
from .interactions import Interactions
from .pairs import item_pairs

KNN_NAME = "item_knn.safetensors"
#: Neighbours that are kept of an item where nothing else is asked for.
KEPT_NEIGHBOURS = 500

_FORMAT = "flr-item-knn-1"
_SIGNED_FORMAT = "flr-item-knn-2"  # with negative weights, which version 1 refuses
_BLOCK = 1 << 21  # pairs of places whose users are told apart at a time
_PAIRS = 1 << 22  # pairs of places that are counted at a time
_TIE_BREAK = 1e-6  # share of the score that popularity decides: below any co-occurrence weight
_ARRAYS = {"offsets": torch.int64, "items": torch.int32, "weights": torch.float32, "popularity": torch.float32}
_MAX_METADATA = 1 << 12  # characters

PathLike: TypeAlias = "str | os.PathLike[str]"


class NeighbourTable:
    """The matrix M of item-kNN, and what scores a catalogue by it.

    Args:
        similarity: M, CSR [C, C] of float32 or float64, finite; at least 0, but for a table of
            :func:`flr.data.fit_linear`.
        popularity: float [C], how often each item is a training target.
        history_decay: in (0, 1].

    Example:
        >>> train = Interactions(["u", "u", "v"], [[0], [0, 1], [1]], [1, 2, 2])
        >>> table = NeighbourTable.fit(train, 3, backward=0.0)
        >>> table.scores(CSR.from_rows([[1]])).round(3).tolist()
        [[0.0, 0.0, 2.0]]
        >>> table.probabilities(CSR.from_rows([[1], [2]])).round(3).tolist()  # nothing followed item 2: popularity
        [[0.0, 0.0, 1.0], [0.0, 0.333, 0.667]]
    """

    def __init__(self, similarity: sp.csr_matrix, popularity: np.ndarray, history_decay: float = 0.6) -> None:
        if not 0 < history_decay <= 1:
            raise ValueError(f"history_decay: expected more than 0 and at most 1, got {history_decay}")
        size = len(popularity)
        if similarity.shape != (size, size):
            raise ValueError(f"similarity: expected {size} × {size}, as many as popularity has, got {similarity.shape}")
        self.similarity, self.popularity, self.history_decay = similarity, popularity, history_decay

    @classmethod
    def fit(
        cls,
        train: Interactions,
        num_items: int,
        history_decay: float = 0.6,
        backward: float = 0.5,
        top: int | None = None,
    ) -> NeighbourTable:
        """Count in ``train``.

        Items are worked off in ranges, each in a pass over ``train``, so that beside the rows of M that are kept only
        some half a gigabyte is in memory: the pairs of 2²² places, or of one item where it has more. With ``top``, M
        has at most 12 · C · ``top`` bytes, twice while its parts are joined.

        Args:
            train: rows to count in.
            num_items: C.
            history_decay: in (0, 1].
            backward: weight of co-occurrence against the order, >= 0.
            top: keep the largest entries of each row of M, that many; all for None.
        """
        if train.max_index >= num_items:
            raise ValueError(f"num_items: expected above the largest item index {train.max_index}, got {num_items}")
        if backward < 0:
            raise ValueError(f"backward: expected at least 0, got {backward}")
        if top is not None and top < 1:
            raise ValueError(f"top: expected at least 1, got {top}")
        similarity = _similarity(train, num_items, backward, top)
        popularity = np.bincount(train.targets, minlength=num_items).astype(np.float64)
        return cls(similarity, popularity, history_decay)

    def __len__(self) -> int:
        """C."""
        return len(self.popularity)

    def padded(self, num_items: int) -> NeighbourTable:
        """The table of a catalogue that has grown to ``num_items``, which says nothing of the new ones."""
        if num_items < len(self):
            raise ValueError(f"num_items: expected at least {len(self)}, got {num_items}")
        matrix = self.similarity.tocsr().copy()
        matrix.resize((num_items, num_items))
        return type(self)(matrix, np.pad(self.popularity, (0, num_items - len(self))), self.history_decay)

    def scores(self, histories: CSR) -> np.ndarray:
        """Float64 [B, C], higher is better. Of M only the rows of the histories' items are read."""
        rows = len(histories.offsets) - 1
        row = np.repeat(np.arange(rows), np.diff(histories.offsets))
        scores = self.weighted(rows, row, histories.values, self.history_decay**histories.ages).toarray()
        scores += _TIE_BREAK / (1 + self.popularity.max()) * self.popularity
        return scores

    def weighted(self, rows: int, row: np.ndarray, items: np.ndarray, weights: np.ndarray) -> sp.csr_matrix:
        """W M, float64 [rows, C]; of M only the rows of these items are read.

        Args:
            rows: of W. row, items, weights: int [n], int [n], float [n], its entries; those of one place add up.
        """
        used, place = np.unique(items, return_inverse=True)
        narrow = sp.csr_matrix((weights, (row, place)), shape=(rows, len(used)))
        return narrow @ self.similarity[used].astype(np.float64)

    def probabilities(self, histories: CSR) -> np.ndarray:
        """Float64 [B, C]: scores over their sum, those below 0 as 0; popularity where nothing is known of a history.

        Raises:
            ValueError: nothing is known of the catalogue either.
        """
        scores = np.maximum(self.scores(histories), 0)
        total = scores.sum(1, keepdims=True)
        if not (total > 0).all():
            if not self.popularity.any():
                raise ValueError("item-kNN: expected training rows with a target, got none")
            scores = np.where(total > 0, scores, self.popularity)  # every item is below 0
            total = scores.sum(1, keepdims=True)
        return scores / total

    def save(self, path: PathLike) -> None:
        """Write one safetensors file, atomically."""
        matrix = self.similarity.tocsr()
        matrix.sort_indices()
        arrays = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data, self.popularity)
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
            for (name, dtype), array in zip(_ARRAYS.items(), arrays, strict=True)
        }
        signed = matrix.data.min(initial=0) < 0
        about = {"format": _SIGNED_FORMAT if signed else _FORMAT, "history_decay": self.history_decay}
        with atomic_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"flr": json.dumps(about)})

    @classmethod
    def load(cls, path: PathLike, num_items: int) -> NeighbourTable:
        """Read what :meth:`save` wrote for a catalogue of ``num_items``; ValueError where it is something else."""
        file = Path(path)
        check_regular(file, "a table of item-kNN")
        try:
            with safe_open(file, framework="pt") as stored:
                about = json.loads(_short(file, (stored.metadata() or {}).get("flr", "{}")))
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: expected a table of item-kNN, got {shown(str(error))}") from None
        kinds = {name: (array.dtype, array.dim()) for name, array in arrays.items()}
        known = about.get("format") in (_FORMAT, _SIGNED_FORMAT)
        if not known or kinds != {name: (dtype, 1) for name, dtype in _ARRAYS.items()}:
            raise ValueError(f"{file}: expected a table of item-kNN ({_FORMAT}), got {shown(about.get('format'), 40)}")
        offsets, items, weights, popularity = (arrays[name].numpy() for name in _ARRAYS)
        sizes = len(offsets) - 1, len(popularity)
        if sizes != (num_items, num_items):
            raise ValueError(f"{file}: expected a table of {num_items} items, those of the catalogue, got {sizes}")
        sound = (
            offsets[0] == 0 and offsets[-1] == len(items) == len(weights) and (np.diff(offsets) >= 0).all()
            and items.min(initial=0) >= 0 and items.max(initial=-1) < num_items
            and all(np.isfinite(x).all() for x in (weights, popularity)) and popularity.min(initial=0) >= 0
            and (about["format"] == _SIGNED_FORMAT or weights.min(initial=0) >= 0)
        )  # fmt: skip
        if not sound:
            raise ValueError(f"{file}: expected rows of item indices and finite weights, got damaged ones")
        shape = (num_items, num_items)
        matrix = sp.csr_matrix((weights, items, offsets), shape=shape)  # float32 and mapped: one copy for all processes
        decay = about.get("history_decay")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise ValueError(f"{file}: expected history_decay, got {shown(decay, 40)}")
        return cls(matrix, popularity.astype(np.float64), float(decay))


def _short(file: Path, text: Any) -> str:
    """``text`` where it is short enough to be what this module wrote."""
    if not isinstance(text, str) or len(text) > _MAX_METADATA:
        raise ValueError(f"{file}: expected metadata of at most {_MAX_METADATA} characters")
    return text


def _largest(matrix: sp.csr_matrix, top: int) -> sp.csr_matrix:
    """The ``top`` largest entries of each row; of equal ones those of lower columns."""
    matrix.sort_indices()
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, row))
    place = np.arange(len(order)) - matrix.indptr[row]  # rows stay where they are, so row is row[order]
    kept = order[place < top]
    return sp.csr_matrix((matrix.data[kept], (row[kept], matrix.indices[kept])), shape=matrix.shape)


def _similarity(train: Interactions, num_items: int, backward: float, top: int | None) -> sp.csr_matrix:
    """M of these rows, range of items by range of items."""
    user = numbered(train.users)
    by_user = np.argsort(user, kind="stable")
    rows = _Rows(train, user, by_user, np.cumsum(np.bincount(user)))
    parts = []
    for first, last in _ranges(train, num_items):
        part = _forward(rows, num_items, first, last)
        if backward:
            part = part + backward * _forward(rows, num_items, first, last, turned=True)
        part = part.tocsr()
        parts.append(part if top is None else _largest(part, top))
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    items = np.concatenate([part.indices for part in parts])
    weights = np.concatenate([part.data for part in parts])
    return sp.csr_matrix((weights, items, offsets), shape=(num_items, num_items))


def _ranges(train: Interactions, num_items: int) -> Iterator[tuple[int, int]]:
    """Ranges of items, from and to, whose rows of M come from at most ``_PAIRS`` pairs of places, or of one item."""
    length = np.diff(train.histories.offsets)
    others = np.bincount(train.histories.values, np.repeat(length, length), minlength=num_items)
    others += np.bincount(train.targets, length, minlength=num_items)
    total, first = np.cumsum(others), 0
    while first < num_items:
        before = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, before + _PAIRS, side="right")))
        yield first, last
        first = last


class _Rows(NamedTuple):
    """Training rows: the number of each one's user, their order by user, and where each user ends in it."""

    train: Interactions
    user: np.ndarray
    by_user: np.ndarray
    ends: np.ndarray


def _forward(rows: _Rows, num_items: int, first: int, last: int, turned: bool = False) -> sp.csr_matrix:
    """Rows ``first`` to ``last`` of A, or (turned) of its transpose, CSR [last - first, C].

    Pairs of places in one row count once a user. Users are worked off in blocks, so that beside the counts, whole
    numbers that do not depend on the order of addition, only a block's pairs are in memory.
    """
    train, user, by_user, ends = rows
    lengths = np.diff(train.histories.offsets)[by_user] + 1
    width = int(lengths.max(initial=1))  # above every distance
    size = (last - first) * num_items * width  # of the key of a pair without its user
    if size >= 2**63:
        raise ValueError(f"num_items: expected C² times the longest row below 2^63, got {num_items}, {width}")
    pairs = np.concatenate(([0], np.cumsum(lengths * (lengths - 1) // 2)))
    total = _Counts()
    start = first_user = 0
    while first_user < len(ends):
        last_user = int(np.searchsorted(pairs[ends], pairs[start] + _BLOCK, side="right"))
        last_user = max(first_user + 1, min(last_user, first_user + (2**63 - 1) // size))
        end = int(ends[last_user - 1])
        chosen = by_user[start:end]
        keys = [np.zeros(0, np.int64)]
        for gap, row, earlier, later in item_pairs(train.select(chosen)):
            item, other = (later, earlier) if turned else (earlier, later)
            at = np.flatnonzero((item >= first) & (item < last))
            pair = (user[chosen[row[at]]] - first_user) * (last - first) + item[at] - first
            keys.append((pair * num_items + other[at]) * width + gap)
        total.add(distinct(np.concatenate(keys)) % size)
        start, first_user = end, last_user
    different, users = total.merged()
    values, places = users / (different % width), different // width
    return sp.csr_matrix((values, (places // num_items, places % num_items)), shape=(last - first, num_items))


class _Counts:
    """How often each key came, added up in parts that are merged when they outgrow the sum."""

    def __init__(self) -> None:
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._parts: list[np.ndarray] = []
        self._waiting = 0

    def add(self, keys: np.ndarray) -> None:
        self._parts.append(keys)
        self._waiting += len(keys)
        if self._waiting > max(_BLOCK, len(self._keys)):
            self.merged()

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Different keys, ascending, and their counts."""
        new, count = np.unique(np.concatenate([self._keys[:0], *self._parts]), return_counts=True)
        self._parts, self._waiting = [], 0
        if len(new):
            at = np.searchsorted(self._keys, new)
            known = at < len(self._keys)
            known[known] = self._keys[at[known]] == new[known]
            self._counts[at[known]] += count[known]
            self._keys = np.insert(self._keys, at[~known], new[~known])
            self._counts = np.insert(self._counts, at[~known], count[~known])
        return self._keys, self._counts
