"""The page that a quickstart ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .drawing import can_draw
from .explanation import shown
from .html import PathLike, write_page
from .plots import compare_panels, interval_note, metric_names, summarise

_MAIN_METRICS = ("hr@10", "ndcg@10")
_AGREEMENT = ("nmi", "chance", "chance_high", "within_user", "within_user_chance", "nmi_scores", "chance_scores")


def quickstart_report(results: Mapping[str, Any], path: PathLike) -> None:
    """Write the page that a quickstart ends with. A section whose key is absent is left out.

    Args:
        results: plain values,
            title: str
            text: str, a paragraph on what was run
            rows: as for :func:`~flr.report.plots.plot_compare`, with ``"seconds": float`` or without
            names: what each mode is, by mode
            differences: ``{mode: {metric: (mean, low, high)}}``, mode minus control (as ``flr compare`` gives them),
                shown beside ``rows``
            control: str, the mode that differences are to; "anchor" when absent
            nmi: ``FactorInterest.to_dict()`` by mode, with ``nmi_scores`` and ``chance_scores`` or without
            example: ``Explanation.to_dict()``
            next_steps: list of shell commands
            settings: values by name
        path: of the HTML file; written whole or not at all.

    Raises:
        ValueError: an unknown key.
    """
    known = ("title", "text", "rows", "names", "differences", "control", "nmi", "example", "next_steps", "settings")
    if unknown := set(results) - set(known):
        raise ValueError(f"results: expected keys among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    rows = results.get("rows")
    comparison = _comparison(rows) if rows else None
    write_page(
        path,
        "quickstart.html",
        title=results.get("title") or "FLR quickstart",
        text=results.get("text"),
        comparison=comparison,
        names=results.get("names"),
        drawn=compare_panels(rows, comparison["main"]) if rows and comparison and can_draw() else [],
        many_seeds=any(mode["seeds"] > 1 for mode in comparison["modes"]) if comparison else False,
        differences=results.get("differences"),
        control=results.get("control") or "anchor",
        nmi=[_recovery(mode, values) for mode, values in (results.get("nmi") or {}).items()],
        example=shown(results["example"]) if results.get("example") else None,
        next_steps=results.get("next_steps"),
        settings=results.get("settings"),
    )


def _comparison(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = metric_names(rows)
    by_metric = {metric: {s.mode: s for s in summarise(rows, metric)} for metric in metrics}
    modes = []
    for name in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == name]
        seconds = [row["seconds"] for row in own if row.get("seconds") is not None]
        modes.append(
            {
                "name": name,
                "seeds": len(own),
                "metrics": {metric: by_metric[metric].get(name) for metric in metrics},
                "seconds": float(np.mean(seconds)) if seconds else None,
            }
        )
    main = [metric for metric in _MAIN_METRICS if metric in metrics] or metrics
    return {"modes": modes, "metrics": metrics, "main": main, "note": interval_note(rows)}


def _recovery(mode: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement of a mode's factors with the interests, and the interests of the items that each factor was given."""
    confusion = np.asarray(values.get("confusion") or np.zeros((0, 0)), float)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1) if confusion.size else confusion
    totals = confusion.sum(1) if confusion.size else ()
    rows = [{"shares": row.tolist(), "total": int(total)} for row, total in zip(shares, totals, strict=True)]
    return {"name": mode, "numbers": [values.get(key) for key in _AGREEMENT], "rows": rows}
