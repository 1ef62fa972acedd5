"""An explanation as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .html import FACTOR_COLOURS, escape, heat_cell, short, table, text_cell


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
        item = f'{escape(r["title"]) or "(no title)"}<br><span class="soft">{escape(r["item_id"])}</span>'
        row = [str(place + 1), f'<td class="text">{item}</td>', f"{r['score']:.3f}"]
        if shares:
            signed = [f"F{k + 1}&nbsp;{c:+.3f}" for k, c in enumerate(r["contributions"])]
            row += [f"<td>{share_bar(r['factor_shares'])}</td>", f'<td class="text soft">{" ".join(signed)}</td>']
        rows.append(row + ([f'<td class="text">{looked_at[place]}</td>'] if looked_at else []))
    return table(head, rows)


def explanation_body(example: Mapping[str, Any], heading: str = "h3") -> str:
    """HTML of an explanation given as ``Explanation.to_dict()``; ``heading`` is the element of its sections' titles."""
    history, recommendations = example["history"], example["recommendations"]
    attention = np.asarray(example["attention"], float)  # [N, T, K, M]
    body = []
    if example.get("unknown"):
        body.append(f"<p class='note'>Not in the catalogue, left out: {escape(', '.join(example['unknown']))}</p>")
    looked_at = []
    if attention.size and example.get("variant") != "offsets":
        for r in recommendations:
            weight = np.asarray(r["factor_shares"]) @ attention[-1, -1]
            best = [m for m in np.argsort(-weight, kind="stable")[:2] if weight[m] > 0]
            looked_at.append("<br>".join(f"{escape(short(history[m]['title'], 48))} ({weight[m]:.0%})" for m in best))
    body.append(f"<{heading}>Recommended</{heading}>")
    body.append(recommendation_table(recommendations, looked_at))
    if not attention.size:
        body.append(f"<{heading}>History</{heading}>")
        body.append(table(["", "item"], [[str(m + 1), text_cell(h["title"])] for m, h in enumerate(history)]))
        if example.get("num_factors", 0) == 0:
            body.append(f"<p class='note'>The variant {escape(example.get('variant'))} has no factors to show.</p>")
        return "\n".join(body)
    shares = "their magnitudes, as parts of 1"
    if example.get("aggregation") == "mixture":
        shares = "the part of the item's probability that each factor's own thought gives it"
    body.append(
        "<p class='note'>Score: log-probability. Contributions: how much each factor raised or lowered it (Shapley "
        f"values, nats); shares: {shares}. Mostly looked at: attention of the factors weighted "
        "by their shares; it says where the factors looked, not what would be recommended without that item.</p>"
    )
    if example.get("variant") == "offsets":
        body.append("<p class='note'>Offsets attend to nothing; they are the same for every history.</p>")
        return "\n".join(body)
    body.append(f"<{heading}>What each factor looks at</{heading}>")
    *earlier, last = (_attention_table(example, attention, n, t) for n, t in np.ndindex(attention.shape[:2]))
    body.append(last)
    if earlier:
        body.append(f"<details><summary>Earlier refinements</summary>{''.join(earlier)}</details>")
    return "\n".join(body)


def _attention_table(example: Mapping[str, Any], attention: np.ndarray, thought: int, refinement: int) -> str:
    def soft_row(name: str, cells: Iterable[str]) -> list[str]:
        return ["", f'<td class="text soft">{name}</td>', *(f'<td class="cell soft">{cell}</td>' for cell in cells)]

    alpha = attention[thought, refinement]  # [K, M]
    largest = float(alpha.max(initial=0.0))
    head = ["", '<span class="text">history, oldest first</span>', *(f"F{k + 1}" for k in range(len(alpha)))]
    rows = [soft_row("gate", (f"{gate:.0%}" for gate in example["gates"][thought][refinement]))]
    if refinement == attention.shape[1] - 1:
        name = "length of its part of the thought (1: an input embedding)"
        rows.append(soft_row(name, (f"{length:.2g}" for length in example["norms"][thought])))
    for m, h in enumerate(example["history"]):
        name = escape(h["title"]) or escape(h["item_id"])
        name += "" if h["used"] else ' <span class="soft">(too far back, not seen)</span>'
        cells = [heat_cell(x, largest, f"{x:.0%}") for x in alpha[:, m]]
        rows.append([str(m + 1), f'<td class="text">{name}</td>', *cells])
    which = f"Thought {thought + 1} of {len(attention)}, refinement {refinement + 1} of {attention.shape[1]}. "
    which += "Each column sums to 100 %." if thought == 0 else "What a column lacks to 100 % went to earlier thoughts."
    return table(head, rows, which, "heat")
