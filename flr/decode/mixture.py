"""Several views of one history: the whole prompt, and each of its items alone, mixed after the softmax.

A softmax over one hidden state multiplies evidence: an item must fit the whole history. Users with several interests
are better described by a sum, in which an item needs to fit one thing that they chose:

    p(item | user) = (1 - w) p(item | history) + w Σ_j λ_j p(item | item j alone),   λ_j ∝ decay^age_j,  Σ λ_j = 1

with age 0 for the latest item. A prompt of one item is the same for every user, so its distribution is computed once
for each item of the catalogue that occurs. Item-kNN (:mod:`flr.data.item_knn`) or a linear model in its place
(:mod:`flr.data.linear_items`), its scores over their sum q, may take part as well, in the same way: (1 - n) p + n q.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from flr.data import CSR, HistoryViews, RecProcessor
from flr.data.trie import CatalogueTrie
from flr_kernels.order import order_key

from .beam import beam_search
from .exhaustive import rank_one_token
from .scoring import Scoring, resolve_scoring

_MAX_DENSE = 1 << 28  # probabilities kept for one-token codecs: 1 GiB in float32


class Mixed(NamedTuple):
    """The best items of a mixture."""

    items: np.ndarray  # int64 [B, k], best first, -1 past the end
    scores: np.ndarray  # float32 [B, k], log-probabilities
    parts: tuple[np.ndarray, np.ndarray]  # float64 [B, k]: log weight of the whole prompt, log of the rest


class ViewMixture:
    """Scores a catalogue by a mixture over views; what ``flr.evaluate.evaluate_scorer`` takes.

    Args:
        model, processor: a (patched) causal LM and its processor.
        views: weights; default the processor's own. ``views.neighbours`` needs the processor's ``item_knn``.
        num_beams: for codecs of several tokens an item, each view gives probability to its ``num_beams`` best items
            only, and none to the others. One-token codecs are exact.
        batch_size: prompts at a time.

    Raises:
        ValueError: no views, or a catalogue too large for the table of one-token probabilities.
    """

    def __init__(
        self,
        model: Any,
        processor: RecProcessor,
        views: HistoryViews | None = None,
        *,
        num_beams: int = 100,
        batch_size: int = 128,
        scoring: Scoring | Literal["auto"] = "auto",
        trie: CatalogueTrie | None = None,
        name: str = "model",
    ) -> None:
        views = processor.views if views is None else views
        if views is None:
            raise ValueError("views: expected HistoryViews, got none, and the processor has none")
        self.model, self.processor, self.views = model, processor, views
        self.num_beams, self.batch_size, self.name = num_beams, batch_size, name
        self.scoring = resolve_scoring(scoring, processor.scoring)
        device = next(model.parameters()).device
        self.trie = (CatalogueTrie.from_codec(processor.item_codec) if trie is None else trie).to(device)
        size = len(processor.catalogue)
        if views.neighbours > 0 and processor.item_knn is None:
            raise ValueError(f"neighbours: expected 0 without a table of item-kNN, got {views.neighbours}")
        if views.weight > 0 and self.trie.depth == 1 and size * size > _MAX_DENSE:
            raise ValueError(f"views: expected at most {int(_MAX_DENSE**0.5)} items of one token, got {size}")
        self._row = np.full(size, -1, np.int64)  # item -> row of the table
        self._table: Any = None  # [rows, C] probabilities given one item

    @torch.inference_mode()
    def _probabilities(self, histories: CSR) -> Any:
        """[n, C] of whole prompts; dense for one-token codecs, else sparse."""
        parts = []
        for start in range(0, len(histories.offsets) - 1, self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, len(histories.offsets) - 1))
            inputs = self.processor(histories.take(rows))
            if self.trie.depth == 1:
                parts.append(rank_one_token(self.model, inputs, self.trie, self.scoring).exp().cpu().numpy())
                continue
            best = beam_search(self.model, inputs, self.trie, self.num_beams, self.num_beams, self.scoring)
            row, column = (best.items >= 0).nonzero(as_tuple=True)
            values = best.scores[row, column].exp().cpu().numpy()
            place = (row.cpu().numpy(), best.items[row, column].cpu().numpy())
            parts.append(sp.csr_matrix((values, place), shape=(len(rows), self.trie.num_items)))
        return np.concatenate(parts) if self.trie.depth == 1 else sp.vstack(parts, format="csr")

    def _know(self, items: np.ndarray) -> None:
        """Make sure that the table has a row for each of ``items``."""
        new = np.unique(items[self._row[items] < 0])
        if len(new) == 0:
            return
        rows = self._probabilities(CSR(new.astype(np.int32), np.arange(len(new) + 1)))
        self._row[new] = np.arange(len(new)) + (0 if self._table is None else self._table.shape[0])
        if self._table is None:
            self._table = rows
        else:
            self._table = (
                np.concatenate([self._table, rows])
                if isinstance(rows, np.ndarray)
                else sp.vstack([self._table, rows], format="csr")
            )

    def scores(self, histories: CSR) -> np.ndarray:
        """Probabilities, float32 [B, C], of B histories."""
        return self._mixed(histories, None)

    def _mixed(self, histories: CSR, whole: np.ndarray | None) -> np.ndarray:
        """Probabilities [B, C]; ``whole`` [B, C] are those of the whole prompts, where they are known."""
        count = len(histories.offsets) - 1
        kept = histories.slice(
            np.maximum(histories.offsets[:-1], histories.offsets[1:] - self.processor.max_history),
            histories.offsets[1:],
        )
        lengths = kept.lengths
        weight = np.where(lengths > 0, self.views.weight, 0.0)  # an empty history has its prompt alone
        total = np.zeros((count, len(self.processor.catalogue)), np.float32)
        if (weight < 1).any():
            total += (1 - weight)[:, None] * (_dense(self._probabilities(histories)) if whole is None else whole)
        if self.views.weight > 0 and len(kept.values):
            self._know(kept.values)
            share = self.views.decay**kept.ages
            row = np.repeat(np.arange(count), lengths)
            share = share / np.bincount(row, share, count)[row] * weight[row]
            mix = sp.csr_matrix((share, (row, self._row[kept.values])), shape=(count, self._table.shape[0]))
            total += _dense(mix @ self._table)
        if self.views.neighbours > 0:
            assert self.processor.item_knn is not None  # __init__ has looked
            total *= 1.0 - self.views.neighbours
            total += self.views.neighbours * self.processor.item_knn.probabilities(histories)
        return total.astype(np.float32)

    def best(
        self, histories: CSR, k: int, exclude: torch.Tensor | None = None, allowed: torch.Tensor | None = None
    ) -> Mixed:
        """The k best items; those that may not be given are struck out of the mixture, which is not normalised again.

        Args:
            histories: of B users.
            k: how many items; all of them where the catalogue has fewer.
            exclude: int64 [B, E], -1 past the end. allowed: bool [C] or [B, C].
        """
        whole = _dense(self._probabilities(histories))  # 0 for what its beam search did not give
        probabilities = torch.from_numpy(self._mixed(histories, whole))
        if exclude is not None:
            row, column = (exclude >= 0).nonzero(as_tuple=True)
            probabilities[row, exclude[row, column]] = 0.0
        if allowed is not None:
            probabilities.masked_fill_(~allowed, 0.0)
        index = torch.arange(probabilities.shape[1])
        items = order_key(probabilities.log(), index).topk(min(k, len(index)), dim=1).indices
        chosen = probabilities.gather(1, items)
        alone = torch.from_numpy(whole).gather(1, items).double()
        weight = torch.where(torch.from_numpy(histories.lengths > 0), 1.0 - self.views.weight, 1.0).double()[:, None]
        weight *= 1.0 - self.views.neighbours
        rest = (chosen.double() - weight * alone).clamp_min(0.0)
        log_weight = torch.where(alone > 0, weight, 0.0).log()
        items = torch.where(chosen > 0, items, -1)
        return Mixed(items.numpy(), chosen.log().numpy(), (log_weight.numpy(), rest.log().numpy()))


def _dense(x: Any) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)
