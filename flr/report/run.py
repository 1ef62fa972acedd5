"""The page of a training run, or of two compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .curves import draw_panels, panels
from .drawing import can_draw
from .html import PathLike, write_page


def write_runs(runs: Sequence[Mapping[str, Any]], path: PathLike, differences: Mapping[str, Any] | None = None) -> None:
    """Write a page about one run, or two compared, whole or not at all; without matplotlib it has no curves.

    Args:
        runs: one or two, of plain values,
            name: str, told apart from the other's
            facts: values by what they are
            log: ``log_history`` of transformers' ``TrainerState``
            metrics: names of the valid metrics to draw
            evaluations: by split, ``{"metrics": {name: value}, "intervals": {name: (low, high)}, "groups": {trait:
                rows of flr.evaluate.by_trait}}``
            likes: of ``flr.explain.factor_likes``; empty where there is none
        path: of the HTML file.
        differences: by split, ``{metric: (mean, low, high, p_value)}``, second run minus first, where both ranked the
            same users.
    """
    names = [run["name"] for run in runs]
    metrics = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    found = panels([run["log"] for run in runs], metrics)
    drawn = draw_panels(found, names) if can_draw() else []
    factors = [panel for panel in drawn if "actor" in panel["title"]]
    write_page(
        path,
        "run.html",
        title=" and ".join(names) if len(names) > 1 else f"Training run {names[0]}",
        runs=runs,
        facts=list(dict.fromkeys(fact for run in runs for fact in run["facts"])),
        training=[panel for panel in drawn if panel not in factors],
        factors=factors,
        drawable=can_draw(),
        differences=differences or {},
        splits=list(dict.fromkeys(split for run in runs for split in run["evaluations"])),
    )
