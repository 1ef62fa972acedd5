"""An interaction log and its items as Parquet files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flr.files import PathLike, read_parquet

from .catalogue import Catalogue
from .interactions import RecDataset
from .report import ReadReport
from .splits import InteractionLog, split_log, titled_catalogue

LOG_NAME, ITEMS_NAME = "interactions.parquet", "items.parquet"
_PLAIN = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
_ALIASES = {"user": ("user", "user_id"), "item": ("item", "item_id"), "timestamp": ("timestamp", "time")}


def read_parquet_log(
    path: PathLike,
    items: PathLike | None = None,
    *,
    split: str = "time",
    max_history: int = 10,
    min_interactions: int = 1,
    max_bad_share: float = 0.01,
    name: str | None = None,
) -> RecDataset:
    """Read a log with columns user, item and, for ``split="time"``, timestamp (also user_id, item_id, time).

    ``path`` is the log or a folder with interactions.parquet and, where there is one, items.parquet: columns item,
    title, sid (text or a list of codes), others (numbers, bools, text) become attributes of the catalogue. Ids may be
    text or integers. Timestamps are numbers in any unit, or Parquet timestamps (kept as seconds). A row with a null or
    a NaN is malformed; its line is the row's number from 1. ``split="leave_one_out"`` **leaks the future** (see
    :func:`flr.data.splits.split_log`).
    """
    file, items_file = Path(path), None if items is None else Path(items)
    if file.is_dir():
        if items_file is None and (file / ITEMS_NAME).is_file():
            items_file = file / ITEMS_NAME
        file = file / LOG_NAME
    table = read_parquet(file, {})
    report = ReadReport(source=str(file), rows_read=table.num_rows)
    columns: dict[str, pa.Array] = {name: _ids(table, name, file) for name in ("user", "item")}
    times, scale = _times(table, file)
    if times is not None:
        columns["timestamp"] = times
    bad = np.zeros(table.num_rows, bool)
    for column, values in columns.items():
        missing = _missing(values)
        for row in np.flatnonzero(missing & ~bad).tolist():
            report.add_bad(file.name, row + 1, f"{column}: expected a value, got null or nothing")
        bad |= missing
    report.check(max_bad_share)
    good = np.flatnonzero(~bad)
    user_codes, user_names = _codes(columns["user"], good)
    item_codes, item_ids = _codes(columns["item"], good)
    moments = None if times is None else times.to_numpy(zero_copy_only=False)[good].astype(np.float64)
    log = InteractionLog(user_names, item_ids, user_codes, item_codes, moments)
    name = name or (file.parent.name if file.name == LOG_NAME else file.stem)
    describe = partial(_catalogue, file=items_file, report=report)
    return split_log(log, split, max_history, min_interactions, name, report, describe, scale)


def _column(table: pa.Table, name: str) -> str | None:
    return next((alias for alias in _ALIASES[name] if alias in table.column_names), None)


def _ids(table: pa.Table, name: str, file: Path) -> pa.Array:
    column = _column(table, name)
    if column is None:
        raise ValueError(f"{file}: expected a column {' or '.join(_ALIASES[name])}, got {table.column_names}")
    values = _flat(table[column])
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_integer(values.type) or _is_text(values.type)):
        raise ValueError(f"{file}: column {column!r}: expected text or integers, got {values.type}")
    return values.cast(pa.string())


def _times(table: pa.Table, file: Path) -> tuple[pa.Array | None, float]:
    """Times as int64 or float64 and the seconds that one unit is worth (1 where the unit is not known)."""
    column = _column(table, "timestamp")
    if column is None:
        return None, 1.0
    values = _flat(table[column])
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), 1e-6
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ValueError(f"{file}: column {column!r}: expected numbers or timestamps, got {values.type}")
    return values, 1.0


def _missing(values: pa.Array) -> np.ndarray:
    missing = pc.is_null(values, nan_is_null=True)
    if pa.types.is_string(values.type):
        missing = pc.or_(missing, pc.fill_null(pc.equal(values, ""), True))
    elif pa.types.is_floating(values.type):
        missing = pc.or_(missing, pc.invert(pc.fill_null(pc.is_finite(values), True)))
    return missing.to_numpy(zero_copy_only=False).astype(bool)


def _codes(values: pa.Array, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers in order of first appearance, int64 [rows], and the texts that they stand for."""
    encoded = values.take(pa.array(rows)).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _catalogue(item_ids: list[str], file: Path | None, report: ReadReport) -> Catalogue:
    if file is None:
        return titled_catalogue(item_ids, {}, report)
    table = read_parquet(file, {})
    ids = _ids(table, "item", file).to_pylist()
    place = {item: row for row, item in enumerate(ids)}
    if len(place) != len(ids) or None in place:
        raise ValueError(f"{file}: expected different ids, one an item, got repeated or null ones")
    titles: dict[str, str] = {}
    if "title" in table.column_names:
        kind = table.schema.field("title").type
        if not _is_text(kind):
            raise ValueError(f"{file}: column 'title': expected text, got {kind}")
        titles = {item: title or "" for item, title in zip(ids, table["title"].to_pylist(), strict=True)}
    described = titled_catalogue(item_ids, titles, report)
    unknown = [item for item in item_ids if item not in place]
    if unknown:
        lacking = f"{len(unknown)} items of the log are not in {file.name} (as {unknown[0]!r})"
        report.notes.append(f"{lacking}: no sid, no attributes")
        return described
    rows = pa.array([place[item] for item in item_ids])
    sids: list[tuple[str, ...]] | None = None
    attributes: dict[str, Any] = {}
    for column in table.column_names:
        if column == "title" or column in _ALIASES["item"]:
            continue
        values = _flat(table[column]).take(rows)
        if column == "sid":
            if values.null_count:
                raise ValueError(f"{file}: column 'sid': expected one for every item, got {values.null_count} nulls")
            sids = [(sid,) if isinstance(sid, str) else tuple(sid) for sid in values.to_pylist()]
        elif values.null_count == 0 and any(test(values.type) for test in _PLAIN):
            listed = values.to_pylist()
            attributes[column] = np.array(listed, str) if isinstance(listed[0], str) else np.array(listed)
        else:
            left_out = f"column {column!r} ({values.type}, {values.null_count} nulls)"
            report.notes.append(f"{file.name}: {left_out} is left out")
    return Catalogue(described.item_ids, described.titles, sids, attributes)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
