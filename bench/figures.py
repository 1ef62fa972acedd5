"""The figures of the documents, drawn from result rows: speed-up, roofline, scaling, and the kernels' diagram.

Each SVG carries a digest of the numbers it was drawn from, so that a test can tell a stale figure without drawing it
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from flr.report.drawing import LIGHT, WIDTH, new_figure, save_svg, styled
from flr.report.html import FACTOR_COLOURS

from . import scaling

INK, SOFT, LINE, BLUE = LIGHT.text, LIGHT.soft, LIGHT.line, LIGHT.first
ORANGE = "#e69f00"
#: Of variants, ours first.
PALETTE = (BLUE, *(colour for colour in FACTOR_COLOURS[1:] if colour != BLUE), FACTOR_COLOURS[0])
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


def speedup(rows: list[Row]) -> Figure:
    """A bar for each kind of work and competitor: competitor / ours, from the worst case to the best."""
    groups = kinds_of_work(rows)
    figure = new_figure(figsize=(WIDTH, 0.68 * len(groups) + 1.0))
    axes = figure.subplots()
    for y, (words, against, group) in enumerate(groups):
        medians, target = [row["ratio"]["p50"] for row in group], group[0]["target"]
        low, high = min(medians), max(medians)
        axes.barh(y, high - 1, left=1, color=BLUE, height=0.4, alpha=0.35)
        axes.barh(y, low - 1, left=1, color=BLUE if low >= 1 else LIGHT.second, height=0.4)
        axes.plot(target, y, marker="|", color=INK, markersize=15, markeredgewidth=2)
        ends = f"{low:.3g}" if len(group) == 1 else f"{low:.3g} to {high:.3g}"
        axes.text(max(high, target) * 1.05, y, f"{ends}×", va="center", weight="bold")
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "baseline"}
        base = y - 0.36
        name = axes.annotate(words, (0, base), (3, 0), xycoords=("axes fraction", "data"), weight="bold", **beside)
        axes.annotate(against, (1, base), (8, 0), xycoords=(name, "data"), color=SOFT, fontsize=8.5, **beside)
    axes.set_yticks([])
    axes.set(xscale="log", ylim=(len(groups) - 0.6, -0.7))
    right = max(max(row["ratio"]["p80"], row["target"]) for row in rows)
    axes.set_xlim(min(1, *(row["ratio"]["p50"] for row in rows)), 1.7 * right)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    _written_out(axes.xaxis, "×")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel(
        "Time of the competitor / time of ours. Dark: reached in every case; brown: slower in the worst. Tick: target."
    )
    where = f": {rows[0]['run']['device']}" if "run" in rows[0] else ""
    axes.set_title(f"Times faster than the competitor on the same work{where}")
    return figure


def kinds_of_work(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """Rows by suite, first word of the case, competitor and target: work and sizes that their cases share, and rows."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["case"].split()[0], row["variant"], row["target"]), []).append(row)
    found = []
    for (suite, kind, variant, _), group in groups.items():
        shared = [word for word in group[0]["case"].split()[1:] if all(word in row["case"].split() for row in group)]
        cases = f", {len(group)} cases" if len(group) > 1 else ""
        found.append((f"{suite.replace('_', ' ')}: {kind}", f"against {variant}{cases}, {' '.join(shared)}", group))
    return found


def roofline(rows: list[Row]) -> Figure:
    """Operations a byte against TFLOP/s, under the copy and matmul ceilings of the run."""
    figure = new_figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    ceilings = rows[0]["run"]["ceilings"]
    bandwidth = ceilings["copy_gb_per_s"] / 1e3
    intensity = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(intensity) / 10, max(max(intensity), 100) * 2
    for dtype, peak in ceilings["matmul_tflop_per_s"].items():
        knee = peak / bandwidth
        axes.plot([low, knee, max(high, knee)], [low * bandwidth, peak, peak], color=SOFT, lw=1.2)
        axes.annotate(
            f"matmul {dtype}: {peak:.3g} TFLOP/s",
            (knee, peak),
            (0, 5),
            textcoords="offset points",
        )
    copy = f"copy: {float(f'{1e3 * bandwidth:.3g}'):,.0f} GB/s"
    axes.annotate(copy, (low, low * bandwidth), (4, -4), textcoords="offset points", va="top", ha="left")
    colours = {v: PALETTE[i % len(PALETTE)] for i, v in enumerate(dict.fromkeys(r["variant"] for r in rows))}
    shapes = {suite: "osD^vP*X"[i % 8] for i, suite in enumerate(dict.fromkeys(r["suite"] for r in rows))}
    for r in rows:
        place = r["flops"] / r["bytes"], r["tflop_per_s"]
        axes.scatter(*place, s=30, color=colours[r["variant"]], marker=shapes[r["suite"]], ec=INK, lw=0.4, zorder=3)
    named = [
        axes.scatter([], [], s=30, color=colour, ec=INK, lw=0.4, label=variant) for variant, colour in colours.items()
    ]
    named += [
        axes.scatter([], [], s=30, color="white", edgecolor=INK, marker=shape, label=name.replace("_", " "))
        for name, shape in shapes.items()
    ]
    axes.set(xscale="log", yscale="log", xlabel="Operations a byte that must move")
    axes.set_ylabel("TFLOP/s, counting what the work needs")
    peaks = max(ceilings["matmul_tflop_per_s"].values())
    axes.set_ylim(bottom=0.4 * min(low * bandwidth, *(r["tflop_per_s"] for r in rows)), top=2.5 * peaks)
    _decades(axes.xaxis)
    _decades(axes.yaxis)
    figure.legend(handles=named, loc="outside right upper")
    axes.set_title(f"{rows[0]['run']['device']}: under the roofs of a large copy and a large matrix product")
    return figure


def growth(rows: list[Row]) -> Figure:
    """Time and memory of every sweep with its fitted power law."""
    found = [sweep for sweep in scaling.sweeps(rows) if sweep.time_law()]
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = new_figure(figsize=(WIDTH, 2.15 * lines + 0.5))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, sweep in zip(grid.flat, found, strict=False):
        _sweep(axes, sweep)
    text = "Left scale and circles: median time, with its power law over the larger half of the sizes.\n"
    text += "Right scale and squares: peak memory, with its sum of buffers. Exponents stand above."
    figure.suptitle(text, color=SOFT, fontsize=9, x=0.01, ha="left")
    return figure


def _sweep(axes: Axes, sweep: scaling.Sweep) -> None:
    """One sweep: time on the left scale, memory on the right one."""
    time, memory = sweep.time_law(), sweep.memory_law()
    assert time is not None
    axes.plot(sweep.sizes, sweep.ms, "o", color=BLUE, markersize=4)
    fitted = sweep.sizes[-time.points :]
    axes.plot(fitted, [time.at(x) for x in fitted], color=BLUE, lw=1)
    text = f"time ∝ {sweep.varied}$^{{{time.exponent:.2f}}}$"
    axes.set(xscale="log", yscale="log", ylim=_limits(sweep.ms, below=20))
    buffers = sweep.buffers()
    if memory and buffers:
        other = axes.twinx()
        known = [y for y in sweep.peak_mb if y]
        other.plot(
            sweep.sizes, [y if y else float("nan") for y in sweep.peak_mb], "s", color=LIGHT.second, markersize=3.5
        )
        other.plot(sweep.sizes, [buffers.at(x) for x in sweep.sizes], color=LIGHT.second, lw=1)
        other.set(yscale="log", ylim=_limits(known, above=20))
        _decades(other.yaxis, "B")
        other.tick_params(axis="y", labelcolor=LIGHT.second, labelsize=8)
        text += f", memory ∝ {sweep.varied}$^{{{memory.exponent:.2f}}}$"
    axes.set_xticks(_spread(sweep.sizes), [_short(x) for x in _spread(sweep.sizes)], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    _decades(axes.yaxis, "s")
    axes.tick_params(axis="y", labelcolor=BLUE, labelsize=8)
    axes.set_xlabel(f"{sweep.varied}, {SYMBOLS[sweep.varied]}", fontsize=8, labelpad=1)
    axes.set_title(sweep.operation, pad=18, fontsize=9.5)
    axes.annotate(
        text,
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color=SOFT,
        parse_math=True,
    )


def _limits(values: list[float], below: float = 1, above: float = 1) -> tuple[float, float]:
    """Limits around ``values``, two decades at least, so that what hardly grows looks flat, and room besides."""
    low, high = min(values), max(values)
    room = max(10 / (high / low) ** 0.5, 1.3)
    return low / room / below, high * room * above


def _spread(sizes: list[float]) -> list[float]:
    """At most five of the sizes, evenly, the greatest among them."""
    step = -(-len(sizes) // 5)
    return sizes[::-1][::step][::-1]


def _short(value: float) -> str:
    """A number in at most four characters, as 512, 2k or 10M."""
    for unit, name in ((1e6, "M"), (1024, "k"), (1e3, "k")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


#: Of a scale in ms or MB: what a unit is called, and how many of the scale's it holds.
_UNITS = {"s": (("µs", 1e-3), ("ms", 1.0), ("s", 1e3)), "B": (("kB", 1e-3), ("MB", 1.0), ("GB", 1e3))}


def _decades(axis: Axis, unit: str = "") -> None:
    """Ticks at powers of ten."""
    axis.set_major_locator(LogLocator(10, numticks=5))
    _written_out(axis, unit)


def _written_out(axis: Axis, unit: str = "") -> None:
    """Ticks as 0.1 or 10×, or as 100 ms and 1 s on a scale in ms."""
    axis.set_minor_locator(NullLocator())
    names = _UNITS.get(unit, ((unit, 1.0),))

    def written(value: float, _: Any) -> str:
        name, size = next(pair for pair in reversed(names) if value >= pair[1] * 0.999 or pair == names[0])
        return f"{value / size:g}{' ' * (unit in _UNITS)}{name}"

    axis.set_major_formatter(written)


def kernels(rows: list[Row]) -> Figure:
    """How a program walks over its tile, and below it the measured medians of factor attention, a row a direction."""
    cases = list(dict.fromkeys(r["case"] for r in rows))
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    kind_of = {case: words[0] if len(cases) > 6 else "" for case, words in _own_words(cases).items()}
    kinds = list(dict.fromkeys(kind_of.values()))
    figure = new_figure(figsize=(WIDTH, 3.4 + 2.4 * len(kinds)))
    upper, *lower = figure.subplots(1 + len(kinds), 1, height_ratios=(1.35, *[1] * len(kinds)))
    _walk(upper)
    for axes, kind in zip(lower, kinds, strict=True):
        _bars(axes, [row for row in rows if kind_of[row["case"]] == kind], variants)
        axes.set_ylabel(kind)
    run = rows[0]["run"]
    where = f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] > 1)}, torch {run['versions']['torch']}"
    lower[0].set_title(f"factor_attention, median time of a call: {where}", pad=24)
    lower[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(variants), borderpad=0.2)
    return figure


def _bars(axes: Axes, rows: list[Row], variants: list[str]) -> None:
    """A bar for each case and variant, from zero; a scale of powers of ten where one would hide the others."""
    cases = list(dict.fromkeys(r["case"] for r in rows))
    median = {(r["case"], r["variant"]): r["p50_ms"] for r in rows if "p50_ms" in r}
    largest = max(median.values())
    own = [variant for variant in variants if any((case, variant) in median for case in cases)]
    width = 0.84 / len(variants)
    for index, variant in enumerate(own):
        have = [i for i, case in enumerate(cases) if (case, variant) in median]
        places = [i + width * (index - (len(own) - 1) / 2) for i in have]
        values = [median[cases[i], variant] for i in have]
        colour = PALETTE[variants.index(variant)]
        bars = axes.bar(places, values, width * 0.94, color=colour, label=variant)
        axes.bar_label(bars, [_number(x, largest) for x in values], fontsize=8.5, padding=1)
    axes.set_xticks(range(len(cases)), _in_lines(cases), color=INK, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    if largest > 30 * min(median.values()):
        axes.set_yscale("log")
        _decades(axes.yaxis, "s")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        _written_out(axes.yaxis, "s")
    axes.margins(y=0.14)


def _number(ms: float, largest: float) -> str:
    """A bar's milliseconds, or microseconds where no bar has a millisecond."""
    if largest < 1:
        return f"{1e3 * ms:.0f}"
    return f"{ms:.2g}" if ms < 10 else f"{ms:.0f}"


def _own_words(cases: list[str]) -> dict[str, list[str]]:
    """Of each case the words that not all have."""
    shared = set.intersection(*(set(case.split()) for case in cases)) if len(cases) > 1 else set()
    return {case: [word for word in case.split() if word not in shared] for case in cases}


def _in_lines(cases: list[str]) -> list[str]:
    """What tells cases apart, in two lines."""
    halves = [(words[: -(-len(words) // 2)], words[-(-len(words) // 2) :]) for words in _own_words(cases).values()]
    return ["\n".join(filter(None, (" ".join(first), " ".join(second)))) for first, second in halves]


def _walk(axes: Axes) -> None:
    """One user's history [L, D], one tile of it, the two walks over D, partial results and their combination."""
    centre = {"ha": "center", "va": "center"}
    axes.add_patch(Rectangle((0, 0), 6, 5, facecolor=LINE, edgecolor="white"))
    for column in range(6):
        axes.add_patch(Rectangle((column, 2), 1, 1, facecolor=BLUE, alpha=0.35 + 0.1 * column, edgecolor="white"))
    axes.add_patch(Rectangle((0, 4), 6, 1, facecolor="white", edgecolor=LINE, hatch="///"))
    note = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
    axes.text(3, 4.5, "tile without a valid token: nothing read", bbox=note, **centre)
    for y, text_y, start, end, text, colour in (
        (3.25, 3.62, 0.2, 5.8, "1  scores  s += u · h", BLUE),
        (1.75, 1.35, 5.8, 0.2, "2  pooling  c = p · h, from the caches", LIGHT.second),
    ):
        axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.6))
        axes.text(3, text_y, text, color=colour, weight="bold", **centre)
    axes.text(-0.15, 2.5, "BLOCK_L tokens\n= one program", ha="right", va="center")
    axes.text(3, -0.4, "D, BLOCK_D columns a step", **centre)
    axes.text(3, 5.4, "history of one user [L, D]", **centre)
    for y, text, alpha in ((0.5, "m, l, e, O, c", 0.5), (2.2, "m, l, e, O, c", 0.5), (4.2, "not written", 0.2)):
        axes.add_patch(Rectangle((7.2, y), 1.8, 0.6, facecolor=ORANGE, alpha=alpha, edgecolor="white"))
        axes.text(8.1, y + 0.3, text, **centre)
        if alpha == 0.5:
            axes.add_patch(FancyArrowPatch((9.05, y + 0.3), (9.7, 2.5), arrowstyle="-|>", mutation_scale=9, color=SOFT))
    axes.add_patch(FancyArrowPatch((6.1, 2.5), (7.1, 2.5), arrowstyle="-|>", mutation_scale=9, color=SOFT))
    axes.add_patch(Rectangle((9.7, 2.0), 2.1, 1.0, facecolor=ORANGE, edgecolor="white"))
    axes.text(10.75, 2.5, "combined in\nfixed order", **centre)
    axes.set(xlim=(-2.7, 12), ylim=(-0.8, 5.8))
    axes.set_title("factor_attention forward in Triton: one read from device memory")
    axes.axis("off")


#: Figure, its function, and the rows it shows. On several devices a GPU's rows are drawn, if it has any for the figure;
#: of speed-ups those of the device that has most.
FIGURES: dict[str, tuple[Callable[[list[Row]], Figure], Callable[[Row], bool]]] = {
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
        best = sorted(
            (-len(rows) if name == "speedup" else device.startswith("CPU"), device)
            for device, rows in of_device.items()
            if rows
        )
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
        with styled():
            save_svg(FIGURES[name][0](rows), path, f"data {mark}")
        changed.append(path)
    return changed
