"""The figures of the documents, drawn from result rows: speed-up, roofline, scaling, and the kernels' diagram.

Each SVG carries a digest of the numbers it was drawn from, so that a test can tell a stale figure without drawing it
again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import NullLocator

from . import scaling

matplotlib.rcParams.update({"svg.hashsalt": "flr", "svg.fonttype": "none", "font.size": 9})

BLUE, ORANGE, GREY, DARK = "#3b6ea5", "#d9822b", "#d8dde3", "#33383d"
PALETTE = (ORANGE, BLUE, "#5f9e6e", "#8d6ab8", "#b55d60", "#857a6c", "#4aa3a2", "#c4a23f")
#: What a sweep's symbol counts.
SYMBOLS = {
    "L": "tokens of a prompt",
    "B": "users",
    "D": "hidden size",
    "K": "factors",
    "G": "group",
    "T": "refinements",
}
SYMBOLS |= {"C": "items of the catalogue"}
Row = dict[str, Any]


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def speedup(rows: list[Row]) -> plt.Figure:
    """Bars competitor / ours with 20-80 % whiskers, and a mark at the target."""
    height = 0.27 * len(rows) + 1.1
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    suites = list(dict.fromkeys(r["suite"] for r in rows))
    for y, row in enumerate(rows):
        p20, p50, p80 = (row["ratio"][k] for k in ("p20", "p50", "p80"))
        axes.barh(y, p50, color=PALETTE[suites.index(row["suite"]) % len(PALETTE)], height=0.7)
        axes.plot([p20, p80], [y, y], color=DARK, lw=1)
        axes.plot(row["target"], y, marker="|", color=DARK, markersize=11, markeredgewidth=2)
        axes.text(max(p80, row["target"]) * 1.06, y, f"{p50:.3g}×", va="center", fontsize=8, color=DARK)
    axes.set_yticks(range(len(rows)), [f"{r['suite']} {r['case']} · {r['variant']}" for r in rows], fontsize=7)
    axes.axvline(1, color=DARK, lw=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    left, right = axes.get_xlim()
    ticks = [x * 10**n for n in range(-2, 4) for x in (1, 2, 5) if left <= x * 10**n <= right]
    axes.set_xticks(ticks, [f"{x:g}×" for x in ticks])
    axes.set_xlabel("time of the competitor / time of ours (medians of one run)", fontsize=8)
    figure.suptitle("times faster than the competitor on the same work; line: 20-80 %, tick: target", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def roofline(rows: list[Row]) -> plt.Figure:
    """Operations a byte against TFLOP/s, under the copy and matmul ceilings of the run."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    ceilings = rows[0]["run"]["ceilings"]
    bandwidth = ceilings["copy_gb_per_s"] / 1e3
    intensity = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(intensity) / 4, max(max(intensity), 100) * 2
    for dtype, peak in ceilings["matmul_tflop_per_s"].items():
        knee = peak / bandwidth
        axes.plot([low, knee, max(high, knee)], [low * bandwidth, peak, peak], color=DARK, lw=1.2)
        axes.text(max(high, knee), peak, f"matmul {dtype}: {peak:.3g} TFLOP/s", ha="right", va="bottom", fontsize=8)
    axes.text(low, 1.5 * low * bandwidth, f"copy: {1e3 * bandwidth:.3g} GB/s", va="bottom", fontsize=8)
    colours = {v: PALETTE[i % len(PALETTE)] for i, v in enumerate(dict.fromkeys(r["variant"] for r in rows))}
    shapes = {suite: "osD^vP*X"[i % 8] for i, suite in enumerate(dict.fromkeys(r["suite"] for r in rows))}
    for r in rows:
        place = r["flops"] / r["bytes"], r["tflop_per_s"]
        axes.scatter(*place, s=22, color=colours[r["variant"]], marker=shapes[r["suite"]], zorder=3)
    for variant, colour in colours.items():
        axes.scatter([], [], s=22, color=colour, label=variant)
    for name, shape in shapes.items():
        axes.scatter([], [], s=22, color=GREY, edgecolor=DARK, marker=shape, label=name.replace("_", " "))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte that must move",
        ylabel="TFLOP/s, counting what the work needs",
    )
    axes.margins(y=0.1)
    axes.set_ylim(
        bottom=0.2 * min(r["tflop_per_s"] for r in rows), top=3 * max(ceilings["matmul_tflop_per_s"].values())
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    axes.set_title(f"{rows[0]['run']['device']}: roofline of a large copy and a large matrix product")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def growth(rows: list[Row]) -> plt.Figure:
    """Time and memory of every sweep with its fitted power law."""
    found = [sweep for sweep in scaling.sweeps(rows) if sweep.time_law()]
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3 * columns, 2.4 * lines), layout="constrained", squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, sweep in zip(grid.flat, found, strict=False):
        time, memory = sweep.time_law(), sweep.memory_law()
        axes.plot(sweep.sizes, sweep.ms, "o", color=ORANGE, markersize=4)
        text = f"time {time.exponent:.2f}"
        fitted = sweep.sizes[-time.points :]
        axes.plot(fitted, [time.at(x) for x in fitted], color=ORANGE, lw=0.8)
        if memory:
            other = axes.twinx()
            other.plot(sweep.sizes, [y if y else float("nan") for y in sweep.peak_mb], "s", color=BLUE, markersize=3.5)
            buffers = sweep.buffers()
            other.plot(sweep.sizes, [buffers.at(x) for x in sweep.sizes], color=BLUE, lw=0.8)
            other.set_yscale("log")
            _two_ticks(other.yaxis, [y for y in sweep.peak_mb if y], " MB")
            other.set_ylim(*_decades([y for y in sweep.peak_mb if y]))
            other.tick_params(labelsize=7, colors=BLUE)
            text += f", memory {memory.exponent:.2f}"
        axes.set(xscale="log", yscale="log", ylim=_decades(sweep.ms))
        axes.set_xlabel(f"{sweep.varied}, {SYMBOLS[sweep.varied]}", fontsize=7, labelpad=-2)
        _two_ticks(axes.xaxis, sweep.sizes)
        _two_ticks(axes.yaxis, sweep.ms, " ms")
        axes.tick_params(labelsize=7)
        axes.set_title(f"{sweep.operation}: {text}", fontsize=8)
    figure.suptitle(
        "circles, left: median ms with its power law over the larger half of the sizes (exponents in the titles); "
        "squares, right: peak MB with its sum of buffers",
        fontsize=9,
    )
    return figure


def _decades(values: list[float]) -> tuple[float, float]:
    """Limits around ``values``: two decades at least, so that what hardly grows looks flat."""
    low, high = min(values), max(values)
    room = max(10 / (high / low) ** 0.5, 1.3)
    return low / room, high * room


def _two_ticks(axis: Axis, values: list[float], unit: str = "") -> None:
    """Label the least and the greatest value alone."""
    ends = [min(values), max(values)]
    if ends[1] < 1.5 * ends[0]:
        ends = ends[1:]  # two labels would overlap
    texts = [f"{x:.3g}" if x < 1e3 else f"{x:,.0f}" if x < 1e5 else f"$10^{{{math.log10(x):.3g}}}$" for x in ends]
    axis.set_ticks(ends, [text + unit for text in texts])
    axis.set_minor_locator(NullLocator())


def kernels(rows: list[Row]) -> plt.Figure:
    """How a program walks over its tile, and the measured medians of factor attention."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.9), width_ratios=(1.15, 1), layout="constrained")
    _walk(left)
    cases = list(dict.fromkeys(r["case"] for r in rows))
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    median = {(r["case"], r["variant"]): r["p50_ms"] for r in rows if "p50_ms" in r}
    for index, variant in enumerate(variants):
        have = [i for i, case in enumerate(cases) if (case, variant) in median]
        bars = right.bar(
            [i + 0.2 * (index - (len(variants) - 1) / 2) for i in have],
            [median[cases[i], variant] for i in have],
            0.19,
            color=PALETTE[index],
            label=variant,
        )
        right.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    right.set_xticks(range(len(cases)), [c.replace(" B", "\nB").replace(" D", "\nD") for c in cases], fontsize=7)
    right.set_yscale("log")
    right.margins(y=0.15)
    right.set_ylabel("median ms")
    run = rows[0]["run"]
    right.set_title(f"{run['device']}, {run['threads']} thread(s), torch {run['versions']['torch']}", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def _walk(axes: plt.Axes) -> None:
    """One user's history [L, D], one tile of it, the two walks over D, partial results and their combination."""
    axes.add_patch(Rectangle((0, 0), 6, 5, facecolor=GREY, edgecolor="white"))
    for column in range(6):
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


#: Figure, its function, and the rows it shows. On several devices a GPU's rows are drawn, if it has any for the figure.
FIGURES: dict[str, tuple[Callable[[list[Row]], plt.Figure], Callable[[Row], bool]]] = {
    "speedup": (speedup, lambda row: "target" in row and "ratio" in row),
    "roofline": (roofline, lambda row: "flops" in row and "bytes" in row and "p50_ms" in row),
    "scaling": (growth, lambda row: row["suite"] == "scaling"),
    "kernels": (kernels, lambda row: row["suite"] == "factor_attention" and row["tier"] == "default"),
}


def chosen(devices: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of every figure that can be drawn."""
    found = {}
    for name, (_, wanted) in FIGURES.items():
        of_device = {device: [row for row in rows if wanted(row)] for device, rows in devices.items()}
        best = sorted((device.startswith("CPU"), device) for device, rows in of_device.items() if rows)
        if best:
            found[name] = of_device[best[0][1]]
    if "scaling" in found and not any(sweep.time_law() for sweep in scaling.sweeps(found["scaling"])):
        del found["scaling"]
    return found


def draw(devices: dict[str, list[Row]], folder: Path) -> list[Path]:
    """Draw the figures whose numbers changed; returns their paths."""
    changed = []
    for name, rows in chosen(devices).items():
        path = folder / f"{name}.svg"
        mark = digest(rows)
        if path.exists() and f"data {mark}" in path.read_text():
            continue
        figure = FIGURES[name][0](rows)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.svg")
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": f"data {mark}"})
        plt.close(figure)
        temporary.write_text("\n".join(line.rstrip() for line in temporary.read_text().splitlines()) + "\n")
        temporary.replace(path)
        changed.append(path)
    return changed
