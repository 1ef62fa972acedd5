"""A picture of which factors a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .drawing import DARK, LIGHT, new_figure, save_png, styled
from .html import PathLike

_MOST_KINDS = 12


def plot_needed(found: Mapping[str, Any], path: PathLike, *, dark: bool = False) -> None:
    """Loss against the number of factors kept, and the loss of each kind of item without each factor. Writes a PNG.

    Args:
        found: ``FactorsNeeded.to_dict()``.
        path: of the PNG. dark: light on dark, for a page of that scheme.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    scheme = DARK if dark else LIGHT
    several = len(found["kinds"]) > 1
    with styled(scheme):
        figure = new_figure(figsize=(8.3 if several else 4.2, 3.0))
        axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
        counts = [len(left) for left, _ in found["path"]]
        change = np.array([list(values) for _, values in found["path"]])  # [K, (mean, low, high)]
        ax = axes[0]
        ax.axhspan(0, found["error"], color=scheme.soft, alpha=0.15, linewidth=0, label="a standard error")
        ax.fill_between(counts, change[:, 1], change[:, 2], color=scheme.first, alpha=0.15, linewidth=0)
        ax.plot(counts, change[:, 0], color=scheme.first, marker="o", markersize=4.5)
        enough = counts.index(found["enough"])
        ax.plot(counts[enough], change[enough, 0], color=scheme.second, marker="o", markersize=9, fillstyle="none")
        ax.set_xticks(counts)
        ax.set_xlabel("factors kept")
        ax.set_ylabel("loss more, nats a user")
        ax.set_title(f"{found['enough']} of {counts[0]} are enough")
        ax.legend(frameon=False, fontsize=8)
        ax.grid(axis="y")
        ax.spines[:].set_visible(False)
        if several:
            _kinds(axes[1], found, scheme)
        save_png(figure, path)


def _kinds(ax: Any, found: Mapping[str, Any], scheme: Any) -> None:
    """A cell a factor and kind, the kinds of most rows."""
    order = sorted(range(len(found["kinds"])), key=lambda n: -found["rows"][n])[:_MOST_KINDS]
    values = np.array(found["by_kind"])[:, order]
    bound = max(float(np.abs(values).max()), found["error"])  # what is within an error stays pale
    ax.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    for k, row in enumerate(values):
        for n, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * bound else "black"
            ax.text(n, k, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    labels = [found["kinds"][n] for n in order]
    slanted = {"rotation": 45, "ha": "right"} if max(map(len, labels)) > 4 else {}
    ax.set_xticks(range(len(order)), labels, fontsize=8, **slanted)
    ax.set_yticks(range(len(values)), [str(k + 1) for k in range(len(values))])
    ax.set_ylabel("without factor")
    ax.set_xlabel("kind of the next item")
    ax.set_title("loss more, by kind of item")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
