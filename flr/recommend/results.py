"""What a recommender answers."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flr.report.explanation import explanation_body
from flr.report.heatmap import _COLUMNS, _draw
from flr.report.html import PathLike, page, write_text
from flr.report.plots import save_png


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id, title, index: which item; index 0..C-1 in the catalogue.
        score: log-probability of the item given the history, under the scoring asked for; where the processor has ``views``, of their
            mixture.
        factor_shares: K numbers >= 0 that sum to 1, each factor's share of the influence that the factors had on this score:
            |contribution| over the sum of them; 1/K each where no factor moves the score by more than rounding. Empty
            for variants without factors and where shares were not asked for.
        contributions: K signed numbers, by how much each factor raised (or lowered) the score, in nats: Shapley values of
            the thought's K parts (see flr.attribution). With views, of the thought behind the whole history; the views of single
            items are taken as they are. Empty where factor_shares is.
        base_score: the score with the factors' parts left out of the thought. base_score + sum(contributions) = score.
            None where contributions is empty.
    """

    item_id: str
    title: str
    score: float
    index: int
    factor_shares: list[float]
    contributions: list[float]
    base_score: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class HistoryItem:
    """An entry of the history; ``used`` is False where it lies too far back for the prompt."""

    item_id: str
    title: str
    index: int
    used: bool


@dataclass
class Explanation:
    """What the factors did for one history of M items. N thoughts, T refinements, K factors.

    Attributes:
        variant: of the model: "flr", "latentr3", "anchor", "none".
        history: M items, oldest first.
        unknown: entries that were skipped.
        attention: float64 [N, T, K, M], a factor's attention summed over each item's tokens; >= 0, at most 1 in sum over M
            (exactly 1 when the factors may attend to history items only and there is one thought). K = 0 for variants without
            factors; M columns that were not used are 0.
        gates: float64 [N, T, K], sums to 1 over K.
        norms: float64 [N, K], length of each factor's part g_k f_k of the thought, in units of an input embedding's typical length.
        recommendations: best first, with shares and contributions.
    """

    variant: str
    history: list[HistoryItem]
    unknown: list[str]
    attention: np.ndarray
    gates: np.ndarray
    norms: np.ndarray
    recommendations: list[Recommendation]

    @property
    def num_factors(self) -> int:
        """K."""
        return self.attention.shape[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for reports."""
        return {
            "variant": self.variant,
            "num_factors": self.num_factors,
            "history": [asdict(item) for item in self.history],
            "unknown": list(self.unknown),
            "attention": self.attention.tolist(),
            "gates": self.gates.tolist(),
            "norms": self.norms.tolist(),
            "recommendations": [r.to_dict() for r in self.recommendations],
        }

    def html(self, path: PathLike) -> None:
        """Write a self-contained page: recommendations with shares, attention tables. Whole or not at all."""
        write_text(path, page("Why these recommendations", explanation_body(self.to_dict(), "h2")))

    def heatmap(self, path: PathLike, *, refinement: int = -1, thought: int = -1) -> None:
        """Write a PNG: K rows, a column for each history item (the latest 30), gate weights at the side. Whole or not at all.

        Args:
            refinement, thought: which one, counted from 0, or from the end where negative.

        Raises:
            ValueError: no factors, an empty history, or no such refinement or thought.
        """
        if self.num_factors == 0:
            raise ValueError(f"heatmap: expected a model with factors, got variant {self.variant!r}")
        if not self.history:
            raise ValueError("heatmap: expected a history with at least one item, got none")
        for name, value, size in (
            ("thought", thought, self.attention.shape[0]),
            ("refinement", refinement, self.attention.shape[1]),
        ):
            if not -size <= value < size:
                raise ValueError(f"{name}: expected {-size} to {size - 1}, got {value}")
        figure = _draw(
            self.attention[thought, refinement][:, -_COLUMNS:],
            self.gates[thought, refinement],
            [item.title or item.item_id for item in self.history][-_COLUMNS:],
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
            save_png(figure, path)
