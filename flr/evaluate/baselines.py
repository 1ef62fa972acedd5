"""Two rankers without learning, to stand beside every result: popularity and item-kNN. Fitted on training rows alone.

Both have ``scores(histories)`` (what :func:`flr.evaluate.evaluate_scorer` takes) and ``ranks(interactions)``; ties
count against them as they do against models.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from flr.data import CSR, Interactions

from .metrics import ranks_from_scores

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
        _, first, second, distance = np.unique(_pairs(train), axis=1)
        forward = sp.csr_matrix((1.0 / distance, (first, second)), shape=(num_items, num_items))
        self.similarity = (forward + backward * forward.T).tocsr()  # [C, C]

    def scores(self, histories: CSR) -> np.ndarray:
        rows = len(histories.offsets) - 1
        row = np.repeat(np.arange(rows), np.diff(histories.offsets))
        age = histories.offsets[1:][row] - 1 - np.arange(len(histories.values))
        weights = sp.csr_matrix((self.history_decay**age, (row, histories.values)), shape=(rows, self.num_items))
        return (weights @ self.similarity).toarray() + _TIE_BREAK / (1 + self.popularity.max()) * self.popularity


def _pairs(train: Interactions) -> np.ndarray:
    """int64 [4, p]: user number, earlier item, later item and distance of every ordered pair of places in a row."""
    lengths = np.diff(train.histories.offsets) + 1
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    items = np.empty(offsets[-1], dtype=np.int64)
    is_target = np.zeros(len(items), dtype=bool)
    is_target[offsets[1:] - 1] = True
    items[~is_target], items[is_target] = train.histories.values, train.targets
    row = np.repeat(np.arange(len(train)), lengths)
    _, number = np.unique(np.asarray(train.users, dtype=object).astype(str), return_inverse=True)
    pairs = [np.zeros((4, 0), dtype=np.int64)]
    for distance in range(1, int(lengths.max(initial=1))):
        earlier = np.flatnonzero(row[distance:] == row[:-distance])
        users, later = number[row[earlier]], earlier + distance
        pairs.append(np.stack([users, items[earlier], items[later], np.full(len(earlier), distance)]))
    return np.concatenate(pairs, axis=1)
