"""Metrics of groups of users: by the length of their history, by how popular their target is."""

from __future__ import annotations

from typing import Any

import numpy as np

from .metrics import bootstrap_intervals, row_metrics
from .result import EvalResult


def by_trait(
    result: EvalResult, trait: str, metrics: tuple[str, ...] = ("hr@10", "ndcg@10"), parts: int = 4, samples: int = 1000
) -> list[dict[str, Any]]:
    """Metrics by item of the rows in quarters of a trait, with 95 % bootstrap intervals over users.

    Rows with one value stay together, so that there may be fewer groups than ``parts``, of unequal size.

    Args:
        result: of an evaluation that knows the trait.
        trait: a key of ``result.traits``.
        metrics: names of :func:`~flr.evaluate.metrics.row_metrics`.
        parts: groups at most, 1 or more. samples: resamplings, 1 or more.

    Returns:
        One a group, ascending: ``{"low", "high"}`` its least and greatest value, ``rows``, and ``metrics``, by name
        (mean, low, high).

    Raises:
        ValueError: a trait that the result does not know.
    """
    if trait not in result.traits:
        raise ValueError(f"trait: expected one of {', '.join(result.traits) or 'none'}, got {trait!r}")
    values = np.asarray(result.traits[trait])
    inner = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="lower"))
    group = np.searchsorted(inner, values, side="left")
    each = {name: row_metrics(result.ranks["item"])[name] for name in metrics}
    users, found = np.array(result.users, dtype=object), []  # not as wide as the longest
    for index in np.unique(group):
        rows = group == index
        own = {name: value[rows] for name, value in each.items()}
        intervals = bootstrap_intervals(own, users[rows], samples, seed=result.seed)
        found.append(
            {
                "low": int(values[rows].min()),
                "high": int(values[rows].max()),
                "rows": int(rows.sum()),
                "metrics": {name: (float(value.mean()), *intervals[name]) for name, value in own.items()},
            }
        )
    return found
