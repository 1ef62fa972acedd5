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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from flr.data import CSR, RecProcessor
from flr.decode import CatalogueTrie, Scoring, beam_search
from flr.decode.mixture import ViewMixture
from flr.decode.scoring import resolve_scoring
from flr.explain.attribution import ThinkingPrompts, attribute, influence_shares, think
from flr.model.backbone import causal_lm, evaluating
from flr.model.checkpoint import from_pretrained
from flr.model.patch import is_patched
from flr_kernels.order import order_key

if TYPE_CHECKING:
    from flr.explain.interest import Explanation

logger = logging.getLogger("flr")

OnUnknown = Literal["raise", "skip"]
#: One user: item ids or titles, oldest first; or an integer array of catalogue indices.
History: TypeAlias = "Sequence[str] | np.ndarray"
#: Values that an item's attribute may have, by the attribute's name in the catalogue.
Where: TypeAlias = "Mapping[str, Iterable[Any]]"

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


@dataclass(frozen=True, eq=False)
class Query:
    """What one user asks for, in catalogue indices.

    Attributes:
        history: int64 [M], oldest first.
        k: items wanted.
        exclude: int64 [E], items that may not be given; repeats do no harm.
        allowed: bool [C], items that may be given; None for all.
    """

    history: np.ndarray
    k: int
    exclude: np.ndarray
    allowed: np.ndarray | None = None


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
        allow: History | None = None,
        deny: History = (),
        where: Where | None = None,
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
            allow: ids, titles or indices of the items that may be recommended, up to 10,000; None for all. A title stands for every
                item that bears it.
            deny: those that may not, in the same forms.
            where: {attribute of the catalogue: values}: only items whose attribute has one of the values.
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
        allowed, denied, strangers = self.selection(allow, deny, where, on_unknown)
        skipped = sum(map(len, unknown)) + len(strangers)
        if skipped:
            logger.warning("recommend: skipped %d entries that are not in the catalogue", skipped)
        queries = [self.query(history, k, exclude_seen, allowed, denied) for history in resolved]
        num_beams = max(num_beams, k)
        part = self.rows_at_once(num_beams)
        found: list[list[Recommendation]] = []
        with self._lock:
            for first in range(0, len(queries), part):
                found += self.ranked(queries[first : first + part], num_beams, scoring, shares)[0]
        return found

    def rows_at_once(self, num_beams: int) -> int:
        """How many queries :meth:`ranked` may be given, so that its logits stay within bounds; at least 1."""
        part = min(_MAX_USERS, _MAX_LOGITS // (num_beams * self._vocabulary))
        if self.processor.views is not None:
            part = min(part, _MAX_LOGITS // self.trie.num_items)
        return max(1, part)

    def explain(self, history: History, k: int = 5, **options: Any) -> Explanation:
        """Recommendations for one history and what the factors attended to: :func:`flr.explain.explain` with this recommender.

        ``options`` as for :meth:`recommend` (num_beams, exclude_seen, scoring, on_unknown).
        """
        from flr.explain.interest import explain_with

        return explain_with(self, history, k, **options)

    def resolve(
        self, histories: Sequence[History], on_unknown: OnUnknown = "raise", *, suggest: bool = True
    ) -> Resolved:
        """Catalogue indices of histories, and the entries that the catalogue does not know (with "skip").

        Args:
            histories, on_unknown: as for :meth:`recommend`.
            suggest: name near matches of an unknown entry in the error; the search takes up to a second in a large catalogue.

        Raises:
            ValueError: too many or too long histories, an entry that is not text, an unknown one (with "raise").
        """
        if isinstance(histories, str) or not isinstance(histories, Sequence):
            raise ValueError(f"histories: expected a sequence of histories, got {type(histories).__name__}")
        if len(histories) > MAX_HISTORIES:
            raise ValueError(f"histories: expected at most {MAX_HISTORIES}, got {len(histories)}")
        found = [self.names(f"histories[{i}]", x, on_unknown, suggest=suggest) for i, x in enumerate(histories)]
        return Resolved([indices for indices, _ in found], [strangers for _, strangers in found])

    def names(
        self, name: str, history: History, on_unknown: OnUnknown = "raise", *, every: bool = False, suggest: bool = True
    ) -> tuple[np.ndarray, list[str]]:
        """Indices int64 [M] of ids and titles, and those skipped; ``name`` is what errors call the argument.

        A title that several items share gives the first of them, with ``every`` all of them. Errors as :meth:`resolve`.
        """
        if on_unknown not in ("raise", "skip"):
            raise ValueError(f"on_unknown: expected 'raise' or 'skip', got {on_unknown!r}")
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
        indices: list[int] = []
        strangers: list[str] = []
        for place, entry in enumerate(history):
            if not isinstance(entry, str):
                raise ValueError(
                    f"{name}[{place}]: expected an item id or a title (str), got {type(entry).__name__} {entry!r:.80}"
                )
            if len(entry) > self._longest_text:  # near matches are searched in time quadratic in the length
                raise ValueError(
                    f"{name}[{place}]: expected an id or title of at most {self._longest_text} characters, got {len(entry)}"
                )
            found = self.processor.catalogue.lookup(entry)
            indices += found if every else found[:1]
            if not found:
                if on_unknown == "raise":
                    near = self.processor.catalogue.suggest(entry) if suggest else ""
                    raise ValueError(f"{name}[{place}]: {entry!r} is no id and no title of the catalogue{near}")
                strangers.append(entry)
        return np.array(indices, np.int64), strangers

    def selection(
        self,
        allow: History | None = None,
        deny: History = (),
        where: Where | None = None,
        on_unknown: OnUnknown = "raise",
        *,
        suggest: bool = True,
    ) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
        """Which items may be given: bool [C] or None for all, indices of those that may not, and the unknown entries of both.

        Arguments and errors as for :meth:`recommend`; an attribute that the catalogue lacks, or values of another type, raise ValueError.
        """
        denied, unknown = self.names("deny", deny, on_unknown, every=True, suggest=suggest)
        allowed = None
        if allow is not None:
            listed, strangers = self.names("allow", allow, on_unknown, every=True, suggest=suggest)
            unknown = strangers + unknown
            allowed = np.zeros(len(self.processor.catalogue), bool)
            allowed[listed] = True
        for attribute_name, values in (where or {}).items():
            matching = self._having(attribute_name, values)
            allowed = matching if allowed is None else allowed & matching
        return allowed, denied, unknown

    def _having(self, name: str, values: Iterable[Any]) -> np.ndarray:
        column = self.processor.catalogue.attributes.get(name)
        if column is None:
            known = ", ".join(map(repr, self.processor.catalogue.attributes)) or "none"
            raise ValueError(f"where: expected attributes of the catalogue ({known}), got {name!r}")
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise ValueError(f"where[{name!r}]: expected a list of values, got {values!r:.80}")
        wanted = list(values)
        if len(wanted) > MAX_ENTRIES:
            raise ValueError(f"where[{name!r}]: expected at most {MAX_ENTRIES} values, got {len(wanted)}")
        types: tuple[type, ...] = {"U": (str,), "b": (bool, np.bool_)}.get(column.dtype.kind, (int, float, np.number))
        for value in wanted:
            if not isinstance(value, types) or (isinstance(value, bool) and column.dtype.kind != "b"):
                raise ValueError(f"where[{name!r}]: expected values of type {types[0].__name__}, got {value!r:.80}")
        if column.dtype.kind in "iuf":  # a number of any size compares as a float, exact to 2^53
            return np.isin(column.astype(np.float64), np.array([float(min(max(x, -1e300), 1e300)) for x in wanted]))
        return np.isin(column, np.array(wanted, column.dtype.kind))

    @staticmethod
    def query(
        history: np.ndarray,
        k: int,
        exclude_seen: bool = False,
        allowed: np.ndarray | None = None,
        denied: np.ndarray | None = None,
    ) -> Query:
        """A query from what :meth:`resolve` and :meth:`selection` gave."""
        parts = [part for part in (denied, history if exclude_seen else None) if part is not None]
        return Query(history, k, np.concatenate([np.zeros(0, np.int64), *parts]), allowed)

    @property
    def variant(self) -> str:
        """Of the model's thought: "flr", "latentr3", "anchor" or "none" (an unpatched model too)."""
        lm = causal_lm(self.model)
        return lm._flr_patch.config.variant if is_patched(lm) else "none"

    @property
    def num_factors(self) -> int:
        """K; 0 for variants without factors."""
        lm = causal_lm(self.model)
        return lm._flr_patch.config.num_factors if self.variant in ("flr", "latentr3") else 0

    def check(self, k: int, num_beams: int, scoring: str) -> None:
        """ValueError unless these may be given to :meth:`recommend`."""
        for name, value, limit in (("k", k, MAX_K), ("num_beams", num_beams, MAX_BEAMS)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= limit:
                raise ValueError(f"{name}: expected an integer from 1 to {limit}, got {value!r}")
        resolve_scoring(scoring, self.processor.scoring)

    def ranked(
        self, queries: Sequence[Query], num_beams: int, scoring: Scoring | Literal["auto"], shares: bool
    ) -> tuple[list[list[Recommendation]], ThinkingPrompts | None]:
        """Answers to a few queries, computed together, and their thoughts where shares were asked for and there are any.

        The answer to a query does not depend on the others beyond rounding: beams are ``num_beams`` (>= each k) for all, and the
        best k of a search for more are those of a search for k.

        Args:
            queries: at most ``rows_at_once(num_beams)`` to stay within memory.
            num_beams, scoring, shares: as for :meth:`recommend`.
        """
        if not queries:
            return [], None
        histories = [query.history for query in queries]
        k = max(query.k for query in queries)
        if num_beams < k:
            raise ValueError(f"num_beams: expected at least the largest k, {k}, got {num_beams}")
        exclude, allowed = _exclusions(queries), _allowances(queries)
        scoring = resolve_scoring(scoring, self.processor.scoring)
        with self._lock, torch.inference_mode(), evaluating(self.model):
            inputs = self.processor(histories)
            mixed_with = None
            if self.processor.views is None:
                found = beam_search(
                    self.model, inputs, self.trie, num_beams, k, scoring=scoring, allowed=allowed, exclude=exclude
                )
                items, scores = found.items.cpu().numpy(), found.scores.cpu().numpy()
            else:
                items, scores, mixed_with = self._mixed(histories, k, num_beams, scoring, exclude, allowed)
                exclude = allowed = None  # struck out of the mixture, which is not normalised again
            wanted = np.array([[query.k] for query in queries])
            items = np.where(np.arange(items.shape[1]) < wanted, items, -1)
            prompts = think(self.model, inputs, reserve=self.trie.depth) if shares else None
            base = contributions = influence = None
            if prompts is not None:
                codec = self.processor.item_codec
                base, contributions = attribute(prompts, codec, items, self.trie, scoring, exclude, allowed, mixed_with)
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
        self,
        histories: list[np.ndarray],
        k: int,
        num_beams: int,
        scoring: Scoring,
        exclude: torch.Tensor | None,
        allowed: torch.Tensor | None,
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
        if allowed is not None:
            probabilities.masked_fill_(~allowed, 0.0)
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


def _exclusions(queries: Sequence[Query]) -> torch.Tensor | None:
    """int64 [B, E] padded with -1; None where no query excludes anything."""
    longest = max(len(query.exclude) for query in queries)
    if longest == 0:
        return None
    exclude = torch.full((len(queries), longest), -1, dtype=torch.int64)
    for row, query in enumerate(queries):
        exclude[row, : len(query.exclude)] = torch.from_numpy(query.exclude)
    return exclude


def _allowances(queries: Sequence[Query]) -> torch.Tensor | None:
    """bool [C] where all queries share one mask, else [B, C]; None where no query has one."""
    masks = [query.allowed for query in queries]
    some = next((mask for mask in masks if mask is not None), None)
    if some is None:
        return None
    if all(mask is some for mask in masks):
        return torch.from_numpy(some)
    return torch.from_numpy(np.stack([np.ones_like(some) if mask is None else mask for mask in masks]))
