"""Tables and figures from the committed results: nothing in them is typed by hand.

A table goes between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` of a document; NAME is one of :func:`tables`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from . import results, scaling
from .harness import label
from .machine import ROOT

MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.S)
Row = dict[str, Any]
#: Variants that are ours in another form, or a part of the work that stands beside it.
NO_COMPETITORS = (
    "flr, W rows",
    "thoughts",
    "prompts kept",
    "masked",
    "calls",
    "triton",
    "catalogue scoring",
    "full scoring",
    "host",
    "reference",
    "log_softmax alone",
    "blocks",
    "layers compiled",
    "tokens, layers compiled",
    "thoughts, layers compiled",
)


def documents(root: Path = ROOT) -> list[Path]:
    """The documents with tables of results in them."""
    return [p for p in [root / "README.md", *sorted((root / "docs").glob("*.md"))] if MARKED.search(p.read_text())]


def number(value: float) -> str:
    """Three significant digits, without exponents.

    >>> number(0.012345), number(3.14159), number(1234.5), number(27100)
    ('0.0123', '3.14', '1,230', '27,100')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table; nothing where there are no lines."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) if lines else ""


def ratio(row: Row) -> str:
    return f"{number(row['ratio']['p50'])}×" if "ratio" in row else ""


def between(row: Row) -> str:
    return f"{number(row['ratio']['p20'])}-{number(row['ratio']['p80'])}" if "ratio" in row else ""


def _ours(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(r["suite"], r["case"]): r for r in rows if "p50_ms" in r and "ratio" not in r}


def span(values: list[float], form: Any) -> str:
    """The least and the greatest, once where they read the same."""
    return "-".join(dict.fromkeys(form(x) for x in (min(values), max(values)))) if values else ""


def speed(rows: list[Row]) -> str:
    """A line for each kind of work (suite, first word of the case), competitor and target.

    It shows the one case, or the span over its cases.
    """
    ours, groups = _ours(rows), {}
    for row in rows:
        if "target" in row:
            key = (row["suite"], row["case"].split()[0], row["variant"], row["target"])
            groups.setdefault(key, []).append(row)
    lines = []
    for (name, _, variant, target), group in groups.items():
        done = [row for row in group if "ratio" in row]
        memory = []
        for row in done:
            mine = ours[row["suite"], row["case"]].get("peak_mb")
            if mine and "peak_mb" in row:
                memory.append(row["peak_mb"] / mine)
        met = sum(row["ratio"]["p50"] >= target for row in done)
        faster = span([row["ratio"]["p50"] for row in done], number)
        alone = len(group) == 1
        shared = [word for word in group[0]["case"].split() if all(word in row["case"].split() for row in group)]
        lines.append(
            [
                f"{name} {' '.join(shared)}{'' if alone else f', {len(group)} cases'}".replace("_", " "),
                variant,
                f"**{faster}×**" if done else "failed",
                between(done[0]) if alone and done else "",
                f"{span(memory, number)}×" if memory else "",
                f"{target:g}×: " + (f"met in {met} of {len(group)}" if not alone else "met" if met else "**missed**"),
            ]
        )
    return markdown(["work", "against", "times faster", "20-80 %", "peak memory, theirs / ours", "target"], lines)


def _races(rows: list[Row]) -> dict[str, list[Row]]:
    """By suite, the rows of competitors that ran, with or without a target, ours worst first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "ratio" in row and row["variant"] not in NO_COMPETITORS and row["suite"] != "scaling":
            found.setdefault(row["suite"], []).append(row)
    return {name: sorted(found[name], key=lambda row: row["ratio"]["p50"]) for name in sorted(found)}


def summary(devices: dict[str, list[Row]]) -> str:
    """A line for each suite and device: targets met, and the greatest and the lowest of all ratios to competitors."""
    lines = []
    for device, rows in sorted(devices.items()):
        for name, races in _races(rows).items():
            wanted = [row for row in rows if row["suite"] == name and "target" in row]
            met = sum("ratio" in row and row["ratio"]["p50"] >= row["target"] for row in wanted)
            ends = [f"{ratio(row)} {row['variant']}, {row['case'].split()[0]}" for row in (races[-1], races[0])]
            share = f"{met} of {len(wanted)}" if wanted else "none set"
            machine = device.removeprefix("CPU ").replace("(R)", "").removesuffix(" Processor")
            lines.append([name.replace("_", " "), machine, share, *ends])
    lines.sort(key=lambda line: line[0])
    return markdown(["suite", "machine", "targets met", "times faster, best", "worst"], lines)


def worst(rows: list[Row]) -> str:
    """A line for each suite: the work and the competitor to which ours stands worst, with or without a target."""
    ours = _ours(rows)
    lines = [
        [
            name.replace("_", " "),
            row["case"],
            row["variant"],
            f"**{ratio(row)}**",
            between(row),
            number(ours[name, row["case"]]["p50_ms"]),
        ]
        for name, (row, *_) in _races(rows).items()
    ]
    return markdown(["suite", "work", "against", "times faster", "20-80 %", "ours, ms"], lines)


def targets(rows: list[Row]) -> str:
    """Every row that has a target: how many times faster, how much memory, and whether the target is met."""
    ours, lines = _ours(rows), []
    for row in rows:
        if "target" not in row:
            continue
        mine = ours[row["suite"], row["case"]]
        if "failed" in row:
            lines.append([row["suite"].replace("_", " "), row["case"], row["variant"], row["failed"], "", "", ""])
            continue
        memory = ""
        if "peak_mb" in row and mine.get("peak_mb"):
            memory = f"{number(mine['peak_mb'])} / {number(row['peak_mb'])}"
        met = "met" if row["ratio"]["p50"] >= row["target"] else "**missed**"
        lines.append(
            [
                row["suite"].replace("_", " "),
                row["case"],
                row["variant"],
                f"**{ratio(row)}**",
                between(row),
                memory,
                f"{row['target']:g}×, {met}",
            ]
        )
    return markdown(["", "work", "against", "faster", "20-80 %", "peak MB, ours / theirs", "target"], lines)


def suite(rows: list[Row], name: str) -> str:
    """All rows of a suite."""
    lines = []
    for row in (r for r in rows if r["suite"] == name):
        if "failed" in row:
            lines.append([row["case"], row["variant"], f"failed: {row['failed']}", *[""] * 6])
            continue
        lines.append(
            [
                row["case"],
                row["variant"],
                number(row["p50_ms"]),
                f"{number(row['p20_ms'])}-{number(row['p80_ms'])}",
                number(row["gb_per_s"]) if "gb_per_s" in row else "",
                number(row["tflop_per_s"]) if "tflop_per_s" in row else "",
                f"{row['of_ceiling']:.1%}" if "of_ceiling" in row else "",
                number(row["peak_mb"]) if "peak_mb" in row else "",
                f"{ratio(row)} ({between(row)})" if "ratio" in row else "",
            ]
        )
    header = ["case", "variant", "p50 ms", "p20-p80", "GB/s", "TFLOP/s", "of ceiling", "peak MB"]
    return markdown([*header, "competitor / ours (p20-p80)"], lines)


def brief(rows: list[Row], name: str) -> str:
    """A line for each case of a suite: what ours takes and holds, and what everything beside it does.

    Our own other forms stand among the others; below 1 they are faster.
    """
    own, lines = [row for row in rows if row["suite"] == name], []
    for (_, case), ours in _ours(own).items():
        others = [row for row in own if row["case"] == case and "ratio" in row]
        held = {row["variant"]: f", {number(row['peak_mb'])} MB" for row in (ours, *others) if "peak_mb" in row}
        beside = [f"{x['variant']} **{ratio(x)}** ({between(x)}){held.get(x['variant'], '')}" for x in others]
        lines.append([case, f"{number(ours['p50_ms'])} ms{held.get(ours['variant'], '')}", "; ".join(beside)])
    return markdown(["case", "ours", "others: times as long (p20-p80), peak memory"], lines)


def machine(rows: list[Row]) -> str:
    """Device, versions, commits, threads and ceilings of the rows shown."""
    runs = {(r["run"]["commit"], r["run"]["date"]): r["run"] for r in rows}
    lines = []
    for run in sorted(runs.values(), key=lambda run: run["date"]):
        ceilings = run["ceilings"]
        matmul = ", ".join(f"{k} {number(v)}" for k, v in ceilings.get("matmul_tflop_per_s", {}).items())
        names = sorted({r["suite"] for r in rows if r["run"] == run})
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        lines.append(
            [
                run["commit"],
                run["date"][:10],
                str(run["threads"]),
                versions,
                number(ceilings["copy_gb_per_s"]),
                matmul,
                ", ".join(names),
            ]
        )
    header = ["commit", "date", "threads", "versions", "copy GB/s", "matmul TFLOP/s", "suites"]
    return markdown(header, lines)


def growth(rows: list[Row]) -> str:
    """Fitted exponents, and the largest size for each memory by the fit."""
    lines = []
    for sweep in scaling.sweeps(rows):
        time, memory = sweep.time_law(), sweep.memory_law()
        if time is None:
            continue
        buffers = sweep.buffers()
        law = [f"{x.exponent:.2f} (±{x.residual - 1:.0%})" if x else "" for x in (time, memory)]
        reach = [buffers.largest(size * 1e3, sweep.sizes[-1]) if buffers else None for size in scaling.MEMORIES]
        trusted = f"{buffers.trusted:.2f}" if buffers and buffers.trusted else ""
        largest = f"{number(sweep.ms[-1])} ms" + (f", {number(sweep.peak_mb[-1])} MB" if sweep.peak_mb[-1] else "")
        sizes = f"{sweep.sizes[0]:,.0f} … {sweep.sizes[-1]:,.0f}"
        fits = [f"{number(x)}" if x else "" for x in reach]
        name = ", ".join(filter(None, (sweep.operation, label(sweep.fixed))))
        lines.append([name, sweep.varied, sizes, largest, *law, *fits, trusted])
    header = ["operation", "varied", "sizes", "at the largest", "time ∝", "memory ∝"]
    return markdown([*header, *(f"fits {size} GB" for size in scaling.MEMORIES), "measured / extrapolated"], lines)


def tables(devices: dict[str, list[Row]]) -> dict[str, str]:
    """Every table by name; where several devices were measured each has its own part."""

    def per_device(make: Any) -> str:
        parts = []
        for device, rows in sorted(devices.items()):
            if table := make(rows):
                threads = "/".join(str(t) for t in sorted({row["run"]["threads"] for row in rows}))
                parts.append(f"{device}{f', {threads} thread(s)' if device.startswith('CPU') else ''}:\n\n{table}")
        return "\n\n".join(parts)

    names = sorted({row["suite"] for rows in devices.values() for row in rows})
    found = {
        "summary": summary(devices),
        "speed": per_device(speed),
        "worst": per_device(worst),
        "targets": per_device(targets),
        "machine": per_device(machine),
        "scaling": per_device(growth),
        **{name: per_device(lambda rows, name=name: suite(rows, name)) for name in names if name != "scaling"},
        **{f"{name}-brief": per_device(lambda rows, name=name: brief(rows, name)) for name in names},
    }
    found["all"] = "\n\n".join(f"#### {name.replace('_', ' ')}\n\n{found[name]}" for name in names if name != "scaling")
    return found


def render(text: str, by_name: dict[str, str], where: str) -> str:
    """``text`` with what stands between its markers replaced.

    Raises:
        ValueError: a marker names no table.
    """

    def replace(match: re.Match[str]) -> str:
        if match[2] not in by_name:
            raise ValueError(f"{where}: expected bench:NAME with NAME one of {', '.join(by_name)}, got {match[2]}")
        return f"{match[1]}\n{by_name[match[2]]}\n\n{match[3]}"

    return MARKED.sub(replace, text)


def report(folder: Path = results.RESULTS, root: Path = ROOT, figures: bool = True) -> list[Path]:
    """Render every document and figure and remove the results that newer ones supersede; returns what changed.

    Raises:
        ValueError: no results, or a marker that names no table.
    """
    devices = results.newest(folder)
    if not devices:
        raise ValueError(f"results: expected <device>/<commit>.json of a default or full run below {folder}, got none")
    by_name, changed = tables(devices), []
    old = {path: path.read_text() for path in documents(root)}
    new = {path: render(text, by_name, path.name) for path, text in old.items()}  # all of them, before one is written
    for path, text in new.items():
        if text != old[path]:
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text(text)
            temporary.replace(path)
            changed.append(path)
    if figures:
        from .figures import draw

        changed += draw(devices, root / "docs/figures")
    for path in results.superseded(folder):  # nothing above has read a row of them; git keeps them
        path.unlink()
        changed.append(path)
    return changed
