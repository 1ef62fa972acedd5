"""Recommendations for histories of item ids or titles, and what each factor had to do with them.

recommender = flr.Recommender.from_pretrained("runs/cds")
for r in recommender.recommend([["B00005YW4H", "Kind of Blue"]], k=5)[0]:
    print(r.title, r.score, r.factor_shares)
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from .attribution import ThinkingPrompts, attribute, influence_shares, think
from .checkpoint import from_pretrained
from .data import CSR, RecProcessor
from .decode import CatalogueTrie, Scoring, beam_search
from .decode.scoring import order_key, resolve_scoring
from .decode.session import causal_lm, evaluating
from .patch import is_patched
from .views import ViewMixture

if TYPE_CHECKING:
    from .explain import Explanation

logger = logging.getLogger("flr")

OnUnknown = Literal["raise", "skip"]
#: One user: item ids or titles, oldest first; or an integer array of catalogue indices.
History: TypeAlias = "Sequence[str] | np.ndarray"

MAX_K = 1000
MAX_BEAMS = 1000
MAX_HISTORIES = 10_000
MAX_ENTRIES = 10_000
_MIN_TEXT = 500  # an entry may always be this long; else as long as the catalogue's longest id or title
_MAX_LOGITS = 1 << 26  # of a beam step: users a part are cut so that B·W·V stays below (256 MiB in float32)
_MAX_USERS = 64  # a part


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


class Resolved(NamedTuple):
    """Histories as catalogue indices (int64 arrays, oldest first) and, for each, the entries that were skipped."""

    histories: list[np.ndarray]
    unknown: list[list[str]]


class Recommender:
    """Recommends from a catalogue with a model.

    Ranks as ``flr.evaluate.evaluate`` does, by the processor's ``views`` where it has any (the probabilities given single items are
    then kept, so the weights must not change while this lives).

    Calls from several threads are safe: they take turns. The model is run in eval mode and its modes are restored; while
    several Recommenders share a model, keep it in eval mode.

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
        >>> [best, *rest] = Recommender(model, processor).recommend([["item_3", "brave jazz 1"]], k=5)[0]
        >>> len(rest), len(best.factor_shares), round(sum(best.factor_shares), 6)
        (4, 3, 1.0)
    """

    def __init__(self, model: nn.Module, processor: RecProcessor, trie: CatalogueTrie | None = None) -> None:
        self.model = model
        self.processor = processor
        lm = causal_lm(model)
        config = lm._flr_patch.config if is_patched(lm) else None
        count = config.thought_count if config is not None else 0
        if processor.num_thoughts != count:
            raise ValueError(f"processor: expected num_thoughts = {count} as the model's, got {processor.num_thoughts}")
        if config is not None and count and processor.thought_token_id != config.thought_token_id:
            raise ValueError(
                f"processor: expected the thought token {config.thought_token_id}, got {processor.thought_token_id}"
            )
        self.device = next(lm.parameters()).device
        self._vocabulary = int(lm.config.get_text_config().vocab_size)
        if trie is None:
            trie = CatalogueTrie.from_codec(processor.item_codec)
        self.trie = trie.to(self.device)
        if self.trie.num_items != len(processor.catalogue):
            raise ValueError(f"trie: expected {len(processor.catalogue)} items, got {self.trie.num_items}")
        if self.trie.max_token >= self._vocabulary:
            raise ValueError(
                f"processor: expected tokens below the model's vocabulary of {self._vocabulary}, got {self.trie.max_token}"
            )
        catalogue = processor.catalogue
        self._longest_text = max(_MIN_TEXT, *map(len, catalogue.item_ids), *map(len, catalogue.titles))
        self._lock = threading.RLock()
        self._mixture: ViewMixture | None = None

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], device: torch.device | str | None = None, **kwargs: Any
    ) -> Recommender:
        """Load a patched model and its processor from one folder (safetensors, JSON and Parquet only, no pickle).

        Args:
            directory: what ``model.save_pretrained`` and ``processor.save_pretrained`` wrote.
            device: where to put the model; None leaves it where it was loaded.
            kwargs: for flr.from_pretrained (dtype, attn_implementation, …).

        Raises:
            OSError, ValueError: no such folder, or files that do not belong together.
        """
        model: Any = from_pretrained(Path(directory), **kwargs)
        if device is not None:
            model.to(device)
        return cls(model, RecProcessor.from_pretrained(directory))

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        num_beams: int = 20,
        exclude_seen: bool = False,
        scoring: Scoring | Literal["auto"] = "auto",
        on_unknown: OnUnknown = "raise",
        *,
        shares: bool = True,
    ) -> list[list[Recommendation]]:
        """The k best items for each history.

        Args:
            histories: up to 10,000, each a sequence of up to 10,000 item ids or titles (str), oldest first, or an integer array of
                catalogue indices. A title that several items share means the first of them. The model looks at the
                last ``processor.max_history`` entries; an empty history gets what suits anybody.
            k: 1 to 1000. A list is shorter where the catalogue has fewer items to give.
            num_beams: 1 to 1000; at least k beams are used.
            exclude_seen: leave out every item of the whole given history.
            scoring: "full" or "catalogue", see flr.decode; "auto" takes the processor's, that of training.
            on_unknown: what to do with an entry that is no id and no title: "raise", or "skip" it with a warning in the
                log (:meth:`resolve` tells which).
            shares: compute factor shares and contributions. They cost the prompt once more and one forward over the few tokens
                behind it for each of 2^K sets of factors (K <= 6, else K (K - 1) + 2).

        Returns:
            A list for each history, best first. Deterministic, and independent of the other histories up to rounding.

        Raises:
            ValueError: an argument out of range, an unknown entry (named, with near matches).
            FloatingPointError: the model gave NaN.
        """
        self.check(k, num_beams, scoring)
        resolved, unknown = self.resolve(histories, on_unknown)
        skipped = sum(map(len, unknown))
        if skipped:
            logger.warning("recommend: skipped %d history entries that are not in the catalogue", skipped)
        part = max(1, min(_MAX_USERS, _MAX_LOGITS // (max(num_beams, k) * self._vocabulary)))
        if self.processor.views is not None:
            part = max(1, min(part, _MAX_LOGITS // self.trie.num_items))
        found: list[list[Recommendation]] = []
        with self._lock:
            for first in range(0, len(resolved), part):
                found += self.ranked(resolved[first : first + part], k, num_beams, exclude_seen, scoring, shares)[0]
        return found

    def explain(self, history: History, k: int = 5, **options: Any) -> Explanation:
        """Recommendations for one history and what the factors attended to: :func:`flr.explain.explain` with this recommender.

        ``options`` as for :meth:`recommend` (num_beams, exclude_seen, scoring, on_unknown).
        """
        from .explain import explain_with

        return explain_with(self, history, k, **options)

    def resolve(self, histories: Sequence[History], on_unknown: OnUnknown = "raise") -> Resolved:
        """Catalogue indices of histories, and the entries that the catalogue does not know (with "skip").

        Raises:
            ValueError: too many or too long histories, an entry that is not text, an unknown one (with "raise").
        """
        if on_unknown not in ("raise", "skip"):
            raise ValueError(f"on_unknown: expected 'raise' or 'skip', got {on_unknown!r}")
        if isinstance(histories, str) or not isinstance(histories, Sequence):
            raise ValueError(f"histories: expected a sequence of histories, got {type(histories).__name__}")
        if len(histories) > MAX_HISTORIES:
            raise ValueError(f"histories: expected at most {MAX_HISTORIES}, got {len(histories)}")
        resolved, unknown = [], []
        with self._lock:  # the catalogue makes its title tables at first use
            for position, history in enumerate(histories):
                indices, strangers = self._resolve_one(f"histories[{position}]", history, on_unknown)
                resolved.append(indices)
                unknown.append(strangers)
        return Resolved(resolved, unknown)

    def _resolve_one(self, name: str, history: History, on_unknown: OnUnknown) -> tuple[np.ndarray, list[str]]:
        size = len(self.processor.catalogue)
        if isinstance(history, str) or not isinstance(history, (Sequence, np.ndarray)):
            raise ValueError(
                f"{name}: expected a sequence of item ids or titles, got {type(history).__name__} {history!r:.80}"
            )
        if len(history) > MAX_ENTRIES:
            raise ValueError(f"{name}: expected at most {MAX_ENTRIES} entries, got {len(history)}")
        if isinstance(history, np.ndarray) and history.dtype.kind in "iu":
            if history.ndim != 1 or (history.size and not 0 <= history.min() <= history.max() < size):
                raise ValueError(f"{name}: expected indices 0..{size - 1} in one dimension, got {history!r:.200}")
            return history.astype(np.int64), []
        indices, strangers = [], []
        for place, entry in enumerate(history):
            if not isinstance(entry, str):
                raise ValueError(
                    f"{name}[{place}]: expected an item id or a title (str), got {type(entry).__name__} {entry!r:.80}"
                )
            try:
                indices.append(self._find(entry))
            except ValueError as error:
                if on_unknown == "raise":
                    raise ValueError(f"{name}[{place}]: {error}") from None
                strangers.append(entry)
        return np.array(indices, np.int64), strangers

    def _find(self, text: str) -> int:
        """Index of an id or title; ValueError with what comes near, for ids as for titles."""
        if len(text) > self._longest_text:  # near matches are searched in time quadratic in the length
            raise ValueError(f"expected an id or title of at most {self._longest_text} characters, got {len(text)}")
        catalogue = self.processor.catalogue
        try:
            return catalogue.find(text)[0]
        except ValueError as error:
            near = str(error).partition("; did you mean ")[2].rstrip("?")
        try:
            return catalogue.index(text)
        except ValueError as error:
            near = ", ".join(filter(None, [str(error).partition("; did you mean ")[2].rstrip("?"), near]))
        raise ValueError(
            f"{text!r} is no id and no title of the catalogue" + (f"; did you mean {near}?" if near else "")
        )

    @property
    def variant(self) -> str:
        """Of the model's thought: "flr", "latentr3", "anchor" or "none" (an unpatched model too)."""
        lm = causal_lm(self.model)
        return lm._flr_patch.config.variant if is_patched(lm) else "none"

    def check(self, k: int, num_beams: int, scoring: str) -> None:
        """ValueError unless these may be given to :meth:`recommend`."""
        for name, value, limit in (("k", k, MAX_K), ("num_beams", num_beams, MAX_BEAMS)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= limit:
                raise ValueError(f"{name}: expected an integer from 1 to {limit}, got {value!r}")
        resolve_scoring(scoring, self.processor.scoring)

    def ranked(
        self,
        histories: list[np.ndarray],
        k: int,
        num_beams: int,
        exclude_seen: bool,
        scoring: Scoring | Literal["auto"],
        shares: bool,
    ) -> tuple[list[list[Recommendation]], ThinkingPrompts | None]:
        """Recommendations for a few resolved histories, and their thoughts where shares were asked for and there are any."""
        if not histories:
            return [], None
        scoring = resolve_scoring(scoring, self.processor.scoring)
        exclude = None
        if exclude_seen:
            exclude = torch.full((len(histories), max(map(len, histories))), -1, dtype=torch.int64)
            for row, history in enumerate(histories):
                exclude[row, : len(history)] = torch.from_numpy(history)
        with self._lock, torch.inference_mode(), evaluating(self.model):
            inputs = self.processor(histories)
            mixed_with = None
            if self.processor.views is None:
                found = beam_search(
                    self.model, inputs, self.trie, max(num_beams, k), k, scoring=scoring, exclude=exclude
                )
                items, scores = found.items.cpu().numpy(), found.scores.cpu().numpy()
            else:
                items, scores, mixed_with = self._mixed(histories, k, max(num_beams, k), scoring, exclude)
                exclude = None  # struck out of the mixture, which is not normalised again
            prompts = think(self.model, inputs, reserve=self.trie.depth) if shares else None
            base = contributions = influence = None
            if prompts is not None:
                codec = self.processor.item_codec
                base, contributions = attribute(prompts, codec, items, self.trie, scoring, exclude, mixed_with)
                influence = influence_shares(contributions)
        catalogue = self.processor.catalogue
        lists = []
        for row, column_items in enumerate(items.tolist()):
            lists.append(
                [
                    Recommendation(
                        item_id=catalogue.item_ids[item],
                        title=catalogue.titles[item],
                        score=float(scores[row, column]),
                        index=item,
                        factor_shares=[] if influence is None else influence[row, column].tolist(),
                        contributions=[] if contributions is None else contributions[row, column].tolist(),
                        base_score=None if base is None else float(base[row, column]),
                    )
                    for column, item in enumerate(column_items)
                    if item >= 0
                ]
            )
        return lists, prompts

    def _mixed(
        self, histories: list[np.ndarray], k: int, num_beams: int, scoring: Scoring, exclude: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Items and scores [B, k] by the processor's views, and the logarithms of the whole prompt's weight and of the rest."""
        views, old = self.processor.views, self._mixture
        assert views is not None
        if old is None or (old.views, old.num_beams, old.scoring) != (views, num_beams, scoring):
            self._mixture = None  # its table may be large
            self._mixture = ViewMixture(
                self.model, self.processor, views, num_beams=num_beams, scoring=scoring, trie=self.trie
            )
        assert self._mixture is not None
        rows = CSR.from_rows(histories)
        probabilities = torch.from_numpy(self._mixture.scores(rows))
        if exclude is not None:
            row, column = (exclude >= 0).nonzero(as_tuple=True)
            probabilities[row, exclude[row, column]] = 0.0
        index = torch.arange(probabilities.shape[1])
        items = order_key(probabilities.log(), index).topk(min(k, len(index)), dim=1).indices
        chosen = probabilities.gather(1, items)
        alone = ViewMixture(
            self.model,
            self.processor,
            dataclasses.replace(views, weight=0.0),
            num_beams=num_beams,
            scoring=scoring,
            trie=self.trie,
        )
        whole = (
            torch.from_numpy(alone.scores(rows)).gather(1, items).double()
        )  # 0 for what its beam search did not give
        weight = torch.where(torch.from_numpy(rows.lengths > 0), 1.0 - views.weight, 1.0).double()[:, None]
        rest = (chosen.double() - weight * whole).clamp_min(0.0)
        log_weight = torch.where(whole > 0, weight, 0.0).log()
        found = torch.where(chosen > 0, items, -1)
        return found.numpy(), chosen.log().numpy(), (log_weight.numpy(), rest.log().numpy())
