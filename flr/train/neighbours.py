"""Which items are likely with an item: soft targets for sparse data, from the training rows and the titles alone.

M    = flr.data.features.cooccurrence of the training rows
T_ij = M_ij + content · cos(title_i, title_j),   j ≠ i for the title's part
weights of item i: its largest T_ij, to the power 1 / temperature, normalised
"""

from __future__ import annotations

import numpy as np

from flr.data import CATALOGUE_USER, CSR, Catalogue, Interactions, Neighbours
from flr.data.features import cooccurrence, text_tfidf


def item_neighbours(
    train: Interactions,
    catalogue: Catalogue,
    *,
    top: int = 50,
    content: float = 1.0,
    temperature: float = 1.0,
) -> Neighbours:
    """The ``top`` likeliest items with every item, for ``Augment(neighbours=…)``.

    Args:
        train: training rows; nothing else is looked at.
        top: neighbours kept an item.
        content: weight of the titles' cosine similarity beside co-occurrences of weight up to 1.
        temperature: below 1 sharpens.

    Example:
        >>> catalogue = Catalogue(["a", "b", "c"], ["Blue Train", "Blue Train live", "Giant Steps"])
        >>> train = Interactions(["u"], [[0]], [2])
        >>> table = item_neighbours(train, catalogue, top=2)
        >>> table.items[0].tolist(), float(table.cumulative[0, -1])
        ([2, 1], 1.0)
    """
    if top < 1 or content < 0 or temperature <= 0:
        raise ValueError(
            f"expected top >= 1, content >= 0 and temperature > 0, got top={top}, content={content}, "
            f"temperature={temperature}"
        )
    size = len(catalogue)
    top = min(top, size)
    together = cooccurrence(train, size)
    tfidf = text_tfidf(catalogue.titles)
    items, weights = np.zeros((size, top), np.int32), np.zeros((size, top))
    for start in range(0, size, 1024):
        rows = np.arange(start, min(start + 1024, size))
        titles = (tfidf[rows] @ tfidf.T).toarray() if content else np.zeros((len(rows), size))
        titles[np.arange(len(rows)), rows] = 0
        scores = together[rows].toarray() + content * titles
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        items[rows], weights[rows] = order, np.take_along_axis(scores, order, 1)
    weights = np.where(weights > 0, weights, 0) ** (1 / temperature) * (weights > 0)
    total = weights.sum(1, keepdims=True)
    return Neighbours(items, np.cumsum(weights / np.where(total > 0, total, 1), axis=1))


def with_catalogue_rows(train: Interactions, table: Neighbours, copies: int) -> Interactions:
    """``copies`` rows more for each item i with neighbours: history [i], target a neighbour that is drawn anew."""
    if copies < 1:
        return train
    known = np.repeat(np.flatnonzero(table.cumulative[:, -1] > 0), copies)
    histories = CSR(
        np.concatenate([train.histories.values, known.astype(np.int32)]),
        np.concatenate([train.histories.offsets, train.histories.offsets[-1] + 1 + np.arange(len(known))]),
    )
    targets = np.concatenate([train.targets, table.items[known, 0]])
    times = train.timestamps
    stamps = None if times is None else np.concatenate([times, np.full(len(known), int(times.max()), times.dtype)])
    return Interactions([*train.users, *[CATALOGUE_USER] * len(known)], histories, targets, stamps)
