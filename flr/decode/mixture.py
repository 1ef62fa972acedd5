"""Several views of one history: the whole prompt, and each of its items alone, mixed after the softmax.

A softmax over one hidden state multiplies evidence: an item must fit the whole history. Users with several interests
are better described by a sum, in which an item needs to fit one thing that they chose:

    p(item | user) = (1 - w) p(item | history) + w Σ_j λ_j p(item | item j alone),   λ_j ∝ decay^age_j,  Σ λ_j = 1

with age 0 for the latest item. A prompt of one item is the same for every user, so its distribution is computed once
for each item of the catalogue that occurs. Item-kNN (:mod:`flr.data.item_knn`) or a linear model in its place
(:mod:`flr.data.linear_items`), its scores over their sum q, may take part as well, in the same way: (1 - n) p + n q.

Sums are made of logarithms: an item of several tokens may have a probability that no floating-point number holds.
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
from .exhaustive import rank_one_token, score_all_items
from .memory import users_at_once
from .scoring import Scoring, resolve_scoring

_MAX_DENSE = 1 << 28  # log-probabilities kept where every item has one: 1 GiB in float32


class Mixed(NamedTuple):
    """The best items of a mixture."""

    items: np.ndarray  # int64 [B, k], best first, -1 past the end
    scores: np.ndarray  # float32 [B, k], log-probabilities
    parts: tuple[np.ndarray, np.ndarray]  # float64 [B, k]: log weight of the whole prompt, log of the rest


class _Given(NamedTuple):
    """What a model gives after n prompts: log-probabilities, float32."""

    items: np.ndarray | None  # int32 [n, W], -1 past the end; None where every item has its place
    logs: np.ndarray  # [n, W], or [n, C]

    def add(self, total: torch.Tensor, users: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> None:
        """Mix ``rows`` with log ``weights``, int64 and float64 [u], into the ``users`` of ``total`` [B, C + 1]."""
        user, more = torch.from_numpy(users), torch.from_numpy(self.logs[rows]).double()
        more += torch.from_numpy(weights)[:, None]
        if self.items is None:
            total[user, :-1] = torch.logaddexp(total[user, :-1], more)
            return
        place = user[:, None], torch.from_numpy(self.items[rows]).long()  # -1 is the last column, which nobody reads
        total[place] = torch.logaddexp(total[place], more)


class ViewMixture:
    """Scores a catalogue by a mixture over views.

    Args:
        model, processor: a (patched) causal LM and its processor.
        views: weights; default the processor's own. ``views.neighbours`` needs the processor's ``item_knn``.
        num_beams: for codecs of several tokens an item, each view gives probability to its ``num_beams`` best items
            only, and none to the others. None: to every item, as one-token codecs always do.
        batch_size: prompts at a time, fewer where their logits take too much memory.

    Raises:
        ValueError: no views, or a catalogue too large for the table of every item's probabilities.
    """

    def __init__(
        self,
        model: Any,
        processor: RecProcessor,
        views: HistoryViews | None = None,
        *,
        num_beams: int | None = 100,
        batch_size: int = 128,
        scoring: Scoring | Literal["auto"] = "auto",
        trie: CatalogueTrie | None = None,
    ) -> None:
        views = processor.views if views is None else views
        if views is None:
            raise ValueError("views: expected HistoryViews, got none, and the processor has none")
        self.model, self.processor, self.views = model, processor, views
        self.scoring = resolve_scoring(scoring, processor.scoring)
        device = next(model.parameters()).device
        self.trie = (CatalogueTrie.from_codec(processor.item_codec) if trie is None else trie).to(device)
        self.num_beams = num_beams = None if self.trie.depth == 1 else num_beams
        self.batch_size = users_at_once(model, self.trie, num_beams or 1, batch_size)
        size = len(processor.catalogue)
        if views.neighbours > 0 and processor.item_knn is None:
            raise ValueError(f"neighbours: expected 0 without a table of item-kNN, got {views.neighbours}")
        if views.weight > 0 and num_beams is None and size * size > _MAX_DENSE:
            most = f"at most {int(_MAX_DENSE**0.5)} items where each is scored (one token an item, or exhaustive)"
            raise ValueError(f"views: expected {most}, got {size}")
        self._row = np.full(size, -1, np.int64)  # item -> row of the table
        self._table: _Given | None = None  # after prompts of one item
        self._expected = np.zeros(0, np.int32)  # items to come

    def expect(self, histories: CSR) -> None:
        """Make the table of all their items at the first use: in the same batches, to the last bit, in any process."""
        self._expected = np.unique(self._kept(histories).values)

    def scores(
        self,
        histories: CSR,
        exclude: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
        least: int | np.ndarray = 0,
    ) -> np.ndarray:
        """Log-probabilities, float64 [B, C], of B histories; -inf for items that may not be given, or that none gives.

        Arguments are those of :meth:`best`; ``least`` is its k.
        """
        whole, weight, rest = self._parts(histories, exclude, allowed, least)
        return torch.logaddexp(whole + weight, rest).numpy()

    def best(
        self,
        histories: CSR,
        k: int | np.ndarray,
        exclude: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
    ) -> Mixed:
        """The k best items of those that may be given; the mixture is not normalised again.

        Beams look for items that may be given: for those of the whole prompt, and where a list were shorter than k, of
        single items. A filter changes no probability, but what beams find.

        Args:
            histories: of B users.
            k: how many items, of all or int64 [B] of each user: lists are as long as the longest, and what a user is
                given does not depend on what others want. All items where the catalogue has fewer.
            exclude: int64 [B, E], -1 past the end. allowed: bool [C] or [B, C].
        """
        whole, weight, rest = self._parts(histories, exclude, allowed, k)
        scores = torch.logaddexp(whole + weight, rest).float()
        index = torch.arange(scores.shape[1])
        items = order_key(scores, index).topk(min(int(np.max(k)), len(index)), dim=1).indices
        chosen, alone, rest = (x.gather(1, items) for x in (scores, whole, rest))
        weight = weight.expand_as(alone).masked_fill(alone == -torch.inf, -torch.inf)
        return Mixed(
            items.masked_fill(chosen == -torch.inf, -1).numpy(), chosen.numpy(), (weight.numpy(), rest.numpy())
        )

    @torch.inference_mode()
    def _parts(
        self, histories: CSR, exclude: torch.Tensor | None, allowed: torch.Tensor | None, least: int | np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whole prompts' log-probabilities [B, C], their log weights [B, 1], and the rest with its weights [B, C]."""
        count, size = len(histories.offsets) - 1, len(self.processor.catalogue)
        views, users = self.views, np.arange(count)
        kept = self._kept(histories)
        own = np.where(kept.lengths > 0, 1.0 - views.weight, 1.0) * (1.0 - views.neighbours)
        whole = _nothing(count, size)
        if own.any():  # an empty history has its prompt alone
            self._given(histories, exclude, allowed).add(whole, users, users, np.zeros(count))
        single, asks = _nothing(count, size), views.weight > 0 and views.neighbours < 1
        if asks and len(kept.values):
            single = self._singles(kept, self._known(kept.values), self._row[kept.values])
        weight = torch.from_numpy(own).log()[:, None]
        table = self._neighbours(histories)
        may = _may(count, size, exclude, allowed)
        if may is not None and asks and self.num_beams is not None:
            given = (whole + weight > -torch.inf) | (single > -torch.inf)
            given = given[:, :-1] if table is None else given[:, :-1] | (table > -torch.inf)
            few = (given & may).sum(1) < may.sum(1).minimum(torch.as_tensor(least))
            for user in few.nonzero()[:, 0].tolist():
                single[user] = self._singles_again(kept.take(np.array([user])), user, exclude, allowed)
        whole, rest = whole[:, :-1], single[:, :-1]
        rest = rest if table is None else torch.logaddexp(rest, table)
        if may is not None:
            whole, rest = (x.masked_fill(~may, -torch.inf) for x in (whole, rest))
        return whole, weight, rest

    def _kept(self, histories: CSR) -> CSR:
        """The items that take part, the latest ones."""
        ends = histories.offsets[1:]
        return histories.slice(np.maximum(histories.offsets[:-1], ends - self.processor.max_history), ends)

    def _neighbours(self, histories: CSR) -> torch.Tensor | None:
        """Log-probabilities [B, C] of the table of item-kNN with its weight, where it takes part."""
        if self.views.neighbours == 0:
            return None
        assert self.processor.item_knn is not None  # __init__ has looked
        return torch.from_numpy(self.processor.item_knn.probabilities(histories)).mul_(self.views.neighbours).log_()

    def _singles(self, kept: CSR, given: _Given, row: np.ndarray) -> torch.Tensor:
        """log w (1 - n) Σ_j λ_j p(item | item j alone), [B, C + 1], of what is ``given`` in ``row`` after each item."""
        total = _nothing(len(kept.offsets) - 1, len(self.processor.catalogue))
        ages, user = kept.ages, np.repeat(np.arange(len(total)), kept.lengths)
        share = ages * np.log(self.views.decay)
        share -= np.log(np.bincount(user, np.exp(share))[user])
        share += np.log(self.views.weight) + np.log(1.0 - self.views.neighbours)
        if given.items is None:
            used, column = np.unique(row, return_inverse=True)
            weights = sp.csr_matrix((np.exp(share).astype(np.float32), (user, column)), (len(total), len(used)))
            mixed = weights @ np.exp(given.logs[used])
            # in a third of the time, where float32 holds them all with all its digits
            if (mixed[kept.lengths > 0] >= np.finfo(np.float32).tiny).all():
                total[:, :-1] = torch.from_numpy(mixed).double().log_()
                return total
        for age in range(int(kept.lengths.max())):
            at = np.flatnonzero(ages == age)
            given.add(total, user[at], row[at], share[at])
        return total

    def _singles_again(
        self, kept: CSR, user: int, exclude: torch.Tensor | None, allowed: torch.Tensor | None
    ) -> torch.Tensor:
        """:meth:`_singles` [C + 1] of one user, whose beams look for what this user may be given."""
        items, row = np.unique(kept.values, return_inverse=True)
        if len(items) == 0:
            return _nothing(1, len(self.processor.catalogue))[0]
        own = None if exclude is None else exclude[user].expand(len(items), -1)
        mask = allowed if allowed is None or allowed.dim() == 1 else allowed[user]
        return self._singles(kept, self._given(_alone(items), own, mask), row)[0]

    def _known(self, items: np.ndarray) -> _Given:
        """The table, with a row for each of ``items``."""
        new = np.unique(items[self._row[items] < 0])
        if len(new):
            new, self._expected = np.union1d(new, self._expected), self._expected[:0]
            given, before = self._given(_alone(new)), self._table
            self._row[new] = np.arange(len(new)) + (0 if before is None else len(before.logs))
            self._table = given if before is None else _joined([before, given])
        assert self._table is not None
        return self._table

    def _given(
        self, histories: CSR, exclude: torch.Tensor | None = None, allowed: torch.Tensor | None = None
    ) -> _Given:
        """After whole prompts; beams look for items that may be given, with the probabilities of an open search."""
        parts, count = [], len(histories.offsets) - 1
        for start in range(0, count, self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, count))
            inputs = self.processor(histories.take(rows))
            if self.num_beams is None:
                score = rank_one_token if self.trie.depth == 1 else score_all_items
                parts.append(_Given(None, score(self.model, inputs, self.trie, self.scoring).cpu().numpy()))
                continue
            best = beam_search(
                self.model, inputs, self.trie, self.num_beams, self.num_beams, self.scoring,
                allowed if allowed is None or allowed.dim() == 1 else allowed[rows],
                exclude=None if exclude is None else exclude[rows], renormalise=False,
            )  # fmt: skip
            parts.append(_Given(best.items.int().cpu().numpy(), best.scores.cpu().numpy()))
        return _joined(parts)


def _alone(items: np.ndarray) -> CSR:
    """A history for each of ``items``."""
    return CSR(items.astype(np.int32), np.arange(len(items) + 1))


def _joined(parts: list[_Given]) -> _Given:
    logs = np.concatenate([part.logs for part in parts])
    lists = [part.items for part in parts if part.items is not None]
    return _Given(np.concatenate(lists) if lists else None, logs)


def _nothing(count: int, size: int) -> torch.Tensor:
    """Log-probabilities of no item, and a column more."""
    return torch.full((count, size + 1), -torch.inf, dtype=torch.float64)


def _may(count: int, size: int, exclude: torch.Tensor | None, allowed: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, C], which items may be given; None for all."""
    if exclude is None and allowed is None:
        return None
    may = torch.ones(count, size, dtype=torch.bool) if allowed is None else allowed.expand(count, size).clone()
    if exclude is not None:
        row, column = (exclude >= 0).nonzero(as_tuple=True)
        may[row, exclude[row, column]] = False
    return may
