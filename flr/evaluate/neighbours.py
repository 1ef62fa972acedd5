"""The weight of item-kNN, of another table, or of a model's own views, chosen on rows that none was fitted on.

p(item | user) = (1 - n) p_model(item | user) + n q(item | user),   q: scores of the table over their sum

with p_model as in :mod:`flr.decode.mixture`, where the weight of views is w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flr.data import CSR, HistoryViews, Interactions, NeighbourTable, RecProcessor
from flr.decode.mixture import ViewMixture
from flr.model.backbone import evaluating

from .metrics import ranks_from_scores, row_metrics, within_memory
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
        batch_size: users at a time, fewer in a large catalogue.
        progress: show a bar on stderr, where that is a terminal.

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
    batch_size = within_memory(batch_size, len(processor.catalogue))
    views = replace(processor.views or HistoryViews(weight=0.0), neighbours=0.0)
    mixture = ViewMixture(model, processor, views, num_beams=num_beams, batch_size=batch_size)
    partners = {name: _logarithm(table.probabilities) for name, table in tables.items()}
    return _fits(model, mixture.scores, partners, rows, weights, batch_size, progress)


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
    batch_size = within_memory(batch_size, len(processor.catalogue))
    views = processor.views or HistoryViews(weight=0.0)
    whole, alone = (
        ViewMixture(model, processor, replace(views, weight=weight), num_beams=num_beams, batch_size=batch_size)
        for weight in (0.0, 1.0)
    )
    return _fits(model, whole.scores, {"": alone.scores}, rows, weights, batch_size, progress)[""]


def _fits(
    model: Any,
    scores: Callable[[CSR], np.ndarray],
    partners: Mapping[str, Callable[[CSR], np.ndarray]],
    rows: Interactions,
    weights: Sequence[float],
    batch_size: int,
    progress: bool,
) -> dict[str, NeighbourFit]:
    """What each weight of each partner gives beside ``scores``; all are log-probabilities [B, C] of histories."""
    tried = tuple(sorted(set(weights)))
    if not tried or not 0 <= tried[0] <= tried[-1] <= 1:
        raise ValueError(f"weights: expected numbers in 0..1, got {list(weights)}")
    if len(rows) == 0:
        raise ValueError("rows: expected at least one, got none")
    ranks = {name: np.zeros((len(tried), len(rows)), np.int64) for name in partners}
    with evaluating(model), progress_bar(progress, "ranking", len(rows)) as advance:
        for start in range(0, len(rows), batch_size):
            part = rows.select(np.arange(start, min(start + batch_size, len(rows))))
            own = torch.from_numpy(scores(part.histories))
            target = torch.from_numpy(part.targets.astype(np.int64))
            for name, partner in partners.items():
                others = torch.from_numpy(partner(part.histories))
                for place, weight in enumerate(tried):
                    log_weights = torch.tensor([1 - weight, weight], dtype=torch.float64).log()
                    mixed = torch.logaddexp(own + log_weights[0], others + log_weights[1])
                    ranks[name][place, start : start + len(part)] = ranks_from_scores(mixed, target).numpy()
            advance(len(part))
    return {name: _best(tried, found) for name, found in ranks.items()}


def _logarithm(probabilities: Callable[[CSR], np.ndarray]) -> Callable[[CSR], np.ndarray]:
    def logarithm(histories: CSR) -> np.ndarray:
        with np.errstate(divide="ignore"):  # an item may have none
            return np.log(probabilities(histories))

    return logarithm


def _best(tried: tuple[float, ...], ranks: np.ndarray) -> NeighbourFit:
    """By ranks int64 [weights, rows]."""
    by_weight = [row_metrics(row) for row in ranks]
    metrics = {name: np.stack([values[name] for values in by_weight]) for name in _METRICS}
    return NeighbourFit(tried, metrics, tried[int(metrics["ndcg@10"].mean(1).argmax())])
