"""What a recommender answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from flr.data.frames import to_frame
from flr.report.drawing import save_png, styled
from flr.report.effects import Effects, effects
from flr.report.explanation import write_explanation
from flr.report.heatmap import COLUMNS, draw
from flr.report.html import PathLike


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id, title, index: which item; index 0..C-1 in the catalogue.
        score: log-probability given the history, under the scoring asked for; with ``views``, of their mixture.
        factor_shares: K numbers >= 0 that sum to 1, each factor's part of the influence on this score: |contribution|
            over their sum; 1/K each where no factor moves the score by more than rounding. Under aggregation "mixture"
            each factor's posterior responsibility for the item, g_k p_k(item) / p(item), with ``views`` for the whole
            history's part. Empty for variants without factors and where shares were not asked for.
        contributions: K signed numbers, by how much each factor raised the score, in nats: Shapley values of the
            thought's K parts, or of the K thoughts of a mixture (see :mod:`flr.explain.attribution`). With views, of
            the thought behind the whole history; the views of single items are taken as they are. Empty where
            factor_shares is.
        base_score: the score without the factors' parts, score - sum(contributions). None where contributions is empty.
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
        # dataclasses.asdict takes thirty times as long, which a server would pay for every item
        copies = {"factor_shares": [*self.factor_shares], "contributions": [*self.contributions]}
        return {**vars(self), **copies}


class Recommendations(list["list[Recommendation]"]):
    """A list of recommendations for each history, best first, that becomes a table on request.

    Attributes:
        users: arrow array [len], whose histories they were, or None where that is not known.
        column: what the table calls the users.

    Example:
        >>> found = Recommendations([[Recommendation("x", "Blue", -0.5, 0, [], [], None)]])
        >>> found.to_frame("pyarrow").to_pylist()
        [{'row': 0, 'rank': 1, 'item_id': 'x', 'title': 'Blue', 'score': -0.5}]
    """

    def __init__(
        self, lists: Iterable[list[Recommendation]] = (), users: pa.Array | None = None, column: str = "row"
    ) -> None:
        super().__init__(lists)
        self.users = users
        self.column = column

    def to_frame(self, kind: str | None = None, *, like: Any = None) -> Any:
        """A table with a row for each recommended item.

        Args:
            kind: "pandas", "polars", "pyarrow" or "datasets".
            like: a frame of the kind that is wanted, instead of ``kind``.

        Returns:
            Columns: the user as the log calls and types it (without users "row", int64, the history's place), rank
            (int32, from 1), item_id and title (text), score (float64).

        Raises:
            ValueError: an unknown kind, or not exactly one of ``kind`` and ``like``.
            ModuleNotFoundError: the library of that kind is not installed.
        """
        found = [item for items in self for item in items]
        owners = pa.array([row for row, items in enumerate(self) for _ in items], pa.int64())
        columns = {
            self.column: owners if self.users is None else self.users.take(owners),
            "rank": pa.array([rank for items in self for rank in range(1, len(items) + 1)], pa.int32()),
            "item_id": pa.array([item.item_id for item in found], pa.string()),
            "title": pa.array([item.title for item in found], pa.string()),
            "score": pa.array([item.score for item in found], pa.float64()),
        }
        own = ("rank", "item_id", "title", "score")
        if self.column in own:
            raise ValueError(f"user: expected a column that is none of {own}, got {self.column!r}")
        return to_frame(pa.table(columns), kind, like=like)


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
        variant: of the model: "flr", "offsets", "latentr3", "anchor", "none".
        history: M items, oldest first.
        unknown: entries that were skipped.
        attention: float64 [N, T, K, M], a factor's attention summed over each item's tokens; >= 0, at most 1 in sum
            over M (exactly 1 when factors may attend to history items only and there is one thought). K = 0 for
            variants without factors; columns of items that were not used are 0.
        gates: float64 [N, T, K], sums to 1 over K.
        norms: float64 [N, K], length of each factor's part g_k f_k of the thought, of f_k where each has a thought of
            its own; 1: an input embedding's typical one.
        recommendations: best first, with shares and contributions.
        aggregation: of the factors: "thought" or "mixture".
    """

    variant: str
    history: list[HistoryItem]
    unknown: list[str]
    attention: np.ndarray
    gates: np.ndarray
    norms: np.ndarray
    recommendations: list[Recommendation]
    aggregation: str = "thought"

    @property
    def num_factors(self) -> int:
        """K."""
        return self.attention.shape[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for reports."""
        arrays = {name: getattr(self, name).tolist() for name in ("attention", "gates", "norms")}
        parts = {
            "history": [{**vars(item)} for item in self.history],
            "unknown": [*self.unknown],
            "recommendations": [item.to_dict() for item in self.recommendations],
        }
        return {"variant": self.variant, "num_factors": self.num_factors, **vars(self), **parts, **arrays}

    def effects(self) -> Effects | None:
        """What the factors did to each item, as the page, the server and ``flr explain`` show it; None without factors.

        Bars on an axis in nats, what they mean in words, the score beside the one without factors, and a notice where
        the factors barely matter; see :mod:`flr.report.effects`.
        """
        return effects([item.to_dict() for item in self.recommendations])

    def html(self, path: PathLike) -> None:
        """Write a self-contained page of recommendations with shares and attention tables, whole or not at all."""
        write_explanation(self.to_dict(), path)

    def heatmap(self, path: PathLike, *, refinement: int = -1, thought: int = -1) -> None:
        """Write a PNG, whole or not at all: K rows, a column for each of the latest 30 items, gates at the side.

        Args:
            refinement, thought: which one, counted from 0, or from the end where negative.

        Raises:
            ValueError: no factors, an empty history, or no such refinement or thought.
            ImportError: matplotlib is not installed: ``pip install 'flr[plots]'``.
        """
        if self.num_factors == 0:
            raise ValueError(f"heatmap: expected a model with factors, got variant {self.variant!r}")
        if not self.history:
            raise ValueError("heatmap: expected a history with at least one item, got none")
        for name, value, size in zip(
            ("thought", "refinement"), (thought, refinement), self.attention.shape, strict=False
        ):
            if not -size <= value < size:
                raise ValueError(f"{name}: expected {-size} to {size - 1}, got {value}")
        titles = [item.title or item.item_id for item in self.history[-COLUMNS:]]
        with warnings.catch_warnings(), styled():
            figure = draw(self.attention[thought, refinement][:, -COLUMNS:], self.gates[thought, refinement], titles)
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
            save_png(figure, path)
