"""Whether factors correspond to known interests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from flr.data import CSR, Interactions, RecProcessor
from flr.model.backbone import causal_lm, evaluating

from .attention import item_attention, item_scores
from .thinking import think

#: What a factor's part in a history's items is told by.
Measure = Literal["attention", "scores"]


@dataclass(frozen=True)
class FactorInterest:
    """How well factors agree with the items' true interests.

    Attributes:
        nmi: normalised mutual information (arithmetic mean of the entropies, as scikit-learn's) between an item's
            factor and its interest, over all history items of all rows; 0 to 1.
        chance, chance_high: mean and 97.5 % quantile of the same after permuting the interests among the items; None
            without permutations.
        within_user: mean of a row's own NMI, over rows whose items have two interests or more; None if there is no such
            row. High where every user's factors separate that user's interests, although factor 1 may stand for one
            interest here and for another there.
        within_user_chance: the same after permuting interests among a row's items (far above 0: rows are short).
        confusion: int64 [K, I], items of interest i that were given to factor k.
        num_items: how many history items were counted.
    """

    nmi: float
    chance: float | None
    chance_high: float | None
    within_user: float | None
    within_user_chance: float | None
    confusion: np.ndarray
    num_items: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for reports."""
        return {**asdict(self), "confusion": self.confusion.tolist()}


def assign_factors(attention: np.ndarray) -> np.ndarray:
    """An item's factor: argmax_k of attention_k(item) relative to factor k's mean over the row's items.

    A factor's attention is first divided by its mean over the row's items, so that every factor has the same amount to
    spend on a row: one that leaves attention on other tokens is not at a disadvantage, one that is peaked wins its peak
    only. Gates play no part. Equal values go to the first factor; a factor with no attention in the row gets nothing
    unless all have none.

    >>> assign_factors(np.array([[0.5, 0.4, 0.1], [0.02, 0.02, 0.06]])).tolist()
    [0, 0, 1]

    Args:
        attention: float [..., K, M], >= 0.

    Returns:
        int64 [..., M], 0..K-1.
    """
    mean = attention.mean(-1, keepdims=True)
    return np.where(mean > 0, attention / np.where(mean > 0, mean, 1), 0).argmax(-2)


def assign_by_score(scores: list[np.ndarray]) -> list[np.ndarray]:
    """An item's factor: the one whose score for it is furthest above the factor's mean over all items of all rows.

    Attention is shared out within a row: a factor for which a row holds nothing looks at something all the same, and
    one that looks at the latest item of its kind neglects the others of that kind. Scores know nothing of the row's
    other items. A number added to all scores of a factor changes neither its attention nor what it is given here.

    >>> assign_by_score([np.array([[5.0, 1.0], [0.0, 1.0]]), np.array([[1.0], [2.0]])])[0].tolist()
    [0, 1]

    Args:
        scores: of every row, float [K, m] of its m items.

    Returns:
        int64 [m] of every row, 0..K-1; equal values go to the first factor.
    """
    mean = np.concatenate(scores, 1).mean(1, keepdims=True)
    return [(x - mean).argmax(0) for x in scores]


def agreement(
    factors: np.ndarray,
    items: np.ndarray,
    rows: np.ndarray,
    interests: np.ndarray,
    num_factors: int,
    permutations: int = 50,
    seed: int = 0,
) -> FactorInterest:
    """Agreement of factors with interests, with its level by chance.

    Args:
        factors, items, rows: int [n], of every history item: its factor 0..K-1, its catalogue index, and its row.
        interests: int [C], of every item, 0..I-1 or any labels.
        permutations, seed: of the chance level. For ``chance`` the interests are permuted among the items that occur,
            so that an item keeps one interest wherever it stands.

    Raises:
        ValueError: no items.
    """
    from sklearn.metrics import normalized_mutual_info_score  # a server and a worker do without

    if len(factors) == 0:
        raise ValueError("factors: expected at least one history item, got none")
    _, labels = np.unique(np.asarray(interests), return_inverse=True)
    number = int(labels.max()) + 1
    own = labels[items]
    confusion = np.zeros((num_factors, number), np.int64)
    np.add.at(confusion, (factors, own), 1)
    generator = np.random.default_rng(seed)
    occurring = np.unique(items)
    permuted, shuffled = labels.copy(), []
    for _ in range(permutations):
        permuted[occurring] = labels[generator.permutation(occurring)]
        shuffled.append(normalized_mutual_info_score(permuted[items], factors))
    within = _within_rows(factors, own, rows, num_factors, number)
    order = np.argsort(rows, kind="stable")
    draws: list[float] = []
    for _ in range(min(permutations, 10) if within is not None else 0):
        again = np.empty_like(own)  # items of a row in any order
        again[order] = own[np.lexsort((generator.random(len(rows)), rows))]
        draws.append(_within_rows(factors, again, rows, num_factors, number) or 0.0)
    return FactorInterest(
        nmi=float(normalized_mutual_info_score(own, factors)),
        chance=float(np.mean(shuffled)) if shuffled else None,
        chance_high=float(np.quantile(shuffled, 0.975)) if shuffled else None,
        within_user=within,
        within_user_chance=float(np.mean(draws)) if draws else None,
        confusion=confusion,
        num_items=len(factors),
    )


def _within_rows(factors: np.ndarray, own: np.ndarray, rows: np.ndarray, num_factors: int, number: int) -> float | None:
    """Mean NMI of a row over the rows with two interests or more; None without such rows."""
    _, row = np.unique(rows, return_inverse=True)
    table = np.zeros((int(row.max()) + 1, num_factors, number))
    np.add.at(table, (row, factors, own), 1)
    table = table[(table.sum(1) > 0).sum(1) >= 2]
    if len(table) == 0:
        return None
    joint = table / table.sum((1, 2), keepdims=True)

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.where(p > 0, p, 1))).reshape(len(p), -1).sum(1)

    of_factors, of_interests = entropy(joint.sum(2)), entropy(joint.sum(1))
    information = of_factors + of_interests - entropy(joint)
    return float(np.mean(np.maximum(information, 0) / ((of_factors + of_interests) / 2)))


def factor_interest(
    model: nn.Module,
    processor: RecProcessor,
    interactions: Interactions | CSR,
    interests: np.ndarray,
    batch_size: int = 64,
    *,
    refinement: int = -1,
    thought: int = -1,
    permutations: int = 50,
    seed: int = 0,
    by: Measure = "attention",
) -> FactorInterest:
    """Whether the factors recover known interests.

    Every history item that the model sees is given to one factor, by :func:`assign_factors` or by
    :func:`assign_by_score`; the factors are then compared with the items' interests. Histories of which the model sees
    one item are left out: attention over one item says nothing. The targets play no part. Deterministic, and
    independent of batch_size up to ties by rounding.

    Args:
        model: patched, with factors. processor: its RecProcessor.
        interactions: rows, whose histories are used (e.g. ``dataset.test``).
        interests: int [C], the true interest of every item (``catalogue.attributes["interest"]``).
        refinement, thought: whose attention, from the end where negative.
        permutations, seed: of the chance level.
        by: "attention", which answers where factors look, or "scores", which answers what kinds of items they look for.

    Raises:
        ValueError: a model without factors, interests of the wrong shape, no history of two items, another ``by``.
    """
    interests = np.asarray(interests)
    if interests.shape != (len(processor.catalogue),):
        raise ValueError(f"interests: expected shape ({len(processor.catalogue)},), got {interests.shape}")
    histories = interactions.histories if isinstance(interactions, Interactions) else interactions
    rows = list(attended(model, processor, histories, batch_size, refinement, thought, by))
    looked = [x for _, _, x in rows]
    factors = [assign_factors(x) for x in looked] if by == "attention" else assign_by_score(looked)
    index = np.repeat([row for row, _, _ in rows], [len(x) for x in factors])
    items = np.concatenate([seen for _, seen, _ in rows])
    return agreement(np.concatenate(factors), items, index, interests, len(looked[0]), permutations, seed)


def attended(
    model: nn.Module,
    processor: RecProcessor,
    histories: CSR,
    batch_size: int,
    refinement: int = -1,
    thought: int = -1,
    by: Measure = "attention",
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Row, the items that the model sees, int64 [m], and the factors' attention or scores on them, float64 [K, m].

    Histories of which it sees one item are left out. Rows come by length.

    Raises:
        ValueError: a model without factors that attend, a batch_size below 1, another ``by``, no history of two items.
    """
    if by not in get_args(Measure):
        raise ValueError(f"by: expected {' or '.join(get_args(Measure))}, got {by!r}")
    measured = item_attention if by == "attention" else item_scores
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    filled = np.flatnonzero(histories.lengths > 1)
    filled = filled[np.argsort(histories.lengths[filled], kind="stable")]  # equal lengths together: little padding
    some = False
    for first in range(0, len(filled), batch_size):
        chosen = filled[first : first + batch_size]
        part = histories.take(chosen)
        inputs = processor(part)
        with torch.inference_mode(), evaluating(model):
            prompts = think(model, inputs, reserve=0)
            if prompts is None or causal_lm(model)._flr_patch.config.variant == "offsets":
                raise ValueError(
                    "model: expected one with factors that attend (variant 'flr' or 'latentr3'), got one without"
                )
            positions = inputs["item_positions"]
            looked = measured(prompts, positions, int(part.lengths.max()))[:, thought, refinement]
        for row, index in enumerate(chosen.tolist()):
            seen = np.unique(positions[row][positions[row] >= 0].numpy())
            if len(seen) > 1:
                some = True
                yield index, part.row(row)[seen].astype(np.int64), looked[row][:, seen]
    if not some:
        raise ValueError("interactions: expected at least one row with a history of two items, got none")
