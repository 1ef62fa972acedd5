"""What each factor contributes to the log-probability of an item: Shapley values of the thought's K parts.

The embedding at a thought position is anchor + Σ_k c_k with c_k = g_k f_k, an exact sum. For a set S of factors let

    v(S) = log p(item | prompt, anchor + Σ_{k in S} c_k)

the item's log-probability when the other factors' parts are left out of the thought (all parts as the complete model
made them; of every thought where there are several). Contribution of factor k is its Shapley value

    φ_k = mean over all orders of the factors of v(those before k, and k) - v(those before k)

so that Σ_k φ_k = v(all) - v(none): the contributions add up exactly to what the factors together did to the item's
score, none is counted twice where factors overlap, and a factor that changes nothing gets 0. (The gradient times c_k is
exact only for a short thought; leaving out one factor at a time gives each of two redundant factors nothing.) What a
factor did to *later* refinements' queries and gates is theirs, not its own.

For K <= 6 all 2^K sets are computed. For more factors the orders are the K rotations of 1..K and their reverses,
K (K - 1) + 2 sets: the sum stays exact, and so does every φ_k whose factors interact at most in pairs (each pair stands
in either order equally often).

Source: L. S. Shapley, "A value for n-person games", 1953.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flr.decode import CatalogueTrie, ItemFilter, Scoring, item_filter
from flr.decode.exhaustive import edge_scores
from flr.model.head import HeadRows, head

from .asked import Asked, asked_of
from .thinking import ThinkingPrompts

#: Up to this K every set of factors is computed.
EXACT_FACTORS = 6
#: Summed magnitude of log-probabilities below which contributions are rounding errors.
NOISE = 1e-5
_MAX_CELLS = 1 << 25  # logits, or log-probabilities of edges, at a time: 128 MiB in float32
_MAX_ROWS, _MAX_TOKENS = 512, 1 << 14  # of one forward


@functools.cache
def coalitions(num_factors: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets of factors to score, bool [A, K], empty first and complete last; weights float64 [K, A]: φ = weights @ v.

    >>> sets, weights = coalitions(2)
    >>> sets.astype(int).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    >>> weights.tolist()
    [[-0.5, 0.5, -0.5, 0.5], [-0.5, -0.5, 0.5, 0.5]]
    >>> len(coalitions(16)[0])
    242
    """
    if num_factors < 1:
        raise ValueError(f"num_factors: expected at least 1, got {num_factors}")
    factors = range(num_factors)
    if num_factors <= EXACT_FACTORS:
        sets = (np.arange(2**num_factors)[:, None] >> np.arange(num_factors)) & 1 == 1
        share = [1 / (num_factors * math.comb(num_factors - 1, size)) for size in factors]
        size = sets.sum(1)
        joins = np.array([0.0, *share])[size]  # of a set that the factor is in: it joined the size - 1 others
        leaves = np.array([*share, 0.0])[size]
        return sets, np.where(sets, joins[:, None], -leaves[:, None]).T
    steps: list[tuple[int, frozenset[int], frozenset[int]]] = []  # a factor, those before it, and these with it
    for first in factors:
        turned = [(first + step) % num_factors for step in factors]
        for order in (turned, turned[::-1]):
            steps += [(factor, frozenset(order[:i]), frozenset(order[: i + 1])) for i, factor in enumerate(order)]
    groups = sorted({group for step in steps for group in step[1:]}, key=lambda group: (len(group), sorted(group)))
    rank = {group: position for position, group in enumerate(groups)}
    sets = np.array([[factor in group for factor in factors] for group in groups])
    weights = np.zeros((num_factors, len(groups)))
    for factor, before, after in steps:
        weights[factor, rank[after]] += 1
        weights[factor, rank[before]] -= 1
    return sets, weights / (2 * num_factors)


def influence_shares(contributions: np.ndarray) -> np.ndarray:
    """|φ_k| / Σ_j |φ_j| of contributions [..., K]: shares that sum to 1; 1 / K each where no factor moves the score.

    >>> influence_shares(np.array([0.6, -0.2, 0.0])).round(2).tolist()
    [0.75, 0.25, 0.0]
    """
    size = np.abs(contributions)
    total = size.sum(-1, keepdims=True)
    alike = np.full_like(size, 1 / size.shape[-1])
    return np.where(total > NOISE, size / np.where(total > NOISE, total, 1), alike)


@torch.no_grad()
def attribute(
    prompts: ThinkingPrompts,
    items: np.ndarray,
    scores: np.ndarray,
    trie: CatalogueTrie,
    scoring: Scoring = "full",
    exclude: Tensor | None = None,
    allowed: Tensor | None = None,
    mixed_with: tuple[np.ndarray, np.ndarray] | None = None,
    head_rows: HeadRows | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Contributions of the factors to the log-probabilities of items.

    The set of all factors is not computed again: its value is the score. The others cost one forward over the trie
    nodes above the items, each read once a set and a user, behind the prompts' keys and values.

    Args:
        prompts: from :func:`think`.
        items: int64 [B, k] item indices, -1 for none.
        scores: [B, k], their log-probabilities with all factors, as a search gave them.
        trie: of the catalogue, on the model's device.
        scoring, exclude, allowed: as the items were ranked with (see :mod:`flr.decode`): the values are those scores.
        mixed_with: (log weight, log rest), float64 [B, k] each, for items ranked by weight * p(item | prompt) + rest: v
            is the logarithm of that, the rest is taken as it is.
        head_rows: of ``prefill``, so that ``catalogue`` needs the logits of a node's children alone.

    Returns:
        base float64 [B, k], the item's log-probability without any factor's part, and contributions float64 [B, k, K];
        base + contributions.sum(-1) is the item's score. 0 where the item is -1.
    """
    sets, weights = coalitions(prompts.contributions.shape[2])
    values = np.zeros((len(sets), *items.shape))
    values[-1] = np.where(items >= 0, scores, 0.0)
    allows = item_filter(trie, len(items), allowed, exclude)
    asked = asked_of(trie, allows, items, scoring)
    for group in _batches(asked, len(sets) - 1, prompts.anchors.shape[1]):
        users = torch.tensor([one.tree.user for one in group], device=prompts.embeds.device)
        step = _sets_at_once(group, len(sets) - 1, prompts.anchors.shape[1])
        for first in range(0, len(sets) - 1, step):
            chosen = slice(first, min(first + step, len(sets) - 1))
            part = torch.from_numpy(sets[chosen]).to(users.device, prompts.contributions.dtype)
            thoughts = torch.einsum("ak,enkd->eand", part, prompts.contributions[users])
            thoughts = thoughts.to(prompts.anchors.dtype) + prompts.anchors[users][:, None]
            states = prompts.states([one.tree for one in group], thoughts)
            for one, own in zip(group, states, strict=True):
                found = _values(prompts.lm, one, own[:, : 1 + len(one.tree)], trie, allows, scoring, head_rows)
                values[chosen, one.tree.user, one.columns] = found
    if mixed_with is not None:
        values[:-1] = np.logaddexp(values[:-1] + mixed_with[0], mixed_with[1])
    values = np.where(items >= 0, values, 0.0)
    return values[0], np.moveaxis(np.tensordot(weights, values, 1), 0, -1)


def _batches(asked: Sequence[Asked], num_sets: int, num_thoughts: int) -> Iterator[list[Asked]]:
    """Runs (by ascending length) whose forward stays within bounds; at least one each."""
    batch: list[Asked] = []
    for one in sorted(asked, key=lambda one: len(one.tree)):
        rows = (len(batch) + 1) * num_sets
        if batch and (rows > _MAX_ROWS or rows * (len(one.tree) + num_thoughts) > _MAX_TOKENS):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _sets_at_once(group: Sequence[Asked], num_sets: int, num_thoughts: int) -> int:
    """How many sets of factors one forward takes: all, or where a tree alone is too much for that, fewer."""
    if len(group) > 1:
        return num_sets
    return max(1, min(num_sets, _MAX_ROWS, _MAX_TOKENS // (len(group[0].tree) + num_thoughts)))


def _values(
    lm: Any,
    one: Asked,
    states: Tensor,
    trie: CatalogueTrie,
    allows: ItemFilter,
    scoring: Scoring,
    head_rows: HeadRows | None,
) -> np.ndarray:
    """v float64 [A, items] of the sets of factors whose states after thought and nodes are [A, 1 + n, D]."""
    row, child = (torch.as_tensor(x, device=states.device) for x in (one.edge_row, one.edge_child))
    paths = torch.as_tensor(one.paths, device=states.device)
    rows = head_rows if scoring == "catalogue" else None
    cells = 8 * len(row) if rows is not None else states.shape[1] * lm.config.get_text_config(decoder=True).vocab_size
    found = []
    for part in states.split(max(1, _MAX_CELLS // max(1, cells))):
        own = allows.select(torch.full((len(part),), one.tree.user, device=states.device))
        edges = edge_scores(part if rows is not None else head(lm, part), rows, row, child, trie, own, scoring).double()
        padded = torch.cat([edges, edges.new_zeros(len(part), 1)], 1)
        found.append(padded[:, paths].sum(-1))
    return torch.cat(found).cpu().numpy()
