"""Rankings on damaged histories, and of cold items and cold users: how much a model depends on clean data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flr.data import Interactions
from flr.data.perturb import perturb

from .metrics import bootstrap_intervals, paired_difference, row_metrics
from .result import EvalResult

#: Items with fewer training targets than this are cold, and so are users with fewer items in their history.
COLD_ITEM, COLD_USER = 5, 4
METRIC = "ndcg@10"

Ranker = Callable[[Interactions], EvalResult]


def robustness(
    rankers: Mapping[str, Ranker],
    rows: Interactions,
    *,
    popularity: np.ndarray,
    kinds: Sequence[str],
    severities: Sequence[float],
    max_history: int,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """NDCG@10 of every ranker on clean and on damaged rows, and on cold ones.

    Args:
        rankers: by name, what ranks rows, e.g. ``lambda rows: evaluate(model, processor, rows)``.
        rows: that no ranker was fitted on. Targets stay as they are.
        popularity: float [C], how often each item is a training target.
        kinds, severities, max_history, seed: see :func:`flr.data.perturb.perturb`.
        note: called with a line about each measurement.

    Returns:
        One dictionary a measurement: "ranker", "kind" ("clean", one of ``kinds``, "cold items", "cold users"),
        "severity", "rows", "ndcg@10" (mean, low, high), and for damaged rows "change" (mean, low, high), the paired
        difference to clean rows of the same ranker. Intervals: 95 %, bootstrap over users.
    """
    cold = {
        "cold items": popularity[rows.targets] < COLD_ITEM,
        "cold users": rows.histories.lengths < COLD_USER,
    }
    found: list[dict[str, Any]] = []

    def add(name: str, kind: str, severity: float, values: np.ndarray, users: Sequence[str], **more: Any) -> None:
        low, high = bootstrap_intervals({METRIC: values}, users)[METRIC]
        interval = float(values.mean()), low, high
        row = {"ranker": name, "kind": kind, "severity": severity, "rows": len(values)}
        found.append({**row, METRIC: list(interval), **more})
        note(f"{name}, {kind} {severity:g}: NDCG@10 {interval[0]:.4f}")

    clean = {name: _ndcg(ranker(rows)) for name, ranker in rankers.items()}
    for name, values in clean.items():
        add(name, "clean", 0.0, values, rows.users)
        for kind, mask in cold.items():
            if mask.any():
                users = [rows.users[place] for place in np.flatnonzero(mask)]
                add(name, kind, 0.0, values[mask], users)
    options: dict[str, Any] = {"popularity": popularity, "max_history": max_history, "seed": seed}
    for kind in kinds:
        for severity in severities:
            histories = perturb(rows.histories, kind, severity, **options)
            damaged = Interactions(rows.users, histories, rows.targets, rows.timestamps)
            for name, ranker in rankers.items():
                values = _ndcg(ranker(damaged))
                change = paired_difference(clean[name], values, rows.users)
                add(name, kind, severity, values, rows.users, change=[change.mean, change.low, change.high])
    return found


def _ndcg(result: EvalResult) -> np.ndarray:
    return row_metrics(result.ranks["item"])[METRIC]
