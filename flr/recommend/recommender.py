"""Recommendations for histories of item ids or titles, and what each factor had to do with them.

recommender = flr.Recommender.from_pretrained("runs/cds")
for r in recommender.recommend([["B00005YW4H", "Kind of Blue"]], k=5, shares=True)[0]:
    print(r.title, r.score, r.factor_shares)
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import nn

from flr.data import CSR, HistoryViews, RecProcessor
from flr.decode import CatalogueTrie, Scoring, beam_search
from flr.decode.memory import users_at_once
from flr.decode.mixture import ViewMixture
from flr.decode.prompts import prefill
from flr.decode.scoring import resolve_scoring
from flr.explain.attention import item_attention
from flr.explain.attribution import attribute
from flr.explain.thinking import ThinkingPrompts, think
from flr.model.adapter import without_card, write_beside
from flr.model.backbone import causal_lm, evaluating, is_patched, mixes, placed, position_limit
from flr.model.checkpoint import load_from

from .histories import UserHistories
from .query import History, OnUnknown, Query, QueryBuilder, Where, allowances, check_flag, exclusions
from .results import Explanation, HistoryItem, Recommendation, Recommendations

logger = logging.getLogger("flr")

_MAX_USERS = 64  # a part
_MAX_SCORES = 1 << 25  # of a mixture: users a part are cut so that B·C stays below (256 MiB in float64, and 4 such)
_MAX_MASKS = 1 << 27  # of filters: users a part are cut so that B·C stays below (640 MiB with their prefix sums)


class Recommender(QueryBuilder):
    """Recommends from a catalogue with a model.

    Ranks as :func:`flr.evaluate` does, by the processor's ``views`` where it has any (the probabilities given single
    items are then kept, so the weights must not change while this lives).

    It pickles and copies, with its model, for Ray and multiprocessing.

    Calls from several threads are safe: they take turns. The model is run in eval mode and its modes are restored;
    while several recommenders share a model, keep it in eval mode.

    Args:
        model: causal LM, patched or not, PEFT or DDP wrapped or not.
        processor: its RecProcessor.
        trie: of the processor's codec; built when None.

    Raises:
        ValueError: processor or trie do not belong to the model.

    Example:
        >>> import flr
        >>> from flr.data import RecProcessor, build_tokenizer, planted_dataset
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> catalogue = planted_dataset(num_items=40, num_users=20).catalogue
        >>> processor = RecProcessor(build_tokenizer(catalogue, "id"), catalogue)
        >>> tiny = LlamaConfig(vocab_size=len(processor.tokenizer), hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        >>> model = flr.patch_model(LlamaForCausalLM(tiny), processor.tokenizer, flr.FLRConfig(num_factors=3))
        >>> recommender = Recommender(model, processor)
        >>> [best, *rest] = recommender.recommend([["item_3", "brave jazz 1"]], k=5, shares=True)[0]
        >>> len(rest), len(best.factor_shares), round(sum(best.factor_shares), 6)
        (4, 3, 1.0)
    """

    def __init__(self, model: nn.Module, processor: RecProcessor, trie: CatalogueTrie | None = None) -> None:
        super().__init__(processor)
        self.model = model
        lm = causal_lm(model)
        config = lm._flr_patch.config if is_patched(lm) else None
        count = config.thought_count if config is not None else 0
        if processor.num_thoughts != count:
            raise ValueError(f"processor: expected num_thoughts = {count} as the model's, got {processor.num_thoughts}")
        token = processor.thought_token_id
        if config is not None and count and token != config.thought_token_id:
            raise ValueError(f"processor: expected the thought token {config.thought_token_id}, got {token}")
        self.device = next(lm.parameters()).device
        size = int(lm.config.get_text_config(decoder=True).vocab_size)
        self.trie = (CatalogueTrie.from_codec(processor.item_codec) if trie is None else trie).to(self.device)
        if self.trie.num_items != len(processor.catalogue):
            raise ValueError(f"trie: expected {len(processor.catalogue)} items, got {self.trie.num_items}")
        if self.trie.max_token >= size:
            raise ValueError(f"processor: expected tokens below the vocabulary of {size}, got {self.trie.max_token}")
        processor.fit_positions(position_limit(lm.config))
        self._lock = threading.RLock()
        self._mixture: ViewMixture | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: without the lock and the views' table, which the copy makes anew."""
        return {**self.__dict__, "_lock": None, "_mixture": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        device: torch.device | str | None = None,
        *,
        like: RecProcessor | None = None,
        **kwargs: Any,
    ) -> Recommender:
        """Load a patched model and its processor from one folder; it reads safetensors, JSON and Parquet, no pickle.

        Args:
            directory: what ``model.save_pretrained`` and ``processor.save_pretrained`` wrote; its folder, or the id
                ``"user/name"`` of a model on the Hub. The processor may lie beside an adapter.
            device: where to put the model; None leaves it where it was loaded.
            like: a processor whose catalogue is taken over where it is the same (see ``RecProcessor.from_pretrained``).
            kwargs: for flr.from_pretrained (revision, token, dtype, attn_implementation, …).

        Raises:
            OSError, ValueError: no such folder, or files that do not belong together.
        """
        model, folder = load_from(directory, **kwargs)
        return cls(placed(model, device), RecProcessor.from_pretrained(folder, like))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model and processor into one folder, from which :meth:`from_pretrained` and every command load."""
        model: Any = self.model
        with self._lock, without_card(model):
            model.save_pretrained(directory)
            write_beside(Path(directory), causal_lm(model))
            self.processor.save_pretrained(directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload recommender",
        **options: Any,
    ) -> str:
        """Publish model and processor on the Hub, in one commit; returns its address.

        A folder that a command of flr wrote has a model card, too: ``hf upload user/name FOLDER`` publishes that.

        Args:
            repo_id: ``"user/name"``; made where there is none.
            private: of a repository that is made; None for the account's default.
            token: for the Hub; None for the one that ``hf auth login`` stored.
            commit_message: one line.
            options: for ``huggingface_hub.upload_folder`` (revision, create_pr, commit_description).

        Raises:
            HfHubHTTPError: the Hub refuses.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message, **options)
        return str(done.commit_url)

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        num_beams: int = 20,
        exclude_seen: bool = False,
        scoring: Scoring | Literal["auto"] = "auto",
        on_unknown: OnUnknown = "raise",
        *,
        allow: History | None = None,
        deny: History = (),
        where: Where | None = None,
        shares: bool = False,
    ) -> Recommendations:
        """The k best items for each history.

        Args:
            histories: up to 10,000, each up to 10,000 item ids or titles (str), oldest first, or an integer array of
                catalogue indices. A title that several items share means the first of them. The model looks at the last
                ``processor.max_history`` entries; an empty history gets what suits anybody. A log in memory becomes
                histories by :meth:`flr.recommend.UserHistories.from_frame`.
            k: 1 to 1000. A list is shorter where the catalogue has fewer items to give.
            num_beams: 1 to 1000; at least k beams are used.
            exclude_seen: leave out every item of the whole given history.
            scoring: "full" or "catalogue", see :mod:`flr.decode`; "auto" takes the processor's, that of training.
            on_unknown: what to do with an entry that is no id and no title: "raise", or "skip" it with a warning in the
                log (:meth:`resolve` tells which).
            allow: ids, titles or indices of the items that may be recommended, up to 10,000; None for all. A title
                stands for every item that bears it.
            deny: those that may not, in the same forms.
            where: {attribute of the catalogue: values}: only items whose attribute has one of the values.
            shares: compute factor shares and contributions. They cost one more forward, over the tokens of the given
                items, for each of 2^K - 1 sets of factors (K <= 6, else K (K - 1) + 1): often as much as the search.

        Returns:
            A list for each history, best first. Deterministic, and independent of the other histories up to rounding.
            ``to_frame("pandas")`` and so on makes a table of it.

        Raises:
            ValueError: an argument out of range, an unknown entry (named, with near matches).
            FloatingPointError: the model gave NaN.
        """
        self.check(k, num_beams, scoring)
        check_flag("shares", shares)
        resolved, unknown = self.resolve(histories, on_unknown)
        allowed, denied, unknown_filters = self.selection(allow, deny, where, on_unknown)
        skipped = sum(map(len, [*unknown, unknown_filters]))
        if skipped:
            logger.warning("recommend: skipped %d entries that are not in the catalogue", skipped)
        queries = [self.query(history, k, exclude_seen, allowed, denied) for history in resolved]
        num_beams = max(num_beams, k)
        lists = Recommendations()
        if isinstance(histories, UserHistories):
            lists.users, lists.column = histories.users, histories.column
        found: dict[int, list[Recommendation]] = {}
        with self._lock:
            for rows in self.parts([query.history for query in queries], num_beams):
                answers, _ = self.ranked([queries[row] for row in rows], num_beams, scoring, shares)
                found.update(zip(rows, answers, strict=True))
        lists += [found[row] for row in range(len(queries))]
        return lists

    def parts(self, histories: Sequence[np.ndarray], num_beams: int) -> list[list[int]]:
        """Which queries to compute together: those of similar lengths, which need little padding, within memory.

        Args:
            histories: of the queries, int64 arrays of catalogue indices.
            num_beams: of the search.

        Returns:
            Every place in ``histories`` once, in parts for :meth:`ranked`; a function of lengths and order alone.
        """
        lengths = self.processor.prompt_lengths(CSR.from_rows(list(histories)))
        order = np.argsort(-lengths, kind="stable").tolist()
        size = self.rows_at_once(num_beams)
        return [order[first : first + size] for first in range(0, len(order), size)]

    def rows_at_once(self, num_beams: int) -> int:
        """How many queries :meth:`ranked` may be given, so that logits and filters stay within bounds; at least 1."""
        most = _MAX_MASKS if self._views is None else min(_MAX_MASKS, _MAX_SCORES)
        return users_at_once(self.model, self.trie, num_beams, min(_MAX_USERS, most // self.trie.num_items))

    def explain(
        self,
        history: History,
        k: int = 5,
        *,
        num_beams: int = 20,
        exclude_seen: bool = False,
        scoring: Scoring | Literal["auto"] = "auto",
        on_unknown: OnUnknown = "raise",
    ) -> Explanation:
        """Recommendations for one history, and what each factor attended to and contributed.

        Arguments and errors are those of :meth:`recommend`.
        """
        self.check(k, num_beams, scoring)
        resolved = self.resolve([history], on_unknown)
        query = self.query(resolved.histories[0], k, exclude_seen)
        return self.explained([query], resolved.unknown, max(num_beams, k), scoring)[0]

    @property
    def _views(self) -> HistoryViews | None:
        """The processor's, where anything takes part beside the whole prompt."""
        views = self.processor.views
        return views if views is not None and views.mixes else None

    @property
    def variant(self) -> str:
        """Of the model's thought: "flr", "offsets", "latentr3", "anchor" or "none" (an unpatched model too)."""
        lm = causal_lm(self.model)
        return lm._flr_patch.config.variant if is_patched(lm) else "none"

    @property
    def num_factors(self) -> int:
        """K; 0 for variants without factors."""
        lm = causal_lm(self.model)
        return lm._flr_patch.config.num_factors if is_patched(lm) and lm._flr_patch.config.has_reasoner else 0

    def ranked(
        self, queries: Sequence[Query], num_beams: int, scoring: Scoring | Literal["auto"], shares: bool
    ) -> tuple[list[list[Recommendation]], ThinkingPrompts | None]:
        """Answers to a few queries, computed together, and their thoughts (None without factors or ``shares``).

        The answer to a query does not depend on the others beyond rounding: ``num_beams`` (>= each k) hold for all, and
        the best k of a search for more are those of a search for k.

        Args:
            queries: at most ``rows_at_once(num_beams)`` to stay within memory.
            num_beams, scoring, shares: as for :meth:`recommend`.
        """
        if not queries:
            return [], None
        histories = [query.history for query in queries]
        own_k = np.array([query.k for query in queries])
        k = int(own_k.max())
        if num_beams < k:
            raise ValueError(f"num_beams: expected at least the largest k, {k}, got {num_beams}")
        exclude, allowed = exclusions(queries), allowances(queries)
        scoring = resolve_scoring(scoring, self.processor.scoring)
        with self._lock, torch.inference_mode(), evaluating(self.model):
            inputs, depth = self.processor(histories), self.trie.depth
            mixed_with = encoded = None
            views = self._views
            if views is None and not mixes(self.model):
                encoded = prefill(self.model, inputs, reserve=depth, want_hidden=scoring == "catalogue")
            prompts = think(self.model, inputs, depth, encoded) if shares else None
            if views is None:
                best = beam_search(
                    self.model, inputs, self.trie, num_beams, k, scoring, allowed, exclude=exclude, prompts=encoded
                )
                items, scores = best.items.cpu().numpy(), best.scores.cpu().numpy()
            else:
                mixture = self._mixture_of(views, num_beams, scoring)
                items, scores, mixed_with = mixture.best(CSR.from_rows(histories), own_k, exclude, allowed)
                exclude = allowed = None  # struck out of the mixture, which is not normalised again
            items = np.where(np.arange(items.shape[1]) < own_k[:, None], items, -1)
            base, contributions = np.full(items.shape, None), np.zeros((*items.shape, 0))
            influence = contributions
            if prompts is not None:
                rows = None if encoded is None else encoded.head_rows
                parts = exclude, allowed, mixed_with, rows
                base, contributions, influence = attribute(prompts, items, scores, self.trie, scoring, *parts)
        catalogue = self.processor.catalogue
        columns = [x.tolist() for x in (items, scores, influence, contributions, base)]
        lists = [
            [
                Recommendation(catalogue.item_ids[item], catalogue.titles[item], score, item, *parts)
                for item, score, *parts in zip(*user, strict=True)
                if item >= 0
            ]
            for user in zip(*columns, strict=True)
        ]
        return lists, prompts

    def explained(
        self, queries: Sequence[Query], unknown: Sequence[list[str]], num_beams: int, scoring: Scoring | Literal["auto"]
    ) -> list[Explanation]:
        """Explanations of a few queries, as :meth:`ranked` computes them; ``unknown``: the names that each skipped."""
        lists, prompts = self.ranked(queries, num_beams, scoring, shares=True)
        positions = self.processor([query.history for query in queries])["item_positions"]
        longest = max(len(query.history) for query in queries)
        shapes = (0, 0, 0, longest), (0, 0, 0), (0, 0)
        attention, gates, norms = (np.zeros((len(queries), *shape)) for shape in shapes)
        if prompts is not None:
            with torch.inference_mode():
                attention = item_attention(prompts, positions, longest)
                gates = torch.stack([step.gates for step in prompts.output.steps], 1).double().cpu().numpy()
                scale = prompts.lm._flr_patch.config.input_scale or 1.0
                norms = prompts.contributions.norm(dim=-1).double().cpu().numpy()
                norms /= scale * prompts.contributions.shape[-1] ** 0.5
        catalogue = self.processor.catalogue
        explanations = []
        for row, query in enumerate(queries):
            used = set(positions[row][positions[row] >= 0].tolist())
            items = [
                HistoryItem(catalogue.item_ids[item], catalogue.titles[item], item, place in used)
                for place, item in enumerate(query.history.tolist())
            ]
            arrays = attention[row, ..., : len(items)], gates[row], norms[row]
            about = (self.variant, items, list(unknown[row]), *arrays, lists[row])
            explanations.append(Explanation(*about, aggregation="mixture" if mixes(self.model) else "thought"))
        return explanations

    def _mixture_of(self, views: HistoryViews, num_beams: int, scoring: Scoring) -> ViewMixture:
        """The mixture over ``views``; the last one is kept, since its table may be large."""
        old, beams = self._mixture, None if self.trie.depth == 1 else num_beams
        if old is None or (old.views, old.num_beams, old.scoring) != (views, beams, scoring):
            self._mixture = None
            options: dict[str, Any] = {"num_beams": beams, "scoring": scoring, "trie": self.trie}
            self._mixture = ViewMixture(self.model, self.processor, views, **options)
        assert self._mixture is not None
        return self._mixture
