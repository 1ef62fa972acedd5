"""Two rankers without learning, to stand beside every result: popularity and item-kNN. Fitted on training rows alone.

Both have ``scores(histories)`` (what :func:`flr.evaluate.evaluate_scorer` takes) and ``ranks(interactions)``; ties
count against them as they do against models.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from flr.data import CSR, Interactions
from flr.data.interactions import numbered
from flr.data.pairs import item_pairs

from .metrics import ranks_from_scores

_BLOCK = 1 << 21  # pairs of places at a time
_TIE_BREAK = 1e-6  # share of the score that popularity decides: below any co-occurrence weight


class _Baseline:
    name: str
    num_items: int

    def __init__(self, train: Interactions, num_items: int) -> None:
        if train.max_index >= num_items:
            raise ValueError(f"num_items: expected above the largest item index {train.max_index}, got {num_items}")
        self.num_items = num_items
        self.popularity = np.bincount(train.targets, minlength=num_items).astype(np.float64)

    def scores(self, histories: CSR) -> np.ndarray:
        """Float [B, C], higher is better."""
        raise NotImplementedError

    def ranks(self, interactions: Interactions, groups: np.ndarray | None = None, batch_size: int = 256) -> np.ndarray:
        """int64 [n] ranks of the targets, by item, or by title given ``group_ids`` of the titles."""
        by = None if groups is None else torch.from_numpy(groups)
        parts = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(interactions), batch_size):
            part = interactions.select(np.arange(start, min(start + batch_size, len(interactions))))
            targets, scores = part.targets.astype(np.int64), self.scores(part.histories)
            parts.append(ranks_from_scores(torch.from_numpy(scores), torch.from_numpy(targets), by).numpy())
        return np.concatenate(parts)


class Popularity(_Baseline):
    """Items by how often they are a training target.

    On the test rows in ``$FLR_DATA`` (H@5, H@10, N@5, N@10):
        amazon-cds .0049 .0099 .0029 .0046    amazon-office .0269 .0403 .0157 .0197

    >>> train = Interactions(["u", "v"], [[0], [1]], [2, 2])
    >>> Popularity(train, 3).scores(CSR.from_rows([[0]])).tolist()
    [[0.0, 0.0, 2.0]]
    """

    name = "popularity"

    def scores(self, histories: CSR) -> np.ndarray:
        return np.broadcast_to(self.popularity, (len(histories.offsets) - 1, self.num_items)).copy()


class ItemKNN(_Baseline):
    """Items that followed the history's items, near ones and recent ones counting more.

        A_ij     = sum over distinct (user, i, j, d) of 1 / d      j stands d places after i in a row of the user's
        M        = A + backward · Aᵀ
        score_j  = sum over history items i of history_decay^age(i) · M_ij       age 0 for the latest item

    plus a trace of popularity, which orders what is level otherwise. Rows of one user overlap, hence the distinct. The
    sequence of a row is its history and its target.

    On the test rows in ``$FLR_DATA`` (H@5, H@10, N@5, N@10), amazon-cds and amazon-office:
        defaults, chosen by NDCG@10 on validation rows    .0637 .0801 .0502 .0555    .1264 .1457 .1028 .1090
        backward=0, history_decay=0.8: only what came next    .0609 .0763 .0481 .0531    .1171 .1323 .0965 .1014
    The second is within .0017 of the reference points that the data's README gives, the first is the harder mark.

    Args:
        train: rows to count in.
        num_items: C.
        history_decay: in (0, 1].
        backward: weight of co-occurrence against the order, >= 0.

    >>> train = Interactions(["u", "u", "v"], [[0], [0, 1], [1]], [1, 2, 2])
    >>> ItemKNN(train, 3, backward=0.0).scores(CSR.from_rows([[1]])).round(3).tolist()
    [[0.0, 0.0, 2.0]]
    """

    name = "item-kNN"

    def __init__(self, train: Interactions, num_items: int, history_decay: float = 0.6, backward: float = 0.5) -> None:
        super().__init__(train, num_items)
        if not 0 < history_decay <= 1:
            raise ValueError(f"history_decay: expected more than 0 and at most 1, got {history_decay}")
        if backward < 0:
            raise ValueError(f"backward: expected at least 0, got {backward}")
        self.history_decay = history_decay
        first, second, distance, users = _pairs(train, num_items)
        forward = sp.csr_matrix((users / distance, (first, second)), shape=(num_items, num_items))
        self.similarity = (forward + backward * forward.T).tocsr()  # [C, C]

    def scores(self, histories: CSR) -> np.ndarray:
        rows = len(histories.offsets) - 1
        row = np.repeat(np.arange(rows), np.diff(histories.offsets))
        age = histories.offsets[1:][row] - 1 - np.arange(len(histories.values))
        weights = sp.csr_matrix((self.history_decay**age, (row, histories.values)), shape=(rows, self.num_items))
        return (weights @ self.similarity).toarray() + _TIE_BREAK / (1 + self.popularity.max()) * self.popularity


def _pairs(train: Interactions, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of places in one row, each once a user: earlier item, later item, distance, how many users; int64 [p].

    Users are worked off in blocks, so that beside the result, whole numbers that do not depend on the order of
    addition, only a block's pairs are in memory.
    """
    user = numbered(train.users)
    by_user = np.argsort(user, kind="stable")
    lengths = np.diff(train.histories.offsets)[by_user] + 1
    width = int(lengths.max(initial=1))  # above every distance
    size = num_items**2 * width  # of the key of a pair without its user
    if size >= 2**63:
        raise ValueError(f"num_items: expected C² times the longest row below 2^63, got {num_items}, {width}")
    ends = np.cumsum(np.bincount(user))  # of the users' rows, in by_user
    pairs = np.concatenate(([0], np.cumsum(lengths * (lengths - 1) // 2)))
    total = _Counts()
    start = first_user = 0
    while first_user < len(ends):
        last_user = int(np.searchsorted(pairs[ends], pairs[start] + _BLOCK, side="right"))
        last_user = max(first_user + 1, min(last_user, first_user + (2**63 - 1) // size))
        end = int(ends[last_user - 1])
        rows = train.select(by_user[start:end])
        keys = np.unique(_keys(rows, user[by_user[start:end]] - first_user, num_items, width))
        total.add(keys % size)
        start, first_user = end, last_user
    keys, users = total.merged()
    return keys // (num_items * width), keys // width % num_items, keys % width, users


def _keys(rows: Interactions, user: np.ndarray, num_items: int, width: int) -> np.ndarray:
    """int64 [p]: ((user · C + earlier item) · C + later item) · width + distance of every ordered pair of places."""
    keys = [np.zeros(0, dtype=np.int64)]
    for pairs in item_pairs(rows):
        pair = (user[pairs.row] * num_items + pairs.earlier) * num_items + pairs.later
        keys.append(pair * width + pairs.gap)
    return np.concatenate(keys)


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
