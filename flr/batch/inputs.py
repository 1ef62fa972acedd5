"""Histories in Parquet: which files, which columns of them, and rows of one shard in small pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from flr.data.frames import find_column, holds_text
from flr.files import shown

from .storage import Place

_PIECE = 1024  # rows in memory as Arrow has them
_AT_ONCE = 16  # files that are looked at
#: Columns that filter, beside ``where.ATTRIBUTE``.
LISTS, SEEN, WHERE = ("allow", "deny"), "exclude_seen", "where."


class InputFile(NamedTuple):
    """A file of histories: where it is, its bytes and rows, and the digest by which it is known again."""

    url: str
    size: int
    rows: int
    sha256: str


def find_files(urls: Sequence[str]) -> list[Place]:
    """The Parquet files that paths, folders, patterns and URLs name, each sorted by name.

    In folders and patterns, names that begin with a dot or an underscore are passed over, as Spark and Arrow do, and
    those that do not end with .parquet.

    Raises:
        ValueError: nothing is there, or a file is named twice.
    """
    found: list[Place] = []
    for url in urls:
        place = Place.of(url, "histories")
        system, path = place
        if system.isfile(path):
            names = [path]
        else:
            inside = system.isdir(path)
            below = system.find(path) if inside else [name for name in system.glob(path) if system.isfile(name)]
            start = path.rstrip("/") if inside else re.split(r"[*?\[]", path)[0].rpartition("/")[0]
            parts = {name: name[len(start) + 1 :].split("/") for name in below}
            hidden = {name for name in below if any(part[:1] in (".", "_") for part in parts[name])}
            names = [name for name in below if name.endswith(".parquet") and name not in hidden]
        if not names:
            raise ValueError(f"histories: expected Parquet files at {url}, got none")
        found += [Place(system, name) for name in sorted(names)]
    url, times = Counter(map(str, found)).most_common(1)[0] if found else ("", 1)
    if times > 1:
        raise ValueError(f"histories: expected every file once, got {url} {times} times")
    return found


def look_at(places: Sequence[Place], user: str | None, history: str) -> tuple[list[InputFile], str]:
    """Size, rows and digest of every file, which is read once for it; and the name of the column of users.

    Raises:
        ValueError: no Parquet, a column that lacks or has another type, or files that do not have the same columns.
    """

    def look(place: Place) -> tuple[InputFile, dict[str, pa.DataType]]:
        with place.parquet() as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
        kinds = used_columns(schema, str(place), user, history)
        return InputFile(str(place), place.system.size(place.path), rows, place.sha256()), kinds

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked = list(pool.map(look, places))
    first = looked[0][1]
    for file, kinds in looked[1:]:
        if kinds != first:
            wanted = {name: str(kind) for name, kind in first.items()}
            got = {name: str(kind) for name, kind in kinds.items()}
            raise ValueError(f"{file.url}: expected the columns of {looked[0][0].url}, {wanted}, got {got}")
    return [file for file, _ in looked], next(iter(first))


def used_columns(schema: pa.Schema, name: str, user: str | None, history: str) -> dict[str, pa.DataType]:
    """Columns that are read and their types, that of the users first; errors as those of :func:`look_at`."""
    names = schema.names
    column = find_column(names, "user", user, name)
    if names.count(history) != 1:
        hint = "; a log with a row an event is grouped by user first" if "item_id" in names else ""
        raise ValueError(f"{name}: expected one column {history!r} of lists, got {shown(names)}{hint}")
    kinds = {column: schema.field(column).type, history: schema.field(history).type}
    for other in (*LISTS, SEEN, *(other for other in names if other.startswith(WHERE))):
        if other in names:
            kinds[other] = schema.field(other).type
    for other in (history, *LISTS):
        if other in kinds and not _holds_names(kinds[other]):
            raise ValueError(f"{name}: column {other!r}: expected lists of text or integers, got {kinds[other]}")
    if SEEN in kinds and not pa.types.is_boolean(kinds[SEEN]):
        raise ValueError(f"{name}: column {SEEN!r}: expected booleans, got {kinds[SEEN]}")
    for other, kind in kinds.items():
        if other.startswith(WHERE) and not _is_list(kind):
            raise ValueError(f"{name}: column {other!r}: expected lists of values, got {kind}")
    return kinds


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _holds_names(kind: pa.DataType) -> bool:
    return _is_list(kind) and (holds_text(kind.value_type) or pa.types.is_integer(kind.value_type))


def read_rows(file: pq.ParquetFile, first: int, last: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows first..last-1 of a file in pieces; row groups outside are not touched, and none is held whole."""
    begin = 0
    for group in range(file.metadata.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if begin < last and end > first:
            at = begin
            for piece in file.iter_batches(_PIECE, row_groups=[group], columns=list(columns)):
                low, high = max(first - at, 0), min(last - at, len(piece))
                if low < high:
                    yield piece.slice(low, high - low)
                at += len(piece)
                if at >= last:
                    break
        begin = end
