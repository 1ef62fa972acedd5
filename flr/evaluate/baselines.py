"""Rankers to stand beside every result: popularity, item-kNN, a linear item-item model. Fitted on training rows alone.

All have ``scores(histories)`` (what :func:`flr.evaluate.evaluate_scorer` takes) and ``ranks(interactions)``; ties
count against them as they do against models.
"""

from __future__ import annotations

import numpy as np
import torch

from flr.data import CSR, Interactions, NeighbourTable, fit_linear

from .metrics import ranks_from_scores, within_memory


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
        batch_size = within_memory(batch_size, self.num_items)
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
    """Items that followed the history's items, near ones and recent ones counting more: :mod:`flr.data.item_knn`.

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
        self.table = NeighbourTable.fit(train, num_items, history_decay, backward)

    def scores(self, histories: CSR) -> np.ndarray:
        return self.table.scores(histories)


class LinearItems(_Baseline):
    """Items by a ridge regression of targets on histories: :func:`flr.data.fit_linear`, with its defaults.

    Args:
        train: rows to fit.
        num_items: C, at most 25,000: C² float32 twice in memory.

    >>> train = Interactions(["u", "u", "v"], [[0], [0, 1], [1]], [1, 2, 2])
    >>> int(LinearItems(train, 3).scores(CSR.from_rows([[1]])).argmax())
    2
    """

    name = "linear"

    def __init__(self, train: Interactions, num_items: int) -> None:
        super().__init__(train, num_items)
        self.table = fit_linear(train, num_items)

    def scores(self, histories: CSR) -> np.ndarray:
        return self.table.scores(histories)
