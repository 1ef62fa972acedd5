"""From names to catalogue indices and filters: what a user asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from flr.config import MAX_BEAMS, MAX_ENTRIES, MAX_K
from flr.data import RecProcessor
from flr.decode.scoring import resolve_scoring

OnUnknown = Literal["raise", "skip"]
#: One user: item ids or titles, oldest first; or an integer array of catalogue indices.
History: TypeAlias = "Sequence[str] | np.ndarray"
#: Values that an item's attribute may have, by the attribute's name in the catalogue.
Where: TypeAlias = "Mapping[str, Iterable[Any]]"
MAX_HISTORIES = 10_000
_MIN_TEXT = 500  # an entry may always be this long; else as long as the catalogue's longest id or title


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


class QueryBuilder:
    """Names to catalogue indices and filters, by the catalogue of a processor."""

    def __init__(self, processor: RecProcessor) -> None:
        self.processor = processor
        catalogue = processor.catalogue
        longest = (max(map(len, texts), default=0) for texts in (catalogue.item_ids, catalogue.titles))
        self._longest_text = max(_MIN_TEXT, *longest)

    def resolve(
        self, histories: Sequence[History], on_unknown: OnUnknown = "raise", *, suggest: bool = True
    ) -> Resolved:
        """Catalogue indices of histories, and the entries that the catalogue does not know (with "skip").

        Args:
            histories, on_unknown: as for :meth:`flr.Recommender.recommend`.
            suggest: name near matches of an unknown entry in the error; that takes seconds in a catalogue of a million.

        Raises:
            ValueError: too many or too long histories, an entry that is not text, an unknown one (with "raise").
        """
        if isinstance(histories, str) or not isinstance(histories, Sequence):
            raise ValueError(f"histories: expected a sequence of histories, got {type(histories).__name__}")
        if len(histories) > MAX_HISTORIES:
            raise ValueError(f"histories: expected at most {MAX_HISTORIES}, got {len(histories)}")
        rows = [self.names(f"histories[{i}]", x, on_unknown, suggest=suggest) for i, x in enumerate(histories)]
        return Resolved([indices for indices, _ in rows], [unknown for _, unknown in rows])

    def names(
        self, name: str, history: History, on_unknown: OnUnknown = "raise", *, every: bool = False, suggest: bool = True
    ) -> tuple[np.ndarray, list[str]]:
        """Indices int64 [M] of ids and titles, and those skipped; ``name`` is what errors call the argument.

        A title that several items share gives the first of them, with ``every`` all of them, and every item once.
        Errors as :meth:`resolve`.
        """
        if on_unknown not in ("raise", "skip"):
            raise ValueError(f"on_unknown: expected 'raise' or 'skip', got {on_unknown!r}")
        catalogue, size = self.processor.catalogue, len(self.processor.catalogue)
        if isinstance(history, str) or not isinstance(history, (Sequence, np.ndarray)) or _is_one(history):
            raise ValueError(f"{name}: expected a sequence of item ids or titles, got {_typed(history)}")
        if len(history) > MAX_ENTRIES:
            raise ValueError(f"{name}: expected at most {MAX_ENTRIES} entries, got {len(history)}")
        if isinstance(history, np.ndarray) and history.dtype.kind in "iu":
            if history.ndim != 1 or (history.size and not 0 <= history.min() <= history.max() < size):
                raise ValueError(f"{name}: expected indices 0..{size - 1} in one dimension, got {history!r:.200}")
            return history.astype(np.int64), []
        indices: list[int] = []
        unknown: list[str] = []
        asked: set[str] = set()  # with ``every``, since thousands of items may share a title that is given many times,
        chosen: set[int] = set()  # in whatever letters
        for place, entry in enumerate(history):
            if not isinstance(entry, str):
                raise ValueError(f"{name}[{place}]: expected an item id or a title (str), got {_typed(entry)}")
            if len(entry) > self._longest_text:  # near matches are searched in time quadratic in the length
                most = f"an id or title of at most {self._longest_text} characters"
                raise ValueError(f"{name}[{place}]: expected {most}, got {len(entry)}")
            if entry in asked:
                continue
            matches = catalogue.lookup(entry)
            indices += [match for match in matches if match not in chosen] if every else matches[:1]
            if every and matches:
                asked.add(entry)
                chosen.update(matches)
            if not matches:
                if on_unknown == "raise":
                    near = catalogue.suggest(entry) if suggest else ""
                    raise ValueError(f"{name}[{place}]: {entry!r} is no id and no title of the catalogue{near}")
                unknown.append(entry)
        return np.array(indices, np.int64), unknown

    def selection(
        self,
        allow: History | None = None,
        deny: History = (),
        where: Where | None = None,
        on_unknown: OnUnknown = "raise",
        *,
        suggest: bool = True,
    ) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
        """Which items may be given, bool [C] or None for all; indices of those that may not; unknown entries of both.

        Arguments and errors are those of :meth:`resolve`; an attribute that the catalogue lacks, or values of another
        type, raise ValueError.
        """
        if where is not None and not isinstance(where, Mapping):
            raise ValueError(f"where: expected attributes with lists of values (a dict), got {_typed(where)}")
        denied, unknown = self.names("deny", deny, on_unknown, every=True, suggest=suggest)
        allowed = None
        if allow is not None:
            listed, not_listed = self.names("allow", allow, on_unknown, every=True, suggest=suggest)
            unknown = not_listed + unknown
            allowed = np.zeros(len(self.processor.catalogue), bool)
            allowed[listed] = True
        for attribute, values in (where or {}).items():
            matching = self._having(attribute, values)
            allowed = matching if allowed is None else allowed & matching
        return allowed, denied, unknown

    def _having(self, name: str, values: Iterable[Any]) -> np.ndarray:
        """bool [C]: which items have one of the values."""
        attributes = self.processor.catalogue.attributes
        column = attributes.get(name)
        if column is None:
            known = ", ".join(map(repr, attributes)) or "none"
            raise ValueError(f"where: expected attributes of the catalogue ({known}), got {name!r}")
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable) or _is_one(values):
            raise ValueError(f"where[{name!r}]: expected a list of values, got {values!r:.80}")
        wanted = list(values)
        if len(wanted) > MAX_ENTRIES:
            raise ValueError(f"where[{name!r}]: expected at most {MAX_ENTRIES} values, got {len(wanted)}")
        types: tuple[type, ...] = {"T": (str,), "b": (bool, np.bool_)}.get(
            column.dtype.kind, (int, float, np.integer, np.floating)
        )
        for value in wanted:
            if not isinstance(value, types) or (isinstance(value, bool) and column.dtype.kind != "b"):
                raise ValueError(f"where[{name!r}]: expected values of type {types[0].__name__}, got {value!r:.80}")
        if column.dtype.kind in "iuf":  # a number of any size compares as a float, exact to 2^53
            return np.isin(column.astype(np.float64), np.array([float(min(max(x, -1e300), 1e300)) for x in wanted]))
        if column.dtype.kind == "b":
            return np.array([False in wanted, True in wanted])[column.view(np.int8)]
        return self.processor.catalogue.having_text(name, wanted)

    @staticmethod
    def query(
        history: np.ndarray,
        k: int,
        exclude_seen: bool = False,
        allowed: np.ndarray | None = None,
        denied: np.ndarray | None = None,
    ) -> Query:
        """A query from what :meth:`resolve` and :meth:`selection` gave."""
        check_flag("exclude_seen", exclude_seen)
        parts = [part for part in (denied, history if exclude_seen else None) if part is not None]
        return Query(history, k, np.concatenate([np.zeros(0, np.int64), *parts]), allowed)

    def check(self, k: int, num_beams: int, scoring: str) -> None:
        """Raise ValueError unless these may be given to :meth:`flr.Recommender.recommend`."""
        for name, value, limit in (("k", k, MAX_K), ("num_beams", num_beams, MAX_BEAMS)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= limit:
                raise ValueError(f"{name}: expected an integer from 1 to {limit}, got {value!r}")
        resolve_scoring(scoring, self.processor.scoring)


def check_flag(name: str, value: object) -> None:
    """ValueError unless it is True or False: "no" would count as yes."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r:.80}")


def _is_one(values: object) -> bool:
    """Whether it is an array without dimensions."""
    return isinstance(values, np.ndarray) and values.ndim == 0


def _typed(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"


def exclusions(queries: Sequence[Query]) -> torch.Tensor | None:
    """int64 [B, E] padded with -1; None where no query excludes anything."""
    rows = [torch.from_numpy(query.exclude) for query in queries]
    return pad_sequence(rows, batch_first=True, padding_value=-1) if any(map(len, rows)) else None


def allowances(queries: Sequence[Query]) -> torch.Tensor | None:
    """bool [C] where all queries share one mask, else [B, C]; None where no query has one."""
    masks = [query.allowed for query in queries]
    some = next((mask for mask in masks if mask is not None), None)
    if some is None or all(mask is some for mask in masks):
        return None if some is None else torch.from_numpy(some)
    return torch.from_numpy(np.stack([np.ones_like(some) if mask is None else mask for mask in masks]))
