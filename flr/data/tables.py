"""An interaction log and its items as tables: Parquet files, or frames in memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from flr.files import PathLike, read_parquet

from .catalogue import Catalogue
from .events import read_events
from .frames import ALIASES, as_table, find_column, has_column, id_column, is_text, kind_of, pick, plain_array
from .interactions import RecDataset
from .report import ReadReport
from .splits import split_log, titled_catalogue

LOG_NAME, ITEMS_NAME = "interactions.parquet", "items.parquet"


def read_tables(
    log: PathLike | Any,
    items: PathLike | Any = None,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    title: str | None = None,
    split: str = "time",
    max_history: int = 10,
    min_interactions: int = 1,
    max_bad_share: float = 0.01,
    name: str | None = None,
) -> RecDataset:
    """Read a log, one row an event, and a table of its items.

    Ids may be text or integers. Times are numbers in any unit, dates or timestamps (kept as seconds; without a zone
    they are UTC). A row with a null or a NaN is malformed; its line is the row's number from 1.

    Args:
        log: a Parquet file, a folder with interactions.parquet and, where there is one, items.parquet, or a frame
            (pandas, polars, pyarrow, ``datasets.Dataset``; see :mod:`flr.data.frames`).
        items: a Parquet file or a frame with a column of ids; a title, a sid (text or a list of codes) and others
            (numbers, bools, text), which become attributes of the catalogue, may be there.
        user, item, time: columns of the log; None for "user_id" or "user", "item_id" or "item", "timestamp" or "time".
            ``item`` is looked for among the items' columns too.
        title: column of the items; None for "title".
        split: "time" or "leave_one_out", which **leaks the future** (see :func:`flr.data.splits.split_log`).
        max_history: items of a history, at least 1.
        min_interactions: k of the k-core filter over users and items.
        max_bad_share: malformed rows allowed, 0..1.
        name: of the data set; by default of the file, or the kind of the frame.
    """
    if isinstance(log, (str, os.PathLike)):
        file = Path(log)
        if file.is_dir():
            if items is None and (file / ITEMS_NAME).is_file():
                items = file / ITEMS_NAME
            file = file / LOG_NAME
        table, source, shown = read_parquet(file, {}), str(file), file.name
        name = name or (file.parent.name if file.name == LOG_NAME else file.stem)
    else:
        table = pick(log, "log", user=user, item=item, time=time)
        source = shown = "log"
        name = name or kind_of(log)
    report = ReadReport(source=source)
    columns = {"user": user, "item": item, "time": time}
    events = read_events(table, report, source, shown=shown, max_bad_share=max_bad_share, **columns)
    describe = partial(_catalogue, items=items, item=item, title=title, report=report)
    return split_log(events, split, max_history, min_interactions, name, report, describe)


def _catalogue(
    item_ids: list[str], items: PathLike | Any, item: str | None, title: str | None, report: ReadReport
) -> Catalogue:
    """The items of ``item_ids`` as the table ``items`` describes them; without one, or past it, ids are the titles."""
    if items is None:
        return titled_catalogue(item_ids, {}, report)
    is_file = isinstance(items, (str, os.PathLike))
    source, shown = (str(items), Path(items).name) if is_file else ("items", "items")
    table = read_parquet(items, {}) if is_file else as_table(items, source)
    names = table.column_names
    columns = {"item": find_column(names, "item", item if item in names else None, source)}
    for role, asked in (("title", title), ("sid", None)):
        if has_column(names, role, asked):
            columns[role] = find_column(names, role, asked, source)
    ids = id_column(table, columns["item"], source).to_pylist()
    place = {item_id: row for row, item_id in enumerate(ids)}
    if len(place) != len(ids) or None in place:
        raise ValueError(f"{source}: expected different ids, one an item, got repeated or null ones")
    titles: dict[str, str] = {}
    if "title" in columns:
        kind = table.schema.field(columns["title"]).type
        if not is_text(getattr(kind, "value_type", kind)):
            raise ValueError(f"{source}: column {columns['title']!r}: expected text, got {kind}")
        listed = table[columns["title"]].to_pylist()
        titles = {item_id: text or "" for item_id, text in zip(ids, listed, strict=True)}
    described = titled_catalogue(item_ids, titles, report)
    unknown = [item_id for item_id in item_ids if item_id not in place]
    if unknown:
        lacking = f"{len(unknown)} items of the log are not in {shown} (as {unknown[0]!r})"
        report.notes.append(f"{lacking}: no sid, no attributes")
        return described
    chosen = table.take(pa.array([place[item_id] for item_id in item_ids]))
    attributes = []
    for column in names:
        if column in columns.values() or column in ALIASES["item"]:
            continue
        if names.count(column) == 1 and plain_array(chosen[column]) is not None:
            attributes.append(column)
            continue
        kind = chosen.schema.field(column).type if names.count(column) == 1 else f"{names.count(column)} of that name"
        report.notes.append(f"{shown}: column {column!r} ({kind}) is left out")
    return Catalogue.from_table(chosen, columns, attributes, source)
