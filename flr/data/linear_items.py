"""A linear item-item model: the next item by ridge regression on the history, in one step and without an optimiser.

    X_rj  = fit_decay^age of item j in the history of training row r, or 0       age 0 for the latest item
    Y_rj  = 1 for the row's target
    G, R  = Xᵀ X, Xᵀ Y
    M     = ((1 + backward) G + λ I)⁻¹ (R + backward Rᵀ)       λ = ridge · mean diagonal of (1 + backward) G
    score = as of item-kNN (:mod:`flr.data.item_knn`), by this M

With backward = 0 that is the regression of targets on histories, min_M |X M - Y|² + λ |M|² (SLIT of Choi et al., 2021,
"Session-aware Linear Item-Item Models for Session-based Recommendation"; EASE of Steck, 2019, regresses a history on
itself). Rᵀ is the regression read backwards, what came before an item, with G in place of the Gram matrix of the times
that follow it. Where item-kNN counts an item's popular companions again for each item of a history, (…)⁻¹ takes out
what those items say of each other, hence the negative weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from .interactions import Interactions
from .item_knn import NeighbourTable

#: Two dense matrices of C² float32, 5 GB at this bound, and time that grows as C³.
MOST_LINEAR_ITEMS = 25_000

_ROWS = 1 << 20  # training rows that are multiplied at a time
_ITEMS = 512  # rows of M that are made at a time


class LinearSettings(NamedTuple):
    """What M depends on beside the rows; see :func:`fit_linear`."""

    history_decay: float
    fit_decay: float
    backward: float
    ridge: float
    top: int | None


DEFAULTS = LinearSettings(history_decay=0.8, fit_decay=0.9, backward=0.5, ridge=4.0, top=100)


def fit_linear(
    train: Interactions,
    num_items: int,
    history_decay: float = DEFAULTS.history_decay,
    fit_decay: float = DEFAULTS.fit_decay,
    backward: float = DEFAULTS.backward,
    ridge: float = DEFAULTS.ridge,
    top: int | None = DEFAULTS.top,
) -> NeighbourTable:
    """Solve for M.

    The defaults had the best NDCG@10 on a third of the valid rows of instruments, and ``ridge`` on amazon-cds and
    amazon-office as well (docs/log.md).

    Args:
        train: rows to fit.
        num_items: C, at most ``MOST_LINEAR_ITEMS``.
        history_decay: in (0, 1], of a history that is scored. fit_decay: in (0, 1], of those of ``train``.
        backward: weight of what came before an item against what followed it, >= 0.
        ridge: λ in mean diagonals, > 0.
        top: keep the entries of each row of M that are largest without their sign, that many; all for None.

    Returns:
        The table, whose weights may be negative: scores below 0 are probabilities of 0.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> train = Interactions(["u", "u", "v"], [[0], [0, 1], [1]], [1, 2, 2])
        >>> table = fit_linear(train, 3, backward=0.0)
        >>> table.similarity.toarray().astype(float).round(2).tolist()
        [[0.0, 0.15, 0.1], [0.0, -0.02, 0.27], [0.0, 0.0, 0.0]]
    """
    return solve(train, num_items, LinearSettings(history_decay, fit_decay, backward, ridge, top))[0]


def solve(train: Interactions, num_items: int, settings: LinearSettings) -> tuple[NeighbourTable, np.ndarray]:
    """The table of :func:`fit_linear`, and ((1 + backward) G + λ I)⁻¹, float32 [C, C]."""
    _check(train, num_items, settings)
    history_decay, fit_decay, backward, ridge, top = settings
    popularity = np.bincount(train.targets, minlength=num_items).astype(np.float64)
    gram, forward = _products(train, num_items, fit_decay)
    gram *= 1 + backward
    level = float(gram.diagonal().mean())
    gram.diagonal().add_(ridge * level if level > 0 else 1.0)  # no histories: M is 0, whatever λ
    factor = torch.linalg.cholesky(gram)
    del gram
    inverse = torch.cholesky_inverse(factor)  # a third of the operations that solving for C rows takes
    del factor
    asked = (forward + backward * forward.T).T.tocsr()  # transposed
    kept = num_items if top is None else min(top, num_items)
    parts = [_rows_of(inverse, asked, first, kept) for first in range(0, num_items, _ITEMS)]
    return NeighbourTable(sp.vstack(parts, format="csr"), popularity, history_decay), inverse.numpy()


def _check(train: Interactions, num_items: int, settings: LinearSettings) -> None:
    history_decay, fit_decay, backward, ridge, top = settings
    if train.max_index >= num_items:
        raise ValueError(f"num_items: expected above the largest item index {train.max_index}, got {num_items}")
    if num_items > MOST_LINEAR_ITEMS:
        bound = f"at most {MOST_LINEAR_ITEMS:,}, whose square is held in memory"
        raise ValueError(f"num_items: expected {bound}, got {num_items:,}; item-kNN takes any number")
    for name, decay in (("history_decay", history_decay), ("fit_decay", fit_decay)):
        if not 0 < decay <= 1:
            raise ValueError(f"{name}: expected more than 0 and at most 1, got {decay}")
    if not (0 <= backward < np.inf):
        raise ValueError(f"backward: expected at least 0, got {backward}")
    if not (0 < ridge < np.inf):
        raise ValueError(f"ridge: expected more than 0, got {ridge}")
    if top is not None and top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")


def _products(train: Interactions, num_items: int, decay: float) -> tuple[torch.Tensor, sp.csr_matrix]:
    """G, dense float32 [C, C], and R, CSR [C, C] of float64."""
    gram = torch.zeros(num_items, num_items)
    forward = sp.csr_matrix((num_items, num_items))
    for first in range(0, len(train), _ROWS):
        rows = train.select(np.arange(first, min(first + _ROWS, len(train))))
        values, offsets = rows.histories.values, rows.histories.offsets
        inputs = sp.csr_matrix((decay**rows.histories.ages, values, offsets), shape=(len(rows), num_items))
        places = np.arange(len(rows) + 1)
        outputs = sp.csr_matrix((np.ones(len(rows)), rows.targets, places), shape=(len(rows), num_items))
        product = (inputs.T @ inputs).tocoo()
        at = torch.from_numpy(product.row.astype(np.int64) * num_items + product.col)
        gram.view(-1).index_add_(0, at, torch.from_numpy(product.data.astype(np.float32)))
        forward = forward + (inputs.T @ outputs).tocsr()
    return gram, forward


def _rows_of(inverse: torch.Tensor, asked: sp.csr_matrix, first: int, top: int) -> sp.csr_matrix:
    """Some rows of M from ``first`` on: those of ``inverse``, times ``asked`` transposed."""
    size = len(inverse)
    rows = (asked @ inverse[first : first + _ITEMS].T.numpy()).T.astype(np.float32)  # [rows, C]
    if top < size:
        kept = np.argpartition(-np.abs(rows), top - 1, axis=1)[:, :top]
        small = np.ones_like(rows, dtype=bool)
        np.put_along_axis(small, kept, False, axis=1)
        rows[small] = 0
    return sp.csr_matrix(rows)
