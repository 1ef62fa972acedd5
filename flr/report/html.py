"""Self-contained HTML pages and the comparison plot. Plain values come in, so that whoever measured need not be here.

A page holds no script and loads nothing; text from data (titles hold HTML fragments in real catalogues) is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from flr.files import atomic_file

PathLike = str | os.PathLike[str]

#: Okabe and Ito's colours, told apart with any colour vision; black left out.
FACTOR_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999")
_HEAT = "230, 159, 0"  # one hue, laid over the page's ground: readable light and dark
_MAIN_METRICS = ("hr@10", "ndcg@10")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def escape(value: Any) -> str:
    """Text that shows as it is inside an element or a quoted attribute."""
    return html.escape(" ".join(str(value).split()), quote=True)


def page(title: str, body: str) -> str:
    """A complete document around ``body`` (HTML); ``title`` is text."""
    folder = files("flr.report") / "templates"
    style = (folder / "page.css").read_text(encoding="utf-8")
    skeleton = Template((folder / "page.html").read_text(encoding="utf-8"))
    return skeleton.substitute(title=escape(title), style=style, body=body)


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_png(figure: Figure, path: PathLike, dpi: int = 160) -> None:
    """Draw a figure into a PNG file, whole or not at all; no global state of matplotlib is touched."""
    FigureCanvasAgg(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """HTML table of cells that are HTML already; a cell may bring its own ``<td …>``."""
    above = f"<caption>{caption}</caption>" if caption else ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{above}<thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def heat_cell(value: float, largest: float, text: str) -> str:
    """Table cell shaded by value / largest."""
    alpha = 0.0 if largest <= 0 or not math.isfinite(value) else 0.9 * min(max(value / largest, 0.0), 1.0)
    strong = " strong" if alpha > 0.5 else ""
    return f'<td class="cell{strong}" style="background: rgba({_HEAT}, {alpha:.3f})">{text}</td>'


def share_bar(shares: Sequence[float]) -> str:
    """Stacked bar of shares that sum to 1, with the factors' names where they fit."""
    parts = []
    for factor, share in enumerate(shares):
        colour = FACTOR_COLOURS[factor % len(FACTOR_COLOURS)]
        label = f"F{factor + 1}" if share >= 0.12 else ""
        style = f"width: {100 * share:.2f}%; background: {colour}"
        parts.append(f'<span style="{style}" title="factor {factor + 1}: {share:.0%}">{label}</span>')
    return f'<div class="shares">{"".join(parts)}</div>'


def recommendation_table(recommendations: Sequence[Mapping[str, Any]], looked_at: Sequence[str] = ()) -> str:
    """Table of recommendations as ``Recommendation.to_dict`` gives them; ``looked_at``: HTML, one a recommendation."""
    shares = any(r.get("factor_shares") for r in recommendations)
    head = ["", '<span class="text">item</span>', "score"]
    head += ["factors' shares", "contributions"] if shares else []
    head += ["mostly looked at"] if looked_at else []
    rows = []
    for place, r in enumerate(recommendations):
        item = f'<td class="text">{escape(r["title"]) or "(no title)"}<br><span class="soft">{escape(r["item_id"])}</span></td>'
        row = [str(place + 1), item, f"{r['score']:.3f}"]
        if shares:
            signed = [f"F{k + 1}&nbsp;{c:+.3f}" for k, c in enumerate(r["contributions"])]
            row += [f"<td>{share_bar(r['factor_shares'])}</td>", f'<td class="text soft">{" ".join(signed)}</td>']
        rows.append(row + ([f'<td class="text">{looked_at[place]}</td>'] if looked_at else []))
    return table(head, rows)


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

    Two seeds or more: Student's t interval of the mean over seeds, which covers training noise, not the choice of test users.
    One seed: the row's own ``row["intervals"][metric] = (low, high)`` where it has one.

    >>> rows = [{"mode": "flr", "seed": s, "metrics": {"hr@10": v}} for s, v in enumerate((0.1, 0.2))]
    >>> s = summarise(rows, "hr@10")[0]
    >>> round(s.mean, 3), round(s.low, 3), round(s.high, 3)
    (0.15, -0.485, 0.785)
    """
    found = []
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
        found.append(ModeSummary(mode, mean, low, high, values))
    return found


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def _interval_note(rows: Sequence[Mapping[str, Any]]) -> str:
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
    """
    panels = {metric: summary for metric in metrics if (summary := summarise(rows, metric))}
    if not panels:
        raise ValueError(f"rows: expected metrics {', '.join(metrics)}, got {', '.join(_metrics(rows)) or 'none'}")
    modes = list(dict.fromkeys(s.mode for summary in panels.values() for s in summary))
    figure = Figure(figsize=(4.3 * len(panels) + 1.2, 0.46 * len(modes) + 1.25), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (metric, summary) in zip(axes, panels.items(), strict=True):
        for s in summary:
            y = modes.index(s.mode)
            if s.low is not None and s.high is not None:
                ax.plot([s.low, s.high], [y, y], color="#0072b2", linewidth=2.2, solid_capstyle="round", zorder=2)
            if len(s.values) > 1:
                ax.scatter(
                    s.values,
                    [y + 0.2] * len(s.values),
                    s=16,
                    color="#e69f00",
                    edgecolor="white",
                    linewidth=0.5,
                    zorder=3,
                )
            ax.scatter([s.mean], [y], s=52, color="#0072b2", edgecolor="white", linewidth=1, zorder=4)
            ax.annotate(
                f"{s.mean:.4f}", (s.mean, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=8.5
            )
        ax.set_title(metric.upper(), fontsize=11, loc="left", color="#222222", parse_math=False)
        ax.set_yticks(range(len(modes)), modes, fontsize=10, parse_math=False)
        ax.set_ylim(len(modes) - 0.45, -0.7)
        ax.grid(axis="x", color="#e3e6e9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, labelsize=9, colors="#444444", axis="x")
        ax.tick_params(length=0, colors="#222222", axis="y")
        ax.locator_params(axis="x", nbins=5)
        for side in ax.spines.values():
            side.set_visible(False)
    seeds = any(len(s.values) > 1 for summary in panels.values() for s in summary)
    note = _interval_note(rows) + (" Small orange dots: single seeds." if seeds else "")
    figure.supxlabel(note, fontsize=8.5, color="#59626c")
    save_png(figure, path)


def bar_svg(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Inline SVG: a bar a mode with its interval; text in the page's colour."""
    summary = summarise(rows, metric)
    top = max((s.high if s.high is not None else s.mean) for s in summary)
    top = max(top, *(s.mean for s in summary), 1e-12)
    left, width, step = 190, 430, 30
    height = step * len(summary) + 4
    parts = [f'<svg viewBox="0 0 {left + width + 80} {height}" width="{left + width + 80}" role="img">']
    parts.append(f"<title>{escape(metric)} by mode</title>")

    def x(value: float) -> float:
        return left + width * min(max(value / top, 0.0), 1.0)

    for place, s in enumerate(summary):
        y = place * step + 4
        parts.append(f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">{escape(_short(s.mode, 26))}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{y + 3}" width="{x(s.mean) - left:.1f}" height="20" rx="2"/>')
        end = s.mean
        if s.low is not None and s.high is not None:
            end = s.high
            line = f'y1="{y + 13}" y2="{y + 13}"'
            parts.append(f'<line class="whisker" x1="{x(s.low):.1f}" x2="{x(s.high):.1f}" {line}/>')
        parts.append(f'<text x="{x(end) + 8:.1f}" y="{y + 17}">{s.mean:.4f}</text>')
    return "".join([*parts, "</svg>"])


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def image(path: PathLike, caption: str = "") -> str:
    """A PNG file as a figure inside the page; ValueError where the file is no PNG."""
    content = Path(path).read_bytes()
    if not content.startswith(_PNG_MAGIC):
        raise ValueError(f"path: expected a PNG file, got {path}")
    code = base64.b64encode(content).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(caption) or "figure"}" src="data:image/png;base64,{code}">{below}</figure>'


def quickstart_report(results: Mapping[str, Any], path: PathLike) -> None:
    """Write the page that a quickstart ends with. A section whose key is absent is left out.

    Args:
        results: plain values,
            title: str
            text: str, a paragraph on what was run
            rows: ``[{"mode": str, "seed": int, "metrics": {"hr@10": float, …}, "seconds": float, "intervals": {…}}, …]``
                (seconds and intervals may be absent)
            differences: ``{mode: {metric: (mean, low, high)}}``, mode minus control (as ``flr compare`` gives them)
            control: str, the mode that differences are to; "anchor" when absent
            nmi: by mode, ``FactorInterest.to_dict()``: nmi, chance, chance_high, within_user, within_user_chance, confusion
            images: caption by path, or a list of paths, of PNG files to embed
            example: ``Explanation.to_dict()``
            next_steps: list of shell commands
            settings: values by name
        path: of the HTML file; written whole or not at all.

    Raises:
        ValueError: an unknown key, or an image that is no PNG.
    """
    known = ("title", "text", "rows", "differences", "control", "nmi", "images", "example", "next_steps", "settings")
    if unknown := set(results) - set(known):
        raise ValueError(f"results: expected keys among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    body = [f"<p>{escape(results['text'])}</p>"] if results.get("text") else []
    if results.get("rows"):
        body += _comparison(results["rows"])
    if results.get("differences"):
        body += _differences(results["differences"], results.get("control") or "anchor")
    if results.get("nmi"):
        body += _recovery(results["nmi"])
    images = results.get("images") or {}
    captions = images if isinstance(images, Mapping) else dict.fromkeys(images, "")
    body += [image(file, caption) for file, caption in captions.items()]
    if results.get("example"):
        body += ["<h2>One history, explained</h2>", explanation_body(results["example"])]
    if results.get("next_steps"):
        commands = "\n".join(html.escape(str(step)) for step in results["next_steps"])
        body += ["<h2>How to go on</h2>", f"<pre>{commands}</pre>"]
    if results.get("settings"):
        rows = [(escape(name), f'<td class="text">{escape(value)}</td>') for name, value in results["settings"].items()]
        body += ["<details><summary>Settings</summary>", table(["setting", "value"], rows), "</details>"]
    write_text(path, page(results.get("title") or "FLR quickstart", "\n".join(body)))


def _comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    metrics = _metrics(rows)
    main = [metric for metric in _MAIN_METRICS if metric in metrics] or metrics
    body = ["<h2>Modes compared</h2>", _mode_table(rows, main, _interval_note(rows))]
    if main:
        body.append(f"<figure>{bar_svg(rows, main[-1])}<figcaption>{escape(main[-1].upper())}</figcaption></figure>")
    if len(metrics) > len(main):
        body += ["<details><summary>All metrics</summary>", _mode_table(rows, metrics), "</details>"]
    return body


def _mode_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], caption: str = "") -> str:
    by_metric = {metric: {s.mode: s for s in summarise(rows, metric)} for metric in metrics}
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        line = [f'<td class="text">{escape(mode)}</td>', str(sum(row["mode"] == mode for row in rows))]
        for metric in metrics:
            s = by_metric[metric].get(mode)
            interval = (
                "" if s is None or s.low is None else f'<br><span class="soft">{s.low:.4f} to {s.high:.4f}</span>'
            )
            line.append("–" if s is None else f"{s.mean:.4f}{interval}")
        seconds = [row["seconds"] for row in rows if row["mode"] == mode and row.get("seconds") is not None]
        lines.append([*line, f"{np.mean(seconds):.0f}&nbsp;s" if seconds else "–"])
    return table(["mode", "seeds", *(escape(metric.upper()) for metric in metrics), "time"], lines, caption)


def _differences(differences: Mapping[str, Mapping[str, Sequence[float]]], control: str) -> list[str]:
    lines = [
        [
            f'<td class="text">{escape(mode)} minus {escape(control)}</td>',
            escape(metric.upper()),
            f"{mean:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        ]
        for mode, metrics in differences.items()
        for metric, (mean, low, high) in metrics.items()
    ]
    caption = "Differences on the same test users: 95 % paired bootstrap intervals."
    return [table(["", "metric", "difference", "95 % interval"], lines, caption)] if lines else []


def _recovery(modes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def number(values: Mapping[str, Any], key: str) -> str:
        return "–" if values.get(key) is None else f"{values[key]:.3f}"

    keys = ("nmi", "chance", "chance_high", "within_user", "within_user_chance")
    head = ["mode", "NMI", "by chance", "97.5 % of chance", "within users", "by chance"]
    lines = [[f'<td class="text">{escape(mode)}</td>', *(number(v, key) for key in keys)] for mode, v in modes.items()]
    body = [
        "<h2>Do the factors find the interests?</h2>",
        "<p>Every history item is given to the factor that spends the largest share of its attention on it. NMI is the normalised "
        "mutual information between that factor and the item's true interest: 1 if they agree, about the value by chance "
        "if they have nothing to do with each other.</p>",
        table(head, lines),
    ]
    for mode, values in modes.items():
        confusion = np.asarray(values.get("confusion") or np.zeros((0, 0)), float)
        if confusion.size == 0:
            continue
        share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        rows = [
            [f"factor {k + 1}", *(heat_cell(x, 1.0, f"{x:.0%}") for x in row), f"{confusion[k].sum():.0f}"]
            for k, row in enumerate(share)
        ]
        head = ["", *(f"interest {i + 1}" for i in range(confusion.shape[1])), "items"]
        body.append(table(head, rows, f"{escape(mode)}: interests of the items that each factor was given", "heat"))
    return body


def explanation_body(example: Mapping[str, Any], heading: str = "h3") -> str:
    """HTML of an explanation given as ``Explanation.to_dict()``; ``heading`` is the element of its sections' titles."""
    history, recommendations = example["history"], example["recommendations"]
    attention = np.asarray(example["attention"], float)  # [N, T, K, M]
    body = []
    if example.get("unknown"):
        body.append(f"<p class='note'>Not in the catalogue, left out: {escape(', '.join(example['unknown']))}</p>")
    looked_at = []
    if attention.size:
        for r in recommendations:
            weight = np.asarray(r["factor_shares"]) @ attention[-1, -1]
            best = [m for m in np.argsort(-weight, kind="stable")[:2] if weight[m] > 0]
            looked_at.append("<br>".join(f"{escape(_short(history[m]['title'], 48))} ({weight[m]:.0%})" for m in best))
    body.append(f"<{heading}>Recommended</{heading}>")
    body.append(recommendation_table(recommendations, looked_at))
    if not attention.size:
        body.append(f"<{heading}>History</{heading}>")
        body.append(
            table(
                ["", "item"],
                [[str(m + 1), f'<td class="text">{escape(h["title"])}</td>'] for m, h in enumerate(history)],
            )
        )
        if example.get("num_factors", 0) == 0:
            body.append(f"<p class='note'>The variant {escape(example.get('variant'))} has no factors to show.</p>")
        return "\n".join(body)
    body.append(
        "<p class='note'>Score: log-probability. Contributions: how much each factor raised or lowered it (Shapley values, nats); "
        "shares: their magnitudes, as parts of 1. Mostly looked at: attention of the factors weighted by their shares; it says "
        "where the factors looked, not what would be recommended without that item.</p>"
    )
    body.append(f"<{heading}>What each factor looks at</{heading}>")
    steps = [(n, t) for n in range(attention.shape[0]) for t in range(attention.shape[1])]
    *earlier, last = steps
    body.append(_attention_table(example, attention, *last))
    if earlier:
        tables = "".join(_attention_table(example, attention, n, t) for n, t in earlier)
        body.append(f"<details><summary>Earlier refinements</summary>{tables}</details>")
    return "\n".join(body)


def _attention_table(example: Mapping[str, Any], attention: np.ndarray, thought: int, refinement: int) -> str:
    alpha = attention[thought, refinement]  # [K, M]
    gates = example["gates"][thought][refinement]
    largest = float(alpha.max(initial=0.0))
    head = ["", '<span class="text">history, oldest first</span>', *(f"F{k + 1}" for k in range(len(alpha)))]
    rows = [["", '<td class="text soft">gate</td>', *(f'<td class="cell soft">{g:.0%}</td>' for g in gates)]]
    if refinement == attention.shape[1] - 1:
        lengths = [f'<td class="cell soft">{x:.2g}</td>' for x in example["norms"][thought]]
        rows.append(
            ["", '<td class="text soft">length of its part of the thought (1: an input embedding)</td>', *lengths]
        )
    for m, h in enumerate(example["history"]):
        name = escape(h["title"]) or escape(h["item_id"])
        name += "" if h["used"] else ' <span class="soft">(too far back, not seen)</span>'
        cells = [heat_cell(x, largest, f"{x:.0%}") for x in alpha[:, m]]
        rows.append([str(m + 1), f'<td class="text">{name}</td>', *cells])
    which = f"Thought {thought + 1} of {len(attention)}, refinement {refinement + 1} of {attention.shape[1]}. "
    which += "Each column sums to 100 %." if thought == 0 else "What a column lacks to 100 % went to earlier thoughts."
    return table(head, rows, which, "heat")
