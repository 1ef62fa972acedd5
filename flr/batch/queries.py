"""Rows of histories and filters as queries, with masks only for those that are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from flr.recommend.query import OnUnknown, Query, QueryBuilder

from .inputs import LISTS, SEEN, WHERE
from .settings import BatchSettings

_MASKS = 64  # different attribute filters that are kept


class Asked(NamedTuple):
    """A row: catalogue indices int64 of history, allow-list (None for all) and deny-list, attribute filters, and how
    many names the catalogue did not know."""

    history: np.ndarray
    allow: np.ndarray | None
    deny: np.ndarray
    where: tuple[tuple[str, tuple[Any, ...]], ...]
    exclude_seen: bool
    unknown: int


class RowReader:
    """Reads rows and makes queries of them.

    Args:
        builder: of the model's catalogue.
        settings: of the run.
    """

    def __init__(self, builder: QueryBuilder, settings: BatchSettings) -> None:
        self._builder, self._settings = builder, settings
        self._having = lru_cache(_MASKS)(self._attributes)

    def check(self, columns: Sequence[str]) -> None:
        """ValueError where a column filters by an attribute that the catalogue lacks."""
        known = list(self._builder.processor.catalogue.attributes)
        for column in columns:
            if column.startswith(WHERE) and column.removeprefix(WHERE) not in known:
                wanted = f"one of the catalogue's attributes ({', '.join(known) or 'none'}) after {WHERE!r}"
                raise ValueError(f"histories: column {column!r}: expected {wanted}")

    def read(self, piece: pa.RecordBatch, name: str, first: int) -> Iterator[Asked]:
        """The rows of a piece; ``first`` is the number of its first row in the file ``name``, from 0.

        Raises:
            ValueError: a null, a name that the catalogue lacks, a filter's value of another type; names file and row.
        """
        history = self._settings.history
        lists = {column: _names(piece.column(column)) for column in (history, *LISTS) if column in piece.schema.names}
        seen = piece.column(SEEN).to_pylist() if SEEN in piece.schema.names else [None] * len(piece)
        filters = {
            c.removeprefix(WHERE): piece.column(c).to_pylist() for c in piece.schema.names if c.startswith(WHERE)
        }
        for row in range(len(piece)):
            where = {attribute: values[row] for attribute, values in filters.items() if values[row] is not None}
            given = {column: values[row] for column, values in lists.items()}
            try:
                yield self._asked(given, where, seen[row])
            except ValueError as error:
                raise ValueError(f"{name}: row {first + row}: {error}") from None

    def _asked(self, given: dict[str, list[str] | None], where: dict[str, list[Any]], seen: bool | None) -> Asked:
        unknown, indices = 0, {}
        for column, names in given.items():
            filters = column != self._settings.history
            if names is None and not filters:
                raise ValueError(f"{column}: expected a list, got null")
            if names is None:
                continue
            on_unknown: OnUnknown = self._settings.on_unknown  # type: ignore[assignment]
            found, skipped = self._builder.names(column, names, on_unknown, every=filters, suggest=False)
            indices[column], unknown = found, unknown + len(skipped)
        wanted = tuple((attribute, tuple(values)) for attribute, values in where.items())
        if wanted:
            self._having(wanted)  # an unusable value is told now, with its row
        exclude = self._settings.exclude_seen if seen is None else seen
        nothing = np.zeros(0, np.int64)
        allow, deny = indices.get("allow"), indices.get("deny", nothing)
        return Asked(indices[self._settings.history], allow, deny, wanted, exclude, unknown)

    def query(self, asked: Asked) -> Query:
        """The query of a row."""
        allowed = self._having(asked.where) if asked.where else None
        if asked.allow is not None:
            listed = np.zeros(len(self._builder.processor.catalogue), bool)
            listed[asked.allow] = True
            allowed = listed if allowed is None else allowed & listed
        return self._builder.query(asked.history, self._settings.k, asked.exclude_seen, allowed, asked.deny)

    def _attributes(self, where: tuple[tuple[str, tuple[Any, ...]], ...]) -> np.ndarray | None:
        """bool [C]: items with one of the values of each attribute."""
        return self._builder.selection(where=dict(where))[0]


def _names(column: pa.Array) -> list[list[str] | None]:
    """Lists of text or integers as lists of text."""
    return column.cast(pa.large_list(pa.large_string())).to_pylist()
