"""Why these items: what each factor attended to, and whether factors correspond to interests.

explanation = explain(model, processor, ["item_3", "Brave Jazz 1"], k=5)
explanation.heatmap("why.png")
explanation.html("why.html")
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from flr.data import CSR, Interactions, RecProcessor
from flr.decode import CatalogueTrie, Scoring
from flr.model.backbone import evaluating
from flr.recommend.recommender import History, OnUnknown, Query, Recommendation, Recommender
from flr.report.html import PathLike, explanation_body, page, save_png, write_text

from .attribution import ThinkingPrompts, think

_HEAT = LinearSegmentedColormap.from_list("flr", ["#f7f9fb", "#c4dcef", "#6ba7d4", "#1f6fae", "#0b3a66"])
_LABEL = 30  # characters of a title on the heat map
_COLUMNS = 30  # history items on the heat map, the latest ones
_NUMBERS = 14  # with up to this many columns the cells hold numbers


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


def _draw(alpha: np.ndarray, gates: np.ndarray, titles: list[str]) -> Figure:
    """Heat map of alpha [K, M] with gates [K] as bars."""
    factors, columns = alpha.shape
    cell = 0.62 if columns <= _NUMBERS else 0.42
    width, height = max(cell * columns, 2.8), 0.5 * factors
    figure = Figure(figsize=(width + 3.6, height + 2.6), layout="constrained")
    ax, side = figure.subplots(1, 2, sharey=True, width_ratios=[width, 1.5])
    largest = max(float(alpha.max()), 1e-12)
    mesh = ax.pcolormesh(alpha, cmap=_HEAT, vmin=0, vmax=largest, edgecolors="white", linewidth=1.5)
    if columns <= _NUMBERS:
        for (k, m), value in np.ndenumerate(alpha):
            colour = "white" if value > 0.55 * largest else "#1b2733"
            ax.text(m + 0.5, k + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    ax.set_ylim(factors, 0)
    ax.set_yticks(np.arange(factors) + 0.5, [f"factor {k + 1}" for k in range(factors)], fontsize=10)
    ax.set_xticks(
        np.arange(columns) + 0.5, [_label(title) for title in titles], rotation=40, ha="right", rotation_mode="anchor"
    )
    for label in ax.get_xticklabels():
        label.set(fontsize=9, parse_math=False)
    ax.set_title("Attention, %", fontsize=11, loc="left", pad=8)
    side.barh(np.arange(factors) + 0.5, gates, height=0.6, color="#e69f00")
    for k, gate in enumerate(gates):
        side.text(gate + 0.02, k + 0.5, f"{100 * gate:.0f}", ha="left", va="center", fontsize=8.5, color="#33404c")
    side.set_xlim(0, max(float(gates.max()) * 1.35, 0.05))
    side.set_xticks([])
    side.set_title("Gate, %", fontsize=11, loc="left", pad=8)
    for axis in (ax, side):
        axis.tick_params(length=0, colors="#222222")
        for spine in axis.spines.values():
            spine.set_visible(False)
    side.tick_params(labelleft=False)
    if columns > _NUMBERS:
        bar = figure.colorbar(mesh, ax=side, fraction=0.3, aspect=14, format=lambda x, _: f"{100 * x:.0f} %")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8.5)
    ax.set_xlabel("History, oldest to latest", fontsize=9, color="#59626c", loc="left")
    return figure


def _label(title: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in title).split())
    return text if len(text) <= _LABEL else text[: _LABEL - 1].rstrip() + "…"


def explain(
    model: nn.Module,
    processor: RecProcessor,
    history: History,
    k: int = 5,
    *,
    num_beams: int = 20,
    exclude_seen: bool = False,
    scoring: Scoring | Literal["auto"] = "auto",
    on_unknown: OnUnknown = "raise",
    trie: CatalogueTrie | None = None,
) -> Explanation:
    """Recommendations for one history, and what each factor attended to and contributed.

    Args:
        model, processor, trie: as for :class:`flr.Recommender`; use ``Recommender.explain`` when calling often.
        history: item ids or titles, oldest first (or an integer array of catalogue indices).
        k, num_beams, exclude_seen, scoring, on_unknown: as for ``Recommender.recommend``.

    Raises:
        ValueError, FloatingPointError: as ``Recommender.recommend``.
    """
    return explain_with(
        Recommender(model, processor, trie),
        history,
        k,
        num_beams=num_beams,
        exclude_seen=exclude_seen,
        scoring=scoring,
        on_unknown=on_unknown,
    )


def explain_with(
    recommender: Recommender,
    history: History,
    k: int = 5,
    *,
    num_beams: int = 20,
    exclude_seen: bool = False,
    scoring: Scoring | Literal["auto"] = "auto",
    on_unknown: OnUnknown = "raise",
) -> Explanation:
    """:func:`explain` with a recommender."""
    recommender.check(k, num_beams, scoring)
    resolved = recommender.resolve([history], on_unknown)
    query = recommender.query(resolved.histories[0], k, exclude_seen)
    return explained(recommender, [query], resolved.unknown, max(num_beams, k), scoring)[0]


def explained(
    recommender: Recommender,
    queries: Sequence[Query],
    unknown: Sequence[list[str]],
    num_beams: int,
    scoring: Scoring | Literal["auto"],
) -> list[Explanation]:
    """Explanations of a few queries, computed together: as ``Recommender.ranked``, ``unknown`` being what each one's names lacked."""
    lists, prompts = recommender.ranked(queries, num_beams, scoring, shares=True)
    processor, variant = recommender.processor, recommender.variant
    positions = processor([query.history for query in queries])["item_positions"]
    attention, gates, norms = np.zeros((len(queries), 0, 0, 0, 0)), np.zeros((len(queries), 0, 0, 0)), None
    if prompts is not None:
        with torch.inference_mode():
            attention = item_attention(prompts, positions, max(len(query.history) for query in queries))
            gates = torch.stack([step.gates for step in prompts.output.steps], 1).double().cpu().numpy()
            scale = prompts.lm._flr_patch.config.input_scale or 1.0
            norms = prompts.contributions.norm(dim=-1).double().cpu().numpy()
            norms /= scale * prompts.contributions.shape[-1] ** 0.5
    catalogue = processor.catalogue
    found = []
    for row, query in enumerate(queries):
        used = set(positions[row][positions[row] >= 0].tolist())
        items = [
            HistoryItem(catalogue.item_ids[item], catalogue.titles[item], item, place in used)
            for place, item in enumerate(query.history.tolist())
        ]
        own = attention[row, ..., : len(items)] if prompts is not None else np.zeros((0, 0, 0, len(items)))
        parts = norms[row] if norms is not None else np.zeros((0, 0))
        found.append(Explanation(variant, items, list(unknown[row]), own, gates[row], parts, lists[row]))
    return found


@torch.no_grad()
def item_attention(prompts: ThinkingPrompts, item_positions: torch.Tensor, num_items: int) -> np.ndarray:
    """Attention summed over each history entry's tokens: float64 [B, N, T, K, M] for item_positions [B, L + N] and M = num_items.

    Tokens that belong to no item (template, earlier thoughts) count for none.
    """
    thoughts = []
    for step in prompts.output.steps:
        attention = step.attention.double()  # [B, T, K, columns before the thought]
        entry = item_positions[:, : attention.shape[-1]].to(attention.device)
        place = torch.where(entry >= 0, entry, num_items)[:, None, None].expand_as(attention)
        summed = attention.new_zeros(*attention.shape[:3], num_items + 1).scatter_add_(-1, place, attention)
        thoughts.append(summed[..., :num_items])
    return torch.stack(thoughts, 1).cpu().numpy()


@dataclass(frozen=True)
class FactorInterest:
    """How well factors agree with the items' true interests.

    Attributes:
        nmi: normalised mutual information (arithmetic mean of the entropies, as scikit-learn's) between an item's factor and its
            interest, over all history items of all rows; 0 to 1.
        chance, chance_high: mean and 97.5 % quantile of the same after permuting the interests among the items; None
            without permutations.
        within_user: mean of a row's own NMI, over rows whose items have two interests or more; None if there is no such
            row. High where every user's factors separate that user's interests, although factor 1 may stand for one interest
            here and for another there.
        within_user_chance: the same after permuting the interests among a row's items (it is far above 0: rows are short).
        confusion: int64 [K, I], items of interest i that were given to factor k.
        num_items: how many history items were counted.
    """

    nmi: float
    chance: float | None
    chance_high: float | None
    within_user: float | None
    within_user_chance: float | None
    confusion: np.ndarray
    num_items: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for reports."""
        return {**asdict(self), "confusion": self.confusion.tolist()}


def assign_factors(attention: np.ndarray) -> np.ndarray:
    """The factor to which an item belongs: argmax_k of attention_k(item) relative to factor k's mean over the row's items.

    A factor's attention is first divided by its mean over the row's items, so that every factor has the same amount to spend on
    a row: a factor that leaves attention on other tokens is not at a disadvantage, one that is peaked wins its
    peak only and the others go to who looks at them more than at its average item. Gates play no part. Equal values go to the
    first factor; a factor with no attention in the row gets nothing unless all have none.

    >>> assign_factors(np.array([[0.5, 0.4, 0.1], [0.02, 0.02, 0.06]])).tolist()
    [0, 0, 1]

    Args:
        attention: float [..., K, M], >= 0.

    Returns:
        int64 [..., M], 0..K-1.
    """
    mean = attention.mean(-1, keepdims=True)
    return np.where(mean > 0, attention / np.where(mean > 0, mean, 1), 0).argmax(-2)


def agreement(
    factors: np.ndarray,
    items: np.ndarray,
    rows: np.ndarray,
    interests: np.ndarray,
    num_factors: int,
    permutations: int = 50,
    seed: int = 0,
) -> FactorInterest:
    """Agreement of factors with interests, with its level by chance.

    Args:
        factors, items, rows: int [n], of every history item: its factor 0..K-1, which item of the catalogue, and of which row.
        interests: int [C], of every item, 0..I-1 or any labels.
        permutations, seed: of the chance level. For ``chance`` the interests are permuted among the items that
            occur, so that an item keeps one interest wherever it stands.

    Raises:
        ValueError: no items.
    """
    if len(factors) == 0:
        raise ValueError("factors: expected at least one history item, got none")
    _, labels = np.unique(np.asarray(interests), return_inverse=True)
    number = int(labels.max()) + 1
    own = labels[items]
    confusion = np.zeros((num_factors, number), np.int64)
    np.add.at(confusion, (factors, own), 1)
    generator = np.random.default_rng(seed)
    occurring = np.unique(items)
    permuted, shuffled = labels.copy(), []
    for _ in range(permutations):
        permuted[occurring] = labels[generator.permutation(occurring)]
        shuffled.append(normalized_mutual_info_score(permuted[items], factors))
    within = _within_rows(factors, own, rows, num_factors, number)
    within_chance = None
    if within is not None:
        order = np.argsort(rows, kind="stable")
        draws: list[float] = []
        for _ in range(min(permutations, 10)):
            again = np.empty_like(own)  # items of a row in any order
            again[order] = own[np.lexsort((generator.random(len(rows)), rows))]
            draws.append(_within_rows(factors, again, rows, num_factors, number) or 0.0)
        within_chance = float(np.mean(draws)) if draws else None
    return FactorInterest(
        nmi=float(normalized_mutual_info_score(own, factors)),
        chance=float(np.mean(shuffled)) if shuffled else None,
        chance_high=float(np.quantile(shuffled, 0.975)) if shuffled else None,
        within_user=within,
        within_user_chance=within_chance,
        confusion=confusion,
        num_items=len(factors),
    )


def _within_rows(factors: np.ndarray, own: np.ndarray, rows: np.ndarray, num_factors: int, number: int) -> float | None:
    """Mean NMI of a row over the rows with two interests or more; None without such rows."""
    _, row = np.unique(rows, return_inverse=True)
    table = np.zeros((int(row.max()) + 1, num_factors, number))
    np.add.at(table, (row, factors, own), 1)
    table = table[(table.sum(1) > 0).sum(1) >= 2]
    if len(table) == 0:
        return None
    joint = table / table.sum((1, 2), keepdims=True)

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.where(p > 0, p, 1))).reshape(len(p), -1).sum(1)

    of_factors, of_interests = entropy(joint.sum(2)), entropy(joint.sum(1))
    information = of_factors + of_interests - entropy(joint)
    return float(np.mean(np.maximum(information, 0) / ((of_factors + of_interests) / 2)))


def factor_interest(
    model: nn.Module,
    processor: RecProcessor,
    interactions: Interactions | CSR,
    interests: np.ndarray,
    batch_size: int = 64,
    *,
    refinement: int = -1,
    thought: int = -1,
    permutations: int = 50,
    seed: int = 0,
) -> FactorInterest:
    """Whether the factors recover known interests.

    Every history item that the model sees is given to one factor by :func:`assign_factors` (the factor for which this
    item stands out most against its average attention in that history); the factors are then compared with the items'
    interests. Histories of which the model sees one item are left out: attention over one item says nothing. The targets
    play no part. Deterministic, and independent of batch_size up to ties by rounding.

    Args:
        model: patched, with factors. processor: its RecProcessor.
        interactions: rows, whose histories are used (e.g. ``dataset.test``).
        interests: int [C], the true interest of every item (``catalogue.attributes["interest"]``).
        refinement, thought: whose attention, from the end where negative.
        permutations, seed: of the chance level.

    Raises:
        ValueError: a model without factors, interests of the wrong shape, no history of two items.
    """
    interests = np.asarray(interests)
    if interests.shape != (len(processor.catalogue),):
        raise ValueError(f"interests: expected shape ({len(processor.catalogue)},), got {interests.shape}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    histories = interactions.histories if isinstance(interactions, Interactions) else interactions
    filled = np.flatnonzero(histories.lengths > 1)
    filled = filled[np.argsort(histories.lengths[filled], kind="stable")]  # equal lengths together: little padding
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_factors = 0
    with torch.inference_mode(), evaluating(model):
        for first in range(0, len(filled), batch_size):
            chosen = filled[first : first + batch_size]
            part = histories.take(chosen)
            inputs = processor(part)
            prompts = think(model, inputs, reserve=0)
            if prompts is None:
                raise ValueError("model: expected one with factors (variant 'flr' or 'latentr3'), got one without")
            num_factors = prompts.contributions.shape[2]
            positions = inputs["item_positions"]
            attention = item_attention(prompts, positions, int(part.lengths.max()))[:, thought, refinement]
            for row, index in enumerate(chosen.tolist()):
                seen = np.unique(positions[row][positions[row] >= 0].numpy())
                if len(seen) < 2:
                    continue
                factors = assign_factors(attention[row][:, seen])
                found.append((factors, part.row(row)[seen].astype(np.int64), np.full(len(seen), index)))
    if not found:
        raise ValueError("interactions: expected at least one row with a history of two items, got none")
    factors, items, rows = (np.concatenate(column) for column in zip(*found, strict=True))
    return agreement(factors, items, rows, interests, num_factors, permutations, seed)


def factor_interest_nmi(
    model: nn.Module,
    processor: RecProcessor,
    interactions: Interactions | CSR,
    interests: np.ndarray,
    batch_size: int = 64,
    **options: Any,
) -> float:
    """The ``nmi`` of :func:`factor_interest` alone, without a chance level."""
    return factor_interest(model, processor, interactions, interests, batch_size, **{"permutations": 0, **options}).nmi
