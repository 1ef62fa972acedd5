"""An explanation as HTML: what a template shows of ``Explanation.to_dict()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .effects import effects
from .html import PathLike, write_page


def write_explanation(example: Mapping[str, Any], path: PathLike) -> None:
    """Write a page about an explanation given as ``Explanation.to_dict()``, whole or not at all."""
    write_page(path, "explanation_page.html", title="Why these recommendations", example=shown(example))


def shown(example: Mapping[str, Any]) -> dict[str, Any]:
    """What ``explanation.html`` shows: the example, the factors' effects, where they looked, and heat maps."""
    attention = np.asarray(example["attention"], float)  # [N, T, K, M]
    looks = attention.size and example.get("variant") != "offsets"
    maps = [_heat_map(example, attention, n, t) for n, t in np.ndindex(attention.shape[:2])] if looks else []
    looked_at = [_looked_at(r, example["history"], attention) if looks else [] for r in example["recommendations"]]
    figures = effects(example["recommendations"])
    return {**example, "effects": figures, "looked_at": looked_at, "maps": maps[-1:], "earlier_maps": maps[:-1]}


def _looked_at(recommendation: Mapping[str, Any], history: Any, attention: np.ndarray) -> list[dict[str, Any]]:
    """The two items of the history that the factors looked at most, weighted by their shares of this score."""
    weight = np.asarray(recommendation["factor_shares"]) @ attention[-1, -1]
    best = [m for m in np.argsort(-weight, kind="stable")[:2] if weight[m] > 0]
    return [{**history[m], "weight": float(weight[m])} for m in best]


def _heat_map(example: Mapping[str, Any], attention: np.ndarray, thought: int, refinement: int) -> dict[str, Any]:
    alpha = attention[thought, refinement]  # [K, M]
    which = f"Thought {thought + 1} of {len(attention)}, refinement {refinement + 1} of {attention.shape[1]}. "
    which += "Each column sums to 100 %." if thought == 0 else "What a column lacks to 100 % went to earlier thoughts."
    last = refinement == attention.shape[1] - 1
    return {
        "caption": which,
        "largest": float(alpha.max(initial=0.0)),
        "gates": example["gates"][thought][refinement],
        "norms": example["norms"][thought] if last else None,
        "rows": alpha.T.tolist(),
    }
