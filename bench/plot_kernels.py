"""Draw docs/figures/kernels.svg: how a program walks over its tile, and the measured times of bench/results.

python bench/plot_kernels.py [RESULTS.json] [FIGURE.svg]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

matplotlib.rcParams.update({"svg.hashsalt": "flr", "svg.fonttype": "none", "font.size": 9})

ROOT = Path(__file__).parents[1]
BLUE, ORANGE, GREY, DARK = "#3b6ea5", "#d9822b", "#d8dde3", "#33383d"
STEPS = 6


def walk(axes) -> None:
    """One user's history [L, D], one tile of it, the two walks over D, partial results and their combination."""
    axes.add_patch(Rectangle((0, 0), 6, 5, facecolor=GREY, edgecolor="white"))
    for column in range(STEPS):
        axes.add_patch(Rectangle((column, 2), 1, 1, facecolor=BLUE, alpha=0.35 + 0.1 * column, edgecolor="white"))
    axes.add_patch(Rectangle((0, 4), 6, 1, facecolor="white", edgecolor=GREY, hatch="///"))
    axes.text(3, 4.5, "tile without a valid token: nothing read", ha="center", va="center", color=DARK, fontsize=8)
    for y, start, end, text, colour in (
        (3.25, 0.2, 5.8, "1  scores  s += u · h", BLUE),
        (1.75, 5.8, 0.2, "2  pooling  c = p · h, from the caches", ORANGE),
    ):
        axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.6))
        axes.text(3, y + (0.28 if y > 2.5 else -0.32), text, ha="center", va="center", color=colour)
    axes.text(-0.15, 2.5, "BLOCK_L tokens\n= one program", ha="right", va="center", color=DARK)
    axes.text(3, -0.35, "D, BLOCK_D columns a step", ha="center", va="center", color=DARK)
    axes.text(3, 5.35, "history of one user [L, D]", ha="center", va="center", color=DARK)
    for y, text, alpha in ((0.5, "m, l, e, O, c", 0.5), (2.2, "m, l, e, O, c", 0.5), (4.2, "c not written", 0.15)):
        axes.add_patch(Rectangle((7.2, y), 1.8, 0.6, facecolor=ORANGE, alpha=alpha, edgecolor="white"))
        axes.text(8.1, y + 0.3, text, ha="center", va="center", fontsize=8, color=DARK)
        if alpha == 0.5:
            axes.add_patch(FancyArrowPatch((9.05, y + 0.3), (9.7, 2.5), arrowstyle="-|>", mutation_scale=9, color=DARK))
    axes.add_patch(FancyArrowPatch((6.1, 2.5), (7.1, 2.5), arrowstyle="-|>", mutation_scale=9, color=DARK))
    axes.add_patch(Rectangle((9.7, 2.0), 2.1, 1.0, facecolor=ORANGE, edgecolor="white"))
    axes.text(10.75, 2.5, "combine\nin fixed order", ha="center", va="center", fontsize=8, color="white")
    axes.set(xlim=(-2.7, 12), ylim=(-0.8, 5.8))
    axes.set_title("factor_attention forward: one read from device memory", fontsize=10)
    axes.axis("off")


def times(axes, results: dict) -> None:
    """Median times of every variant, grouped by case."""
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    variants = ("flr", "eager", "compiled", "projected")
    colours = (ORANGE, "#8aa4bf", "#5b7fa3", DARK)
    median = {(row["case"], row["variant"]): row["p50_ms"] for row in results["rows"]}
    for index, (variant, colour) in enumerate(zip(variants, colours, strict=True)):
        have = [i for i, case in enumerate(cases) if (case, variant) in median]
        bars = axes.bar(
            [i + 0.2 * (index - 1.5) for i in have],
            [median[cases[i], variant] for i in have],
            0.19,
            color=colour,
            label=variant,
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axes.set_xticks(range(len(cases)), [c.replace(" B", "\nB").replace(" D", "\nD") for c in cases], fontsize=7)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel("median ms")
    axes.set_title(
        f"measured: {results['device']}, {results['threads']} thread(s), torch {results['torch']}", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main(source: Path, target: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.9), width_ratios=(1.15, 1), layout="constrained")
    walk(left)
    times(right, json.loads(source.read_text()))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    if target.suffix == ".svg":  # matplotlib leaves blanks at line ends
        target.write_text("\n".join(line.rstrip() for line in target.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench/results/cpu_factor_attention.json",
        Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs/figures/kernels.svg",
    )
