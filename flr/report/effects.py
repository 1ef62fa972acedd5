"""What the factors did to scores, as figures that a page, a table and a plot show alike. Plain values come in.

A contribution of c nats makes an item exp(c) times as likely. The axis is in nats and never shorter than half a nat to
either side, so that a small effect looks small; contributions are stacked on it, those that raised the score to the
right of zero and those that lowered it to the left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

#: Summed magnitudes of an item's contributions, in nats, below which they barely matter: 5 % of its probability.
BARELY = 0.05
_SHORTEST = 0.5  # nats of either side of the axis
_TICKS = 4  # about so many parts


class Bar(NamedTuple):
    """A factor's part of a stack: where it lies on the axis, both as shares of the axis' length."""

    left: float
    width: float


class ItemEffect(TypedDict):
    """What the factors did to one item: K bars; texts like "×1.3 as likely"."""

    bars: list[Bar]
    times: list[str]
    total: float
    total_times: str
    base_score: float
    score: float


class Effects(TypedDict):
    """The figures of a list of recommendations.

    Attributes:
        ticks: of the axis, in nats, from its left to its right end.
        zero: where 0 lies, as a share of the axis' length.
        items: one a recommendation.
        notice: a sentence where the factors barely matter, else "".
    """

    ticks: list[float]
    zero: float
    items: list[ItemEffect]
    notice: str


def times(nats: float) -> str:
    """What a difference of log-probabilities means, in words.

    >>> times(0.26), times(0.007), times(-1.2), times(4.0), times(0.0), times(-7.0)
    ('×1.3 as likely', '×1.01 as likely', '×0.30 as likely', '×55 as likely', 'just as likely', '×0.0009 as likely')
    """
    factor = math.exp(min(nats, 700.0))
    digits = 0 if factor >= 10 else 1 if factor >= 1.1 else 2
    text = f"{factor:.{digits}f}" if factor >= 0.1 else f"{factor:.1g}"
    return "just as likely" if text == "1.00" else f"×{text} as likely"


def effects(recommendations: Sequence[Mapping[str, Any]]) -> Effects | None:
    """The figures of recommendations as ``Recommendation.to_dict`` gives them; None where the model has no factors.

    >>> item = {"score": -2.0, "base_score": -2.5, "contributions": [0.7, -0.2]}
    >>> figures = effects([item])
    >>> figures["ticks"], round(figures["zero"], 2), figures["items"][0]["total_times"], figures["notice"]
    ([-0.5, 0.0, 0.5, 1.0], 0.33, '×1.6 as likely', '')
    >>> effects([{**item, "contributions": [0.01, -0.02]}])["notice"]
    "The factors barely matter here: together they change no shown item's probability by more than 3.0 %."
    """
    rows = [r for r in recommendations if r.get("contributions")]
    if not rows:
        return None
    down, up = (max(sum(max(sign * c, 0.0) for c in r["contributions"]) for r in rows) for sign in (-1, 1))
    ticks = _ticks(max(down, _SHORTEST), max(up, _SHORTEST))
    length = ticks[-1] - ticks[0]
    items: list[ItemEffect] = []
    for r in rows:
        total = math.fsum(r["contributions"])
        items.append(
            {
                "bars": _stack(r["contributions"], -ticks[0] / length, length),
                "times": [times(c) for c in r["contributions"]],
                "total": total,
                "total_times": times(total),
                "base_score": r["base_score"],
                "score": r["score"],
            }
        )
    most = max(math.fsum(map(abs, r["contributions"])) for r in rows)
    notice = ""
    if most < BARELY:
        notice = "The factors barely matter here: together they change no shown item's probability by more than "
        notice += f"{100 * math.expm1(most):.1f} %."
    return {"ticks": ticks, "zero": -ticks[0] / length, "items": items, "notice": notice}


def _ticks(down: float, up: float) -> list[float]:
    """Round numbers from at most -down to at least up, 0 among them."""
    rough = (down + up) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * (1 - 1e-9))
    first, last = (math.ceil(side / step - 1e-9) for side in (down, up))
    return [round(step * place, 10) + 0.0 for place in range(-first, last + 1)]


def _stack(contributions: Sequence[float], zero: float, length: float) -> list[Bar]:
    """A bar for each contribution, the largest next to zero."""
    bars, low, high = [Bar(zero, 0.0)] * len(contributions), zero, zero
    for factor, c in sorted(enumerate(contributions), key=lambda pair: -abs(pair[1])):
        width = abs(c) / length
        if c < 0:
            low -= width
        bars[factor] = Bar(low if c < 0 else high, width)
        if c > 0:
            high += width
    return bars
