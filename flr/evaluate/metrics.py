"""Ranking metrics with one held-out target a row, over the whole catalogue, ties counted against the model.

Ranks are int64, 1 for the best. 0 (``NOT_FOUND``) says that the target was not given at all: it is not in a beam's
list, or a filter forbade it; such a row scores 0 in every metric. With h the rank of a row:

    HR@k = mean [1 <= h <= k]     NDCG@k = mean [1 <= h <= k] / log2(h + 1)     MRR = mean [h >= 1] / h
    coverage@k = share of the catalogue that stands in anybody's first k

By item, the target is one item. By title, all items of the target's title count as the target and the distinct titles
form the ranking, a title standing where its best item stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from flr.data.csr import distinct_texts, numbered

HR_CUTOFFS = (1, 5, 10, 20)
NDCG_CUTOFFS = (5, 10, 20)
COVERAGE_CUTOFF = 10
NOT_FOUND = 0
_MAX_SCORES = 1 << 25  # of all items: users a batch are cut so that B·C stays below (256 MiB in float64, and 4 such)
_RESAMPLED_CELLS = 1 << 24  # counts held at a time by the bootstrap


class Interval(NamedTuple):
    """Bounds of a bootstrap interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """Two models on the same rows: b's mean minus a's, its interval, and the two-sided bootstrap p-value."""

    mean: float
    low: float
    high: float
    p_value: float


def group_ids(titles: Sequence[str]) -> np.ndarray:
    """int64 [C]: items with equal titles get equal numbers, 0.. in order of first appearance.

    >>> group_ids(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    return numbered(titles)


def within_memory(batch_size: int, num_items: int) -> int:
    """Users a batch whose scores of every item fit.

    >>> within_memory(256, 5000), within_memory(256, 10_000_000)
    (256, 3)
    """
    return max(1, min(batch_size, _MAX_SCORES // num_items))


def ranks_from_scores(scores: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Rank of each row's target among all items, 1 + the number of others that score at least as high.

    Args:
        scores: float [B, C]; -inf marks what may not be given.
        targets: int64 [B] item indices.
        groups: int64 [C] from :func:`group_ids` for ranks by title; None for ranks by item.

    Returns:
        int64 [B]; 0 where the target's score is -inf.

    Raises:
        ValueError: a NaN score, or shapes that do not fit.

    >>> ranks_from_scores(torch.tensor([[0.5, 0.5, 0.1, 0.9]]), torch.tensor([0])).tolist()    # a tie counts against
    [3]
    """
    if scores.ndim != 2 or targets.shape != (len(scores),):
        raise ValueError(f"scores: expected [B, C] and targets [B], got {list(scores.shape)} and {list(targets.shape)}")
    if bool(scores.amax(1).isnan().any()):
        raise ValueError("scores: expected numbers, got NaN")
    own = scores.gather(1, targets[:, None])
    if groups is None:
        ranks = _at_least(scores, own)
    else:
        if groups.shape != scores.shape[1:]:
            raise ValueError(f"groups: expected [{scores.shape[1]}], got {list(groups.shape)}")
        own, ranks = _by_group(scores, own, targets, groups)
    return ranks.masked_fill(own[:, 0] == -torch.inf, NOT_FOUND)


def _by_group(
    scores: torch.Tensor, own: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score [B, 1] of the target's group, which is that of its best item, and the group's rank [B]."""
    shared = (groups.bincount()[groups] > 1).nonzero()[:, 0]  # few items share their title with others
    if not len(shared):
        return own, _at_least(scores, own)
    label = torch.full_like(groups, -1)
    label[shared] = groups[shared].unique(return_inverse=True)[1]
    those = scores[:, shared]
    best = scores.new_full((len(scores), int(label.max()) + 1), -torch.inf)
    best.scatter_reduce_(1, label[shared].expand_as(those), those, "amax")
    group = label[targets][:, None]
    own = torch.where(group >= 0, best.gather(1, group.clamp_min(0)), own)
    return own, _at_least(scores, own) - _at_least(those, own) + _at_least(best, own)


def _at_least(scores: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """How many scores [B, C] of each row are at least its bound [B, 1], int64 [B]."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return (scores >= bound).sum(1)
    # torch adds up booleans one by one; numpy counts them as bits, and a row stays in the cache
    counts = [np.count_nonzero(row >= least) for row, least in zip(scores.numpy(), bound.numpy(), strict=True)]
    return torch.tensor(counts, dtype=torch.int64)


def top_items(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k items, or all, of float scores [B, C]: their scores and int64 indices; of equals the smaller first.

    >>> top_items(torch.tensor([[0.5, 0.1, 0.5, 0.5]]), 2)[1].tolist()
    [[0, 2]]
    """
    k = min(k, scores.shape[1])
    best, items = scores.topk(k, dim=1)
    last = best[:, -1:]  # topk takes any of the items that are level with it
    tied = ((_at_least(scores, last) > k) & (last[:, 0] > -torch.inf)).nonzero()[:, 0]
    if len(tied):
        items[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    items = items.sort(dim=1).values
    best, order = scores.gather(1, items).sort(dim=1, descending=True, stable=True)
    return best, items.gather(1, order)


def ranks_from_lists(
    items: np.ndarray, scores: np.ndarray, targets: np.ndarray, groups: np.ndarray | None = None
) -> np.ndarray:
    """Rank of each row's target within a list of k items, ties within the list counted against.

    Args:
        items: int64 [B, k], best first, -1 past the end; no item twice.
        scores: float [B, k], descending.
        targets: int64 [B] item indices.
        groups: int64 [C] from :func:`group_ids` for ranks by title; None for ranks by item.

    Returns:
        int64 [B]; 0 where the target is not in the list.
    """
    k = items.shape[1]
    valid = items >= 0
    label, target = (items, targets) if groups is None else (np.where(valid, groups[items], -1), groups[targets])
    hit = valid & (label == target[:, None])
    own = np.take_along_axis(scores, hit.argmax(1)[:, None], 1) if k else np.zeros((len(items), 1))
    repeated = np.zeros_like(valid)  # a title counts where it first stands
    if groups is not None:
        for column in range(1, k):
            repeated[:, column] = (label[:, :column] == label[:, column : column + 1]).any(1)
    ahead = valid & ~hit & ~repeated & (scores >= own)
    return np.where(hit.any(1), 1 + ahead.sum(1), NOT_FOUND).astype(np.int64)


def row_metrics(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric that is a mean over rows, as its value on each row: float64 [n] by name."""
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not np.issubdtype(ranks.dtype, np.integer) or (ranks < 0).any():
        raise ValueError(f"ranks: expected integers [n] >= 0, got {ranks.dtype} {list(ranks.shape)}")
    given = ranks != NOT_FOUND
    safe = np.where(given, ranks, 1)
    gain = np.where(given, 1 / np.log2(safe + 1.0), 0.0)
    values = {f"hr@{k}": (given & (ranks <= k)).astype(np.float64) for k in HR_CUTOFFS}
    values |= {f"ndcg@{k}": np.where(ranks <= k, gain, 0.0) for k in NDCG_CUTOFFS}
    values["mrr"] = np.where(given, 1.0 / safe, 0.0)
    return values


def coverage(top_items: np.ndarray, num_items: int, cutoff: int = COVERAGE_CUTOFF) -> float:
    """Share of the catalogue's items that stand in the first ``cutoff`` columns of top_items [n, k] (-1: none)."""
    shown = np.unique(top_items[:, :cutoff])
    return float((shown >= 0).sum() / num_items)


def rank_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Means of :func:`row_metrics`; ValueError for no rows.

    >>> rank_metrics(np.array([1, 3, 0]))["ndcg@5"]
    0.5
    """
    if len(ranks) == 0:
        raise ValueError("ranks: expected at least one row, got none")
    return {name: float(value.mean()) for name, value in row_metrics(ranks).items()}


def bootstrap_intervals(
    values: Mapping[str, np.ndarray],
    clusters: Sequence[str] | np.ndarray | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of means.

    Args:
        values: float [n] by name, e.g. from :func:`row_metrics`; all are resampled together.
        clusters: the user of every row, [n]: rows of one user depend on each other, so users are drawn, with all
            their rows. None: rows are drawn.
        samples, level: how many resamplings, and the coverage.
        seed: of the draws; the same seed and rows give the same interval.
    """
    matrix = np.stack([np.asarray(value, dtype=np.float64) for value in values.values()], axis=1)
    means = _resampled_means(matrix, clusters, samples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: Interval(float(a), float(b)) for name, a, b in zip(values, low, high, strict=True)}


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[str] | np.ndarray | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """mean(b) - mean(a) on the same rows, with a paired bootstrap interval: both are resampled by the same draws.

    >>> paired_difference(np.zeros(50), np.ones(50)).low
    1.0
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a and b: expected the same rows, got shapes {list(a.shape)} and {list(b.shape)}")
    means = _resampled_means((b - a)[:, None], clusters, samples, seed)[:, 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return Difference(float((b - a).mean()), float(low), float(high), float(min(1.0, 2 * (tail + 1) / (samples + 1))))


def _resampled_means(
    matrix: np.ndarray, clusters: Sequence[str] | np.ndarray | None, samples: int, seed: int
) -> np.ndarray:
    """Means [samples, m] of matrix [n, m] over resampled clusters."""
    if len(matrix) == 0:
        raise ValueError("values: expected at least one row, got none")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    sizes = np.ones(len(matrix))
    if clusters is not None:
        if len(clusters) != len(matrix):
            raise ValueError(f"clusters: expected one a row ({len(matrix)}), got {len(clusters)}")
        _, index = distinct_texts(clusters)
        sizes = np.bincount(index).astype(np.float64)
        matrix = np.stack([np.bincount(index, column) for column in matrix.T], axis=1)
    means = [counts @ matrix / (counts @ sizes)[:, None] for counts in _draws(len(matrix), samples, seed)]
    return np.concatenate(means)


def _draws(size: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn, float64 [s, size], in blocks that together make ``samples`` resamplings."""
    generator = np.random.default_rng(seed)
    block = max(1, _RESAMPLED_CELLS // size)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn = generator.integers(0, size, (rows, size)) + np.arange(rows)[:, None] * size
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
