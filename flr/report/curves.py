"""Training curves: a small picture for each question, light and dark, that a phone shows at its own size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .drawing import DARK, LIGHT, Scheme, new_figure, png, styled
from .html import colour, png_data, short

_STYLES = ("-", "--")  # of the first and the second run
_TERMS = ("orthogonality", "diversity", "sparsity")
_REWARDS = ("reward", "kl", "clip_fraction")


class Series(NamedTuple):
    """One line of a panel: which run's it is (0 or 1), its steps and its values."""

    name: str
    run: int
    steps: list[float]
    values: list[float]


def panels(logs: Sequence[Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> dict[str, list[Series]]:
    """What there is to draw of the logs of one run or two: the series of each panel, by its title.

    Args:
        logs: ``log_history`` of transformers' ``TrainerState``, one a run.
        metrics: of the valid split, as "ndcg@10".

    >>> found = panels([[{"step": 1, "loss": 2.0}, {"step": 1, "eval_gate_1": 0.6}, {"step": 2, "loss": 1.5}]], ["mrr"])
    >>> {title: series[0].values for title, series in found.items()}
    {'Training loss': [2.0, 1.5], 'Gate share of each factor': [0.6]}
    """
    factors = range(
        1, 1 + max((sum(k.startswith("eval_gate_") for k in line) for log in logs for line in log), default=0)
    )
    wanted: dict[str, dict[str, str]] = {
        "Training loss": {"loss": "loss"},
        "Regularisers": {name: name for name in _TERMS},
        "Reinforcement": {name: name for name in _REWARDS},
        "Valid split": {f"eval_{name}": name.upper() for name in metrics},
        "Gate share of each factor": {f"eval_gate_{k}": f"F{k}" for k in factors},
        "Attention entropy of each factor": {f"eval_attention_entropy_{k}": f"F{k}" for k in factors},
        "Overlap of the factors' attention": {"eval_attention_overlap": "mean cosine"},
    }
    found: dict[str, list[Series]] = {}
    for title, names in wanted.items():
        for run, log in enumerate(logs):
            for key, name in names.items():
                points = {float(line["step"]): float(line[key]) for line in log if key in line and "step" in line}
                if points:
                    steps = sorted(points)
                    found.setdefault(title, []).append(Series(name, run, steps, [points[step] for step in steps]))
    return found


def draw_panels(found: Mapping[str, Sequence[Series]], names: Sequence[str]) -> list[dict[str, str]]:
    """For a page: ``title``, ``alt``, and the pictures ``light`` and ``dark``; ``names`` are the runs'.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    drawn = []
    for title, series in found.items():
        told = [f"{_name(s, names)} {s.values[0]:.4g} to {s.values[-1]:.4g}" for s in series]
        light, dark = (png_data(_draw(title, series, names, scheme)) for scheme in (LIGHT, DARK))
        drawn.append({"title": title, "alt": f"{title}: {'; '.join(told)}", "light": light, "dark": dark})
    return drawn


def _name(series: Series, names: Sequence[str]) -> str:
    return f"{series.name}, {names[series.run]}" if len(names) > 1 else series.name


def _draw(title: str, series: Sequence[Series], names: Sequence[str], scheme: Scheme) -> bytes:
    """A panel as PNG; a line's colour says what it is, its style which run's."""
    kinds = list(dict.fromkeys(s.name for s in series))
    with styled(scheme):
        figure = new_figure(figsize=(4.2, 2.7))
        axes = figure.subplots()
        for s in series:
            factor = re.fullmatch(r"F(\d+)", s.name)
            line = colour(int(factor[1]) - 1) if factor else f"C{kinds.index(s.name)}"
            mark = "o" if len(s.steps) < 20 else ""
            axes.plot(s.steps, s.values, _STYLES[s.run], marker=mark, ms=3, color=line, label=_label(s, names, kinds))
        axes.set_xlabel("step")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.locator_params(axis="both", nbins=5)
        axes.margins(y=0.12)
        shown: dict[str, Any] = {}
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
        if len(shown) > 1:  # below the curves, never on them
            options: dict[str, Any] = {"ncols": 4, "fontsize": 8, "handlelength": 2.2}
            figure.legend(shown.values(), shown.keys(), loc="outside lower center", **options)
        return png(figure)


def _label(series: Series, names: Sequence[str], kinds: Sequence[str]) -> str:
    """What the legend calls a line: the page says which run's style is which."""
    return short(names[series.run], 24) if len(kinds) == 1 and len(names) > 1 else series.name
