"""The page that a quickstart ends with."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .explanation import explanation_body
from .html import PathLike, escape, heat_cell, image, page, table, text_cell, write_text
from .plots import bar_svg, interval_note, metric_names, summarise

_MAIN_METRICS = ("hr@10", "ndcg@10")


def quickstart_report(results: Mapping[str, Any], path: PathLike) -> None:
    """Write the page that a quickstart ends with. A section whose key is absent is left out.

    Args:
        results: plain values,
            title: str
            text: str, a paragraph on what was run
            rows: as for :func:`~flr.report.plots.plot_compare`, with ``"seconds": float`` or without
            differences: ``{mode: {metric: (mean, low, high)}}``, mode minus control (as ``flr compare`` gives them)
            control: str, the mode that differences are to; "anchor" when absent
            nmi: ``FactorInterest.to_dict()`` by mode
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
        rows = [(escape(name), text_cell(value)) for name, value in results["settings"].items()]
        body += ["<details><summary>Settings</summary>", table(["setting", "value"], rows), "</details>"]
    write_text(path, page(results.get("title") or "FLR quickstart", "\n".join(body)))


def _comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    metrics = metric_names(rows)
    main = [metric for metric in _MAIN_METRICS if metric in metrics] or metrics
    body = ["<h2>Modes compared</h2>", _mode_table(rows, main, interval_note(rows))]
    if main:
        body.append(f"<figure>{bar_svg(rows, main[-1])}<figcaption>{escape(main[-1].upper())}</figcaption></figure>")
    if len(metrics) > len(main):
        body += ["<details><summary>All metrics</summary>", _mode_table(rows, metrics), "</details>"]
    return body


def _mode_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], caption: str = "") -> str:
    by_metric = {metric: {s.mode: s for s in summarise(rows, metric)} for metric in metrics}
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        line = [text_cell(mode), str(sum(row["mode"] == mode for row in rows))]
        for metric in metrics:
            s = by_metric[metric].get(mode)
            line.append("–" if s is None else f"{s.mean:.4f}")
            if s is not None and s.low is not None:
                line[-1] += f'<br><span class="soft">{s.low:.4f} to {s.high:.4f}</span>'
        seconds = [row["seconds"] for row in rows if row["mode"] == mode and row.get("seconds") is not None]
        lines.append([*line, f"{np.mean(seconds):.0f}&nbsp;s" if seconds else "–"])
    return table(["mode", "seeds", *(escape(metric.upper()) for metric in metrics), "time"], lines, caption)


def _differences(differences: Mapping[str, Mapping[str, Sequence[float]]], control: str) -> list[str]:
    lines = [
        [text_cell(f"{mode} minus {control}"), escape(metric.upper()), f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"]
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
    lines = [[text_cell(mode), *(number(values, key) for key in keys)] for mode, values in modes.items()]
    body = [
        "<h2>Do the factors find the interests?</h2>",
        "<p>Every history item is given to the factor that spends the largest share of its attention on it. NMI is the "
        "normalised mutual information between that factor and the item's true interest: 1 if they agree, about the "
        "value by chance if they have nothing to do with each other.</p>",
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
