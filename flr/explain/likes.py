"""What each factor likes: the items and the words of titles that it looks at more than at others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from flr.data import CSR, Interactions, RecProcessor

from .interest import attended

_WORD = re.compile(r"[^\W\d_]{3,}")


def factor_likes(
    model: nn.Module,
    processor: RecProcessor,
    interactions: Interactions | CSR,
    *,
    top: int = 8,
    most: int = 1000,
    batch_size: int = 64,
    prior: float = 5.0,
) -> list[dict[str, Any]]:
    """For each factor the items, and the words of their titles, that it looks at more than the factors do together.

    Each occurrence of an item in a history is shared among the factors by their attention, each factor's divided by its
    mean over the history. An item's lift for a factor is its mean share there over the factor's mean share of all
    occurrences, with ``prior`` further occurrences of lift 1, so that rare items do not lead. Words likewise.

    Args:
        model: patched, with factors that attend. processor: its own.
        interactions: rows whose histories are used, at most ``most`` of them, spread evenly.
        top: items and words a factor. batch_size: rows at a time, no influence.

    Returns:
        K dictionaries ``{"items": [{"item_id", "title", "lift", "count"}], "words": [{"word", "lift", "count"}]}``, the
        greatest lift first; lifts of 1 and less are left out.

    Raises:
        ValueError: a model without factors that attend, or no history of two items.
    """
    histories = interactions.histories if isinstance(interactions, Interactions) else interactions
    if len(histories.lengths) > most:
        histories = histories.take(np.arange(most) * len(histories.lengths) // most)
    size = len(processor.catalogue)
    sums: Any = None
    for _, items, attention in attended(model, processor, histories, batch_size):
        relative = attention / np.maximum(attention.mean(-1, keepdims=True), 1e-300)
        shares = relative / np.maximum(relative.sum(0), 1e-300)  # [K, m]
        sums = np.zeros((len(shares), size)) if sums is None else sums
        np.add.at(sums.T, items, shares.T)
    counts = sums.sum(0)  # how often each item stands in a history
    titles = processor.catalogue.titles
    words: dict[str, list[int]] = {}
    for item in np.flatnonzero(counts > 0):
        for word in set(_WORD.findall(titles[item].lower())):
            words.setdefault(word, []).append(int(item))
    word_sums = np.stack([sums[:, own].sum(1) for own in words.values()], 1) if words else np.zeros((len(sums), 0))
    names, found = list(words), []
    for factor in range(len(sums)):
        share = sums[factor].sum() / sums.sum()
        best = [
            {"item_id": processor.catalogue.item_ids[i], "title": titles[i], "lift": lift, "count": count}
            for i, lift, count in _greatest(sums[factor], counts, share, prior, top)
        ]
        told = _greatest(word_sums[factor], word_sums.sum(0), share, prior, top)
        found.append({"items": best, "words": [{"word": names[i], "lift": x, "count": n} for i, x, n in told]})
    return found


def _greatest(
    own: np.ndarray, counts: np.ndarray, share: float, prior: float, top: int
) -> Iterable[tuple[int, float, int]]:
    """Place, lift and count of the greatest lifts above 1, of equals the first."""
    lift = (own + prior * share) / np.maximum((counts + prior) * share, 1e-300)
    order = np.argsort(-lift, kind="stable")[:top]
    return [(int(i), round(float(lift[i]), 4), round(float(counts[i]))) for i in order if lift[i] > 1 + 1e-9]
