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

Under ``aggregation="mixture"`` every factor has a thought anchor + f_k of its own. Leaving a factor out takes f_k from
its thought, not its weight, so that with p_k(item) after its own thought and p_0(item) after the anchor alone

    v(S) = log Σ_k g_k (p_k if k in S else p_0)

needs K + 1 thoughts for all sets, and all of the above holds. What a factor is answerable for is known without leaving
anything out: its posterior responsibility g_k p_k(item) / Σ_j g_j p_j(item), the shares of :func:`attribute`.

Source: L. S. Shapley, "A value for n-person games", 1953.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


class Attribution(NamedTuple):
    """What the factors did to the scores of items [B, k]; 0 where there is no item.

    Attributes:
        base: float64 [B, k], the item's log-probability without any factor's part.
        contributions: float64 [B, k, K]; base + contributions.sum(-1) is the item's score.
        shares: float64 [B, k, K], >= 0 and 1 in sum: of the contributions' magnitudes, or in a mixture the factors'
            posterior responsibilities (with ``mixed_with``, for the prompt's part of the score).
    """

    base: np.ndarray
    contributions: np.ndarray
    shares: np.ndarray


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
) -> Attribution:
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
    """
    sets, weights = coalitions(prompts.contributions.shape[2])
    allows = item_filter(trie, len(items), allowed, exclude)
    thoughts = sets[:-1] if prompts.log_gates is None else np.eye(1 + sets.shape[1], sets.shape[1], -1, dtype=bool)
    question = _Question(asked_of(trie, allows, items, scoring), trie, allows, scoring, head_rows)
    found = _of_thoughts(prompts, question, thoughts, items.shape)
    own = None
    if prompts.log_gates is not None:
        found, own = _of_mixture(found, sets, prompts.log_gates.double().cpu().numpy())
    if mixed_with is not None:
        found = np.logaddexp(found + mixed_with[0], mixed_with[1])
    values = np.where(items >= 0, np.concatenate([found, scores[None]]), 0.0)
    contributions = np.moveaxis(np.tensordot(weights, values, 1), 0, -1)
    shares = influence_shares(contributions) if own is None else np.where(items[..., None] >= 0, own, 0.0)
    return Attribution(values[0], contributions, shares)


class _Question(NamedTuple):
    """Items whose log-probabilities are wanted under other thoughts, and how they are ranked."""

    asked: Sequence[Asked]
    trie: CatalogueTrie
    allows: ItemFilter
    scoring: Scoring
    head_rows: HeadRows | None


def _of_thoughts(prompts: ThinkingPrompts, question: _Question, thoughts: np.ndarray, shape: Any) -> np.ndarray:
    """float64 [A, B, k], log-probabilities behind the sums of the factors bool [A, K] that a thought is made of."""
    asked, trie, allows, scoring, head_rows = question
    values = np.zeros((len(thoughts), *shape))
    for group in _batches(asked, len(thoughts), prompts.anchors.shape[1]):
        users = torch.tensor([one.tree.user for one in group], device=prompts.embeds.device)
        step = _sets_at_once(group, len(thoughts), prompts.anchors.shape[1])
        for first in range(0, len(thoughts), step):
            chosen = slice(first, min(first + step, len(thoughts)))
            part = torch.from_numpy(thoughts[chosen]).to(users.device, prompts.contributions.dtype)
            made = torch.einsum("ak,enkd->eand", part, prompts.contributions[users])
            made = made.to(prompts.anchors.dtype) + prompts.anchors[users][:, None]
            states = prompts.states([one.tree for one in group], made)
            for one, own in zip(group, states, strict=True):
                found = _values(prompts.lm, one, own[:, : 1 + len(one.tree)], trie, allows, scoring, head_rows)
                values[chosen, one.tree.user, one.columns] = found
    return values


def _of_mixture(values: np.ndarray, sets: np.ndarray, log_gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v [A - 1, B, k] of every set of factors bool [A, K] but the last, which has all; responsibilities [B, k, K].

    Args:
        values: [K + 1, B, k], log-probabilities after the anchor alone and after every factor's own thought.
        log_gates: [B, K].
    """
    joint = np.where(sets[..., None, None], values[1:], values[0]) + log_gates.T[..., None]  # [A, K, B, k]
    mixed = np.logaddexp.reduce(joint, axis=1)
    return mixed[:-1], np.moveaxis(np.exp(joint[-1] - mixed[-1]), 0, -1)


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
