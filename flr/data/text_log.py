"""Events and titles out of text: what tables and objects, one a line, have in common."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flr.files import NOT_UTF8, PathLike, read_parquet, shown

from .catalogue import Catalogue
from .delimited import Dialect, Malformed, read_rows, sniff
from .events import InteractionLog, LogBuilder
from .frames import find_column, has_column, id_column
from .records import record_names, record_rows
from .report import MAX_EXAMPLES, ReadReport
from .sources import Progress, SourceFile
from .splits import titled_catalogue
from .times import Clock

_TAG = re.compile(r"</?[a-zA-Z][^<>]*(>|$)")


@dataclass
class Request:
    """What a reader is asked for.

    Attributes:
        user, item, time, title: columns; None for the usual ones of the form.
        metadata: what describes the items: a file, or a table in memory.
        max_bad_share: malformed rows allowed, 0..1, of each file.
        report: gets counts and notes.
        progress: see :data:`flr.data.sources.Progress`.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    title: str | None = None
    metadata: PathLike | Any = None
    max_bad_share: float = 0.01
    report: ReadReport = field(default_factory=ReadReport)
    progress: Progress | None = None

    def metadata_file(self) -> SourceFile:
        """``metadata``, a file."""
        return SourceFile(Path(self.metadata), None, self.progress)


class RawLog(NamedTuple):
    """What a reader gives: events, a name, and the catalogue of a list of item ids."""

    events: InteractionLog
    name: str
    describe: Callable[[list[str]], Catalogue]


class Columns(NamedTuple):
    """Where the events of a file are; ``per_second`` units of ``time`` are a second, None where that is not known."""

    user: str
    item: str
    time: str | None
    per_second: int | None = None

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [self.user, self.item] + ([] if self.time is None else [self.time])


def text_events(file: SourceFile, dialect: Dialect | None, at: Columns, report: ReadReport) -> InteractionLog:
    """The events of a file of text: a table of that dialect, or objects where ``dialect`` is None.

    A row without user or item, with an id that is not UTF-8, or with a time that is none is malformed.
    """
    clock, log = Clock(at.per_second), LogBuilder()
    blocks = record_rows(file, at.names) if dialect is None else read_rows(file, dialect, at.names)
    for lines, columns, malformed in blocks:
        users, items = columns[:2]
        bad = _lacking(users) | _lacking(items)
        faults = _faults(bad, lines, columns[:2], f"{at.user} and {at.item} in UTF-8")
        times = None
        if at.time is not None:
            times, bad_times = clock.read(columns[2])
            faults += _faults(bad_times & ~bad, lines, columns[2:], clock.expected, f"{at.time}: ")
            bad |= bad_times
            times = times[~bad]
        _note(report, file.name, len(lines), malformed, faults)
        keep = pa.array(~bad)
        log.add(users.filter(keep), items.filter(keep), times)
    return log.build(clock.per_second)


def _lacking(values: pa.Array) -> np.ndarray:
    """bool [n]: null, empty, or not UTF-8 in the file."""
    bad = pc.or_(pc.equal(values, ""), pc.match_substring(values, NOT_UTF8))
    return pc.fill_null(bad, True).to_numpy(zero_copy_only=False)


def _faults(
    bad: np.ndarray, lines: np.ndarray, columns: Sequence[pa.Array], expected: str, name: str = ""
) -> list[Malformed]:
    """One entry a row for the first bad rows, and one for all others."""
    rows = np.flatnonzero(bad)
    faults = []
    for row in rows[:MAX_EXAMPLES].tolist():
        got = ", ".join(shown(column[row].as_py(), 80) for column in columns)
        faults.append(Malformed(int(lines[row]), f"{name}expected {expected}, got {got}"))
    others = len(rows) - len(faults)
    return [*faults, Malformed(int(lines[rows[-1]]), "", others)] if others else faults


def _note(report: ReadReport, name: str, rows: int, malformed: list[Malformed], faults: list[Malformed]) -> None:
    """Count a block: its rows, those that were no rows, and faults of the former; both in order of their lines."""
    report.rows_read += rows + sum(row.rows for row in malformed)
    for fault in sorted([*malformed, *faults]):
        report.add_bad(name, fault.line, fault.reason, fault.rows)


def clean_title(text: str) -> str:
    """A title without HTML tags and entities, control characters, line breaks and page scripts; "" for nothing left.

    >>> clean_title("Rock &amp; <b>Roll</b>\\n"), clean_title('<span class="a-size-medium')
    ('Rock & Roll', '')
    """
    text = html.unescape(_TAG.sub(" ", text)).encode("utf-8", "replace").decode("utf-8")
    if "getTime()" in text:  # a script of the crawled page, known from Amazon's 2018 release
        return ""
    return plain_title(text)


def plain_title(text: str) -> str:
    """A title in one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class ItemColumns(NamedTuple):
    """Where the items' ids and titles are: of several columns of titles the first that has one counts."""

    item: str
    titles: tuple[str, ...]


def text_titles(
    file: SourceFile, dialect: Dialect | None, at: ItemColumns, request: Request, item_ids: Iterable[str]
) -> dict[str, str]:
    """Titles by id of a file of text, the first one of each id in ``item_ids``; malformed rows are notes."""
    own, wanted = ReadReport(source=str(file)), set(item_ids)
    names = [at.item, *at.titles]
    blocks = record_rows(file, names, ids=1) if dialect is None else read_rows(file, dialect, names)
    clean = clean_title if dialect is None else plain_title
    titles: dict[str, str] = {}
    for lines, (ids, *columns), malformed in blocks:
        bad = _lacking(ids)
        faults = _faults(bad, lines, [ids], f"{at.item} in UTF-8")
        _note(own, file.name, len(lines), malformed, faults)
        for item, *texts in _cells(ids, *columns):
            if item in wanted and not titles.get(item):
                titles[item] = next((title for text in texts if text and (title := clean(text))), "")
    own.check(request.max_bad_share)
    report = request.report
    if replaced := sum(NOT_UTF8 in title for title in titles.values()):
        report.notes.append(f"{file.name}: {replaced} titles are not UTF-8; {NOT_UTF8} stands for what is not")
    report.notes.extend(f"malformed item: {bad.file}:{bad.line}: {bad.reason}" for bad in own.examples)
    return titles


def _cells(*columns: pa.Array) -> Iterator[tuple[str | None, ...]]:
    return zip(*(column.to_pylist() for column in columns), strict=True)


def titles_of(
    file: SourceFile,
    request: Request,
    item_ids: list[str],
    usual: ItemColumns | None = None,
    dialect: Dialect | None = None,
) -> dict[str, str]:
    """Titles of a file that describes items: Parquet, objects one a line, or a table of text.

    Ids and titles are in the columns that ``request`` names, else in ``usual`` ones, else as ``frames.ALIASES`` says.

    Raises:
        ValueError: a column that is not there, or too many malformed rows.
    """
    table = read_parquet(file.path, {}) if file.is_parquet else None
    if table is not None:
        names: Sequence[str] = table.column_names
    elif file.is_records:
        names = record_names(file)
    else:
        dialect = dialect or sniff(file)
        names = dialect.names
    at = _item_columns(names, request, usual, file)
    if table is None:
        return text_titles(file, dialect, at, request, item_ids)
    if left := [name for name in names if name not in (at.item, *at.titles)]:
        why = "titles alone are read unless the log is a Parquet file or a table in memory"
        request.report.notes.append(f"{file.name}: columns {shown(left)} are left out: {why}")
    ids = id_column(table, at.item, str(file)).to_pylist()
    titles: dict[str, str] = {}
    for column in at.titles:
        for item, text in zip(ids, id_column(table, column, str(file)).to_pylist(), strict=True):
            if item is not None and text and not titles.get(item):
                titles[item] = plain_title(text)
    return titles


def _item_columns(names: Sequence[str], request: Request, usual: ItemColumns | None, file: SourceFile) -> ItemColumns:
    item = request.item if request.item in names else None
    if item is None and usual is not None and usual.item in names:
        item = usual.item
    known = () if usual is None or request.title is not None else tuple(t for t in usual.titles if t in names)
    at = known or (find_column(names, "title", request.title, str(file)),)
    return ItemColumns(find_column(names, "item", item, str(file)), at)


def described(
    request: Request, own: Callable[[list[str]], dict[str, str]] | None = None
) -> Callable[[list[str]], Catalogue]:
    """What makes a catalogue of a list of ids: titles by ``own``, ids where it is None."""

    def describe(item_ids: list[str]) -> Catalogue:
        return titled_catalogue(item_ids, {} if own is None else own(item_ids), request.report)

    return describe


def table_log(request: Request, file: SourceFile, name: str) -> RawLog:
    """The events of a table of text with a header; titles from ``request.metadata`` or a column beside them."""
    report = request.report
    report.source = str(file)
    dialect = sniff(file)
    names = dialect.names
    user, item = (find_column(names, role, getattr(request, role), str(file)) for role in ("user", "item"))
    time = find_column(names, "time", request.time, str(file)) if has_column(names, "time", request.time) else None
    events = text_events(file, dialect, Columns(user, item, time), report)
    report.check(request.max_bad_share)
    own = None
    if request.metadata is not None:
        own = partial(titles_of, request.metadata_file(), request)
    elif has_column(names, "title", request.title):
        at = ItemColumns(item, (find_column(names, "title", request.title, str(file)),))
        own = partial(text_titles, file, dialect, at, request)
    return RawLog(events, name, described(request, own))
