"""Plots of compared runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from .drawing import DARK, LIGHT, Scheme, new_figure, png, save_png, styled
from .html import PathLike, png_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ModeSummary:
    """A mode's metric over its seeds. low and high are absent (None) where there is nothing to make an interval of."""

    mode: str
    mean: float
    low: float | None
    high: float | None
    values: list[float]


def summarise(rows: Sequence[Mapping[str, Any]], metric: str) -> list[ModeSummary]:
    """Mean and 95 % interval of a metric for every mode, in order of appearance; modes without the metric are left out.

    Two seeds or more: Student's t interval of the mean over seeds; it covers training noise, not the choice of users.
    One seed: the row's own ``row["intervals"][metric] = (low, high)`` where it has one.

    >>> rows = [{"mode": "flr", "seed": s, "metrics": {"hr@10": v}} for s, v in enumerate((0.1, 0.2))]
    >>> s = summarise(rows, "hr@10")[0]
    >>> round(s.mean, 3), round(s.low, 3), round(s.high, 3)
    (0.15, -0.485, 0.785)
    """
    summaries = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode and row["metrics"].get(metric) is not None]
        if not own:
            continue
        values = [float(row["metrics"][metric]) for row in own]
        mean = float(np.mean(values))
        low = high = None
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
            low, high = mean - half, mean + half
        elif metric in own[0].get("intervals", {}):
            low, high = (float(x) for x in own[0]["intervals"][metric])
        summaries.append(ModeSummary(mode, mean, low, high, values))
    return summaries


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics that any row has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def interval_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals of :func:`summarise` are, in words."""
    seeds = max((sum(other["mode"] == row["mode"] for other in rows) for row in rows), default=0)
    if seeds > 1:
        return f"Mean and 95 % t interval over {seeds} seeds (training noise only, the test users are the same)."
    return "One seed; 95 % bootstrap interval over test users where one was made."


def plot_compare(
    rows: Sequence[Mapping[str, Any]], path: PathLike, metrics: Sequence[str] = ("hr@10", "ndcg@10")
) -> None:
    """Dot plot of every mode: a point a seed, the mean, and its 95 % interval (see :func:`summarise`). Writes a PNG.

    Args:
        rows: ``{"mode": str, "seed": int, "metrics": {"hr@10": float, …}, "intervals": {…} or absent}``, one a run.
        path: of the PNG.
        metrics: a panel each; those that no row has are left out.

    Raises:
        ValueError: no row has any of the metrics.
        MissingExtraError: matplotlib is not installed.
    """
    panels = _summaries(rows, metrics)
    if not panels:
        raise ValueError(f"rows: expected metrics {', '.join(metrics)}, got {', '.join(metric_names(rows)) or 'none'}")
    modes = _modes(panels)
    with styled():
        figure = new_figure(figsize=(4.3 * len(panels) + 1.2, 0.46 * len(modes) + 1.25))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (metric, summary) in zip(axes, panels.items(), strict=True):
            _panel(ax, summary, modes, LIGHT)
            ax.set_title(metric.upper())
        seeds = any(len(s.values) > 1 for summary in panels.values() for s in summary)
        note = interval_note(rows) + (" Small orange dots: single seeds." if seeds else "")
        figure.supxlabel(note, fontsize=8.5, color=LIGHT.soft)
        save_png(figure, path)


def compare_panels(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, str]]:
    """What :func:`plot_compare` draws, for a page: a small picture a metric, ``title``, ``alt``, ``light``, ``dark``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = _summaries(rows, metrics)
    modes, drawn = _modes(found), []
    for metric, summary in found.items():
        pictures = []
        for scheme in (LIGHT, DARK):
            with styled(scheme):
                figure = new_figure(figsize=(4.2, 0.4 * len(modes) + 0.5))
                _panel(figure.subplots(), summary, modes, scheme)
                pictures.append(png_data(png(figure)))
        told = "; ".join(f"{s.mode} {s.mean:.4f}" for s in summary)
        title = metric.upper()
        drawn.append({"title": title, "alt": f"{title}: {told}", "light": pictures[0], "dark": pictures[1]})
    return drawn


def _summaries(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, list[ModeSummary]]:
    return {metric: summary for metric in metrics if (summary := summarise(rows, metric))}


def _modes(panels: Mapping[str, Sequence[ModeSummary]]) -> list[str]:
    return list(dict.fromkeys(s.mode for summary in panels.values() for s in summary))


def _panel(ax: Axes, summary: Sequence[ModeSummary], modes: Sequence[str], scheme: Scheme) -> None:
    """A metric of every mode."""
    for s in summary:
        y = modes.index(s.mode)
        if s.low is not None and s.high is not None:
            ax.plot([s.low, s.high], [y, y], color=scheme.first, linewidth=2.2, solid_capstyle="round", zorder=2)
        if len(s.values) > 1:
            below = [y + 0.2] * len(s.values)
            ax.scatter(s.values, below, s=16, color=scheme.second, edgecolor=scheme.ground, linewidth=0.5, zorder=3)
        ax.scatter([s.mean], [y], s=52, color=scheme.first, edgecolor=scheme.ground, linewidth=1, zorder=4)
        ax.annotate(f"{s.mean:.4f}", (s.mean, y), (0, 9), textcoords="offset points", ha="center", fontsize=8.5)
    ax.set_yticks(range(len(modes)), modes, fontsize=10, color=scheme.text)
    ax.set_ylim(len(modes) - 0.45, -0.7)
    ax.grid(axis="x")
    ax.tick_params(length=0)
    ax.locator_params(axis="x", nbins=5)
    ax.spines[:].set_visible(False)


#: Lines beyond two colours differ by dash and marker, so that they are told apart without colour, too.
_LINES = (("-", "o"), ("-", "s"), ("--", "o"), ("--", "s"), (":", "o"), (":", "s"), ("-.", "o"), ("-.", "s"))


def plot_robustness(
    found: Sequence[Mapping[str, Any]], path: PathLike, metric: str = "ndcg@10", *, dark: bool = False
) -> None:
    """A panel a kind of damage: the metric against its severity, a line a ranker, with 95 % intervals. Writes a PNG.

    Args:
        found: what :func:`flr.evaluate.robustness` returns.
        path: of the PNG. metric: one that every row has as (mean, low, high).
        dark: light on dark, for a page of that scheme.

    Raises:
        ValueError: nothing was damaged. MissingExtraError: matplotlib is not installed.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in found if "change" in row))
    if not kinds:
        raise ValueError("found: expected rows of damaged histories, got none")
    scheme = DARK if dark else LIGHT
    names = list(dict.fromkeys(row["ranker"] for row in found))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    with styled(scheme):
        figure = new_figure(figsize=(3.1 * columns + 0.4, 2.5 * rows + 0.9))
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for ax, kind in zip(axes, kinds, strict=False):
            for place, name in enumerate(names):
                _damage_line(
                    ax,
                    [r for r in found if r["ranker"] == name and r["kind"] in ("clean", kind)],
                    metric,
                    place,
                    scheme,
                )
            ax.set_title(kind)
            ax.set_ylim(bottom=0)
            ax.grid(axis="y")
            ax.tick_params(length=0)
            ax.locator_params(nbins=5)
            ax.spines[:].set_visible(False)
        for ax in axes[len(kinds) :]:
            ax.set_visible(False)
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper center", frameon=False, ncols=min(5, len(names)))
        figure.supxlabel("share of the history that is damaged", fontsize=9, color=scheme.soft)
        figure.supylabel(metric.upper(), fontsize=9, color=scheme.soft)
        save_png(figure, path)


def _damage_line(ax: Axes, rows: list[Mapping[str, Any]], metric: str, place: int, scheme: Scheme) -> None:
    """A ranker's metric against severity."""
    rows = sorted(rows, key=lambda row: row["severity"])
    x, values = [row["severity"] for row in rows], np.array([row[metric] for row in rows])
    dash, marker = _LINES[place % len(_LINES)]
    colour = (scheme.first, scheme.second)[place % 2]
    ax.fill_between(x, values[:, 1], values[:, 2], color=colour, alpha=0.07, linewidth=0)
    ax.plot(x, values[:, 0], color=colour, linestyle=dash, marker=marker, markersize=4.5, label=rows[0]["ranker"])
