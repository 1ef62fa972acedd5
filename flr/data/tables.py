"""An interaction log and its items as tables: Parquet files, or frames in memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from flr.files import PathLike, check_regular, read_parquet
from flr.files import shown as in_short

from .catalogue import Catalogue
from .events import read_events
from .frames import (
    ALIASES,
    as_table,
    find_column,
    has_column,
    holds_text,
    id_column,
    kind_of,
    pick,
    plain_array,
    without_views,
)
from .report import ReadReport
from .sources import SourceFile
from .splits import titled_catalogue
from .text_log import RawLog, Request, described, titles_of

LOG_NAME, ITEMS_NAME = "interactions.parquet", "items.parquet"


def read_tables(log: PathLike | Any, request: Request) -> RawLog:
    """Events of a log, one row an event, and a table of its items.

    Ids may be text or integers. Times are numbers in any unit, dates or timestamps (kept as seconds; without a zone
    they are UTC). A row with a null or a NaN is malformed; its line is the row's number from 1.

    Args:
        log: a Parquet file, a folder with interactions.parquet and, where there is one, items.parquet, or a frame
            (pandas, polars, pyarrow, ``datasets.Dataset``; see :mod:`flr.data.frames`).
        request: ``metadata`` is a file or a frame with a column of ids; a title, a sid (text or a list of codes) and
            others (numbers, bools, text, moments), which become attributes of the catalogue, may be there. Of a file
            that is not Parquet titles alone are read. Without metadata a column of titles beside the events counts.
    """
    report, metadata = request.report, request.metadata
    asked = {"user": request.user, "item": request.item, "time": request.time}
    if isinstance(log, (str, os.PathLike)):
        file = Path(log)
        if file.is_dir():
            if metadata is None and (file / ITEMS_NAME).is_file():
                metadata = file / ITEMS_NAME
            file = file / LOG_NAME
        table, source, shown = read_parquet(file, {}), str(file), file.name
        name = file.parent.name if file.name == LOG_NAME else file.stem
    else:
        wanted = asked if metadata is not None else {**asked, "title": request.title}
        table = pick(log, "log", **wanted)
        source = shown = "log"
        name = kind_of(log)
    report.source = source
    events = read_events(table, report, source, shown=shown, max_bad_share=request.max_bad_share, **asked)
    if metadata is None and has_column(table.column_names, "title", request.title):
        own = partial(_titles_beside, table, request, source)
        return RawLog(events, name, described(request, own))
    if isinstance(metadata, (str, os.PathLike)):
        items = SourceFile(Path(metadata), None, request.progress)
        check_regular(items.path, "a file that describes items")
        if not items.is_parquet:
            return RawLog(events, name, described(request, partial(titles_of, items, request)))
    item, title = request.item, request.title
    return RawLog(events, name, partial(_catalogue, items=metadata, item=item, title=title, report=report))


def _titles_beside(table: pa.Table, request: Request, source: str, item_ids: list[str]) -> dict[str, str]:
    """The first title of every item, out of the log."""
    title = find_column(table.column_names, "title", request.title, source)
    item = find_column(table.column_names, "item", request.item, source)
    kind = table.schema.field(title).type
    if not holds_text(kind):
        raise ValueError(f"{source}: column {title!r}: expected text, got {kind}")
    titles: dict[str, str] = {}
    for item_id, text in zip(id_column(table, item, source).to_pylist(), table[title].to_pylist(), strict=True):
        if text and item_id is not None:
            titles.setdefault(item_id, text)
    return titles


def _catalogue(
    item_ids: list[str], items: PathLike | Any, item: str | None, title: str | None, report: ReadReport
) -> Catalogue:
    """The items of ``item_ids`` as the table ``items`` describes them; without one, or past it, ids are the titles."""
    if items is None:
        return titled_catalogue(item_ids, {}, report)
    is_file = isinstance(items, (str, os.PathLike))
    source, shown = (str(items), Path(items).name) if is_file else ("metadata", "metadata")
    table = read_parquet(items, {}) if is_file else as_table(items, source)
    table = without_views(table)
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
        if not holds_text(kind):
            raise ValueError(f"{source}: column {columns['title']!r}: expected text, got {kind}")
        listed = table[columns["title"]].to_pylist()
        titles = {item_id: text or "" for item_id, text in zip(ids, listed, strict=True)}
    described = titled_catalogue(item_ids, titles, report)
    unknown = [item_id for item_id in item_ids if item_id not in place]
    if unknown:
        lacking = f"{len(unknown)} items of the log are not in {shown} (as {unknown[0]!r})"
        left = [column for column in names if column not in (columns["item"], columns.get("title"))]
        why = f"; columns {in_short(left)} are left out for all items, since each one needs a value" if left else ""
        report.notes.append(lacking + why)
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
