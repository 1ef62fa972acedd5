"""The weight of item-kNN, of another table, or of a model's own views, chosen on rows that none was fitted on.

p(item | user) = (1 - n) p_model(item | user) + n q(item | user),   q: scores of the table over their sum

with p_model as in :mod:`flr.decode.mixture`, where the weight of views is w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flr.data import CSR, HistoryViews, Interactions, NeighbourTable, RecProcessor
from flr.decode.mixture import ViewMixture
from flr.model.backbone import evaluating

from .metrics import ranks_from_scores, row_metrics
from .rank import progress_bar

_METRICS = ("hr@10", "ndcg@10")


@dataclass(frozen=True)
class NeighbourFit:
    """What each weight gave.

    Attributes:
        weights: as asked for, ascending. metrics: float64 [weights, users] by name, "hr@10" and "ndcg@10", by item.
        best: the weight with the largest mean NDCG@10, of equal ones the smallest.
    """

    weights: tuple[float, ...]
    metrics: dict[str, np.ndarray]
    best: float


def fit_neighbours(
    model: Any,
    processor: RecProcessor,
    table: NeighbourTable,
    rows: Interactions,
    weights: Sequence[float],
    *,
    num_beams: int = 20,
    batch_size: int = 128,
    progress: bool = False,
) -> NeighbourFit:
    """Rank the targets of ``rows`` with each of ``weights``; the model runs once.

    Args:
        model, processor: a causal LM and its processor, whose views of the history are kept.
        table: of item-kNN or :func:`flr.data.fit_linear`, made of training rows only.
        rows: neither the model's nor the table's training rows, e.g. ``dataset.valid``.
        weights: in 0..1. num_beams: for codecs of several tokens an item, see :class:`ViewMixture`.
        batch_size: users at a time. progress: show a bar on stderr, where that is a terminal.

    Raises:
        ValueError: no rows, no weights, or one out of range.
    """
    sizes: dict[str, Any] = {"num_beams": num_beams, "batch_size": batch_size, "progress": progress}
    return fit_tables(model, processor, {"": table}, rows, weights, **sizes)[""]


@torch.inference_mode()
def fit_tables(
    model: Any,
    processor: RecProcessor,
    tables: Mapping[str, NeighbourTable],
    rows: Interactions,
    weights: Sequence[float],
    *,
    num_beams: int = 20,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, NeighbourFit]:
    """:func:`fit_neighbours` for several tables by name; the model still runs once."""
    views = replace(processor.views or HistoryViews(weight=0.0), neighbours=0.0)
    mixture = ViewMixture(model, processor, views, num_beams=num_beams, batch_size=batch_size)

    def mix(histories: CSR, weights: Sequence[float]) -> Iterator[np.ndarray]:
        own = mixture.scores(histories)
        for table in tables.values():
            others = table.probabilities(histories)
            yield from ((1 - weight) * own + weight * others for weight in weights)

    tried = _tried(weights)
    ranks = _ranked(model, rows, mix, tried, len(tables), batch_size, progress)
    return {name: _best(tried, found) for name, found in zip(tables, ranks, strict=True)}


@torch.inference_mode()
def fit_views(
    model: Any,
    processor: RecProcessor,
    rows: Interactions,
    weights: Sequence[float],
    *,
    num_beams: int = 20,
    batch_size: int = 128,
    progress: bool = False,
) -> NeighbourFit:
    """Rank the targets of ``rows`` with each weight of a model's own views of single items (:class:`ViewMixture`).

    Args:
        model, processor: a causal LM and its processor; the decay of its views, 0.6 where it has none, and the share of
            its table are kept.
        rows, weights, num_beams, batch_size, progress: as for :func:`fit_neighbours`.

    Raises:
        ValueError: no rows, no weights, or one out of range; a catalogue too large for views.
    """
    views = processor.views or HistoryViews(weight=0.0)
    share, table = views.neighbours, processor.item_knn
    sizes: dict[str, Any] = {"num_beams": num_beams, "batch_size": batch_size}
    whole, alone = (
        ViewMixture(model, processor, replace(views, weight=weight, neighbours=0.0), **sizes) for weight in (0.0, 1.0)
    )

    def mix(histories: CSR, weights: Sequence[float]) -> Iterator[np.ndarray]:
        own, others = whole.scores(histories), alone.scores(histories)
        rest = share * table.probabilities(histories) if share and table is not None else 0.0
        yield from ((1 - share) * ((1 - weight) * own + weight * others) + rest for weight in weights)

    tried = _tried(weights)
    return _best(tried, _ranked(model, rows, mix, tried, 1, batch_size, progress)[0])


def _tried(weights: Sequence[float]) -> tuple[float, ...]:
    tried = tuple(sorted(set(weights)))
    if not tried or not 0 <= tried[0] <= tried[-1] <= 1:
        raise ValueError(f"weights: expected numbers in 0..1, got {list(weights)}")
    return tried


def _ranked(
    model: Any,
    rows: Interactions,
    mix: Callable[[CSR, Sequence[float]], Iterator[np.ndarray]],
    tried: tuple[float, ...],
    partners: int,
    batch_size: int,
    progress: bool,
) -> np.ndarray:
    """Ranks int64 [partners, weights, rows] of the targets, by what ``mix`` yields: probabilities [B, C] of each."""
    if len(rows) == 0:
        raise ValueError("rows: expected at least one, got none")
    ranks = np.zeros((partners * len(tried), len(rows)), np.int64)
    with evaluating(model), progress_bar(progress, "ranking", len(rows)) as advance:
        for start in range(0, len(rows), batch_size):
            part = rows.select(np.arange(start, min(start + batch_size, len(rows))))
            target = torch.from_numpy(part.targets.astype(np.int64))
            for place, mixed in enumerate(mix(part.histories, tried)):
                found = ranks_from_scores(torch.from_numpy(mixed.astype(np.float32)), target)
                ranks[place, start : start + len(part)] = found.numpy()
            advance(len(part))
    return ranks.reshape(partners, len(tried), len(rows))


def _best(tried: tuple[float, ...], ranks: np.ndarray) -> NeighbourFit:
    """By ranks int64 [weights, rows]."""
    by_weight = [row_metrics(row) for row in ranks]
    metrics = {name: np.stack([values[name] for values in by_weight]) for name in _METRICS}
    return NeighbourFit(tried, metrics, tried[int(metrics["ndcg@10"].mean(1).argmax())])
