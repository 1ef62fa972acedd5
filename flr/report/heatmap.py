"""The heat map of what each factor attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .drawing import LIGHT, new_figure
from .html import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAT = ("#f7f9fb", "#c4dcef", "#6ba7d4", "#1f6fae", "#0b3a66")
_LABEL = 30  # characters of a title
_NUMBERS = 14  # with up to this many columns the cells hold numbers
#: History items that are drawn at most, the latest ones.
COLUMNS = 30


def draw(alpha: np.ndarray, gates: np.ndarray, titles: list[str]) -> Figure:
    """Heat map of attention alpha [K, M] with gates [K] as bars; inside :func:`~flr.report.drawing.styled`."""
    factors, columns = alpha.shape
    cell = 0.62 if columns <= _NUMBERS else 0.42
    width, height = max(cell * columns, 2.8), 0.5 * factors
    figure = new_figure(figsize=(width + 3.6, height + 2.6))
    from matplotlib.colors import LinearSegmentedColormap

    heat = LinearSegmentedColormap.from_list("flr", _HEAT)
    ax, side = figure.subplots(1, 2, sharey=True, width_ratios=[width, 1.5])
    largest = max(float(alpha.max()), 1e-12)
    mesh = ax.pcolormesh(alpha, cmap=heat, vmin=0, vmax=largest, edgecolors="white", linewidth=1.5)
    if columns <= _NUMBERS:
        for (k, m), value in np.ndenumerate(alpha):
            colour = "white" if value > 0.55 * largest else "#1b2733"
            ax.text(m + 0.5, k + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    ax.set_ylim(factors, 0)
    ax.set_yticks(np.arange(factors) + 0.5, [f"factor {k + 1}" for k in range(factors)], fontsize=10)
    labels = [short("".join(c if c.isprintable() else " " for c in title), _LABEL) for title in titles]
    text = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 9}
    ax.set_xticks(np.arange(columns) + 0.5, labels, **text)
    ax.set_title("Attention, %")
    side.barh(np.arange(factors) + 0.5, gates, height=0.6, color="#e69f00")
    for k, gate in enumerate(gates):
        side.text(gate + 0.02, k + 0.5, f"{100 * gate:.0f}", ha="left", va="center", fontsize=8.5, color=LIGHT.text)
    side.set_xlim(0, max(float(gates.max()) * 1.35, 0.05))
    side.set_xticks([])
    side.set_title("Gate, %")
    for axis in (ax, side):
        axis.tick_params(length=0, labelcolor=LIGHT.text)
        axis.spines[:].set_visible(False)
    side.tick_params(labelleft=False)
    if columns > _NUMBERS:
        bar = figure.colorbar(mesh, ax=side, fraction=0.3, aspect=14, format=lambda x, _: f"{100 * x:.0f} %")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8.5)
    ax.set_xlabel("History, oldest to latest", fontsize=9, color=LIGHT.soft, loc="left")
    return figure
