"""Public data sets in the files in which they are published: MovieLens, Amazon, Steam, Yelp, Goodreads.

``LAYOUTS`` says what the files are called and where a user, an item, a time and a title are; one reader does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from flr.files import shown

from .delimited import Dialect, read_rows, sniff
from .events import InteractionLog
from .records import record_names
from .report import ReadReport
from .sources import Source, SourceFile
from .text_log import Columns, ItemColumns, RawLog, Request, described, text_events, titles_of


@dataclass(frozen=True)
class Layout:
    """How one release writes its files.

    Attributes:
        log, at: pattern of the log's name, and its columns.
        items, about: patterns of the name of the file that describes items, and its columns.
        log_dialect, items_dialect: of tables without a header; None for objects one a line or a table with a header.
        renumbered: pattern of a table (number in the log, id of the items) by which items are renamed, and its columns.
    """

    log: str
    at: Columns
    items: tuple[str, ...]
    about: ItemColumns
    log_dialect: Dialect | None = None
    items_dialect: Dialect | None = None
    renumbered: tuple[str, str, str] | None = None


def _plain(delimiter: str, names: str) -> Dialect:
    return Dialect(delimiter, tuple(names.split()), quoted=False, header=False, latin=True)


_RATINGS = "user_id item_id rating timestamp"
_GENRES = (
    "unknown action adventure animation childrens comedy crime documentary drama fantasy film_noir horror musical "
    "mystery romance sci_fi thriller war western"
)
_RATED = Columns("user_id", "item_id", "timestamp", 1)
_MOVIE = ItemColumns("item_id", ("title",))

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "movielens": (
        Layout(  # ml-100k
            "u.data",
            _RATED,
            ("u.item",),
            _MOVIE,
            _plain("\t", _RATINGS),
            _plain("|", f"item_id title release_date video_release_date imdb_url {_GENRES}"),
        ),
        Layout(  # ml-1m, ml-10m
            "ratings.dat",
            _RATED,
            ("movies.dat",),
            _MOVIE,
            _plain("::", _RATINGS),
            _plain("::", "item_id title genres"),
        ),
        Layout(  # ml-20m and later, ml-latest
            "ratings.csv",
            Columns("userId", "movieId", "timestamp", 1),
            ("movies.csv",),
            ItemColumns("movieId", ("title",)),
        ),
    ),
    "amazon": (
        Layout(  # 2014, 2018
            "*.json*",
            Columns("reviewerID", "asin", "unixReviewTime", 1),
            ("meta_*",),
            ItemColumns("asin", ("title",)),
        ),
        Layout(  # 2023
            "*.json*",
            Columns("user_id", "parent_asin", "timestamp", 1000),
            ("meta_*",),
            ItemColumns("parent_asin", ("title",)),
        ),
    ),
    "steam": (
        Layout(
            "steam_reviews.json*",
            Columns("username", "product_id", "date"),
            ("steam_games.json*",),
            ItemColumns("id", ("title", "app_name")),
        ),
    ),
    "yelp": (
        Layout(
            "*review.json*",
            Columns("user_id", "business_id", "date"),
            ("*business.json*",),
            ItemColumns("business_id", ("name",)),
        ),
    ),
    "goodreads": (
        Layout(
            "goodreads_interactions*.json*",
            Columns("user_id", "book_id", "date_updated"),
            ("goodreads_books*.json*",),
            ItemColumns("book_id", ("title", "title_without_series")),
        ),
        Layout(
            "goodreads_interactions.csv*",
            Columns("user_id", "book_id", None),
            ("goodreads_books*.json*",),
            ItemColumns("book_id", ("title", "title_without_series")),
            renumbered=("book_id_map.csv*", "book_id_csv", "book_id"),
        ),
    ),
}


def read_public(kind: str, path: Path, request: Request) -> RawLog:
    """Events and titles of a public data set: a folder or a zip archive with its files, or the log's file alone.

    Columns that ``request`` names take the place of the layout's; ``request.metadata`` that of the items' file.

    Raises:
        ValueError: no such file, other columns, or too many malformed rows.
    """
    source = Source(path, request.progress)
    file = _log_file(kind, source)
    layout = _layout(kind, file, request)
    report = request.report
    report.source = str(file)
    events = text_events(file, _dialect(file, layout.log_dialect), _columns(layout, request), report)
    report.check(request.max_bad_share)
    items = source.find(*layout.items) if request.metadata is None and not source.is_file else None
    if request.metadata is not None:
        items = request.metadata_file()
    if items is None and request.title is not None:
        raise ValueError(f"title: expected a file of items ({' or '.join(layout.items)}, or metadata), got none")
    if layout.renumbered is not None:
        events = _renamed(events, source, layout.renumbered, report, items)
    own = items and partial(titles_of, items, request, usual=layout.about, dialect=layout.items_dialect)
    return RawLog(events, source.name, described(request, own or None))


def _log_file(kind: str, source: Source) -> SourceFile:
    if source.is_file:
        return source.files[0]
    for layout in LAYOUTS[kind]:
        if found := source.find(layout.log, without=layout.items):
            return found
    patterns = " or ".join(dict.fromkeys(layout.log for layout in LAYOUTS[kind]))
    raise ValueError(f"path: expected a file {patterns} in {source.path}, got {source.names()}")


def _layout(kind: str, file: SourceFile, request: Request) -> Layout:
    """By the name of a table without header, else by its columns."""
    layouts = LAYOUTS[kind]
    named = next((one for one in layouts if one.log_dialect is not None and fnmatchcase(file.name, one.log)), None)
    if named is not None:
        return named
    if not file.beginning(1):
        raise ValueError(f"{file}: expected events, got an empty file")
    names = record_names(file) if file.is_records else list(sniff(file).names)
    columns = [(layout, _columns(layout, request).names) for layout in layouts if layout.log_dialect is None]
    for needed in (3, 2):  # of releases that share user and item the one whose times are there
        for layout, wanted in columns:
            if {*wanted[:needed]} <= {*names}:
                return layout
    lacking = " or ".join(", ".join(wanted) for _, wanted in columns)
    raise ValueError(f"{file}: expected columns {lacking}, got {shown(names[:12])}")


def _columns(layout: Layout, request: Request) -> Columns:
    time = layout.at.time if request.time is None else request.time
    known = layout.at.per_second if time == layout.at.time else None
    return Columns(request.user or layout.at.user, request.item or layout.at.item, time, known)


def _dialect(file: SourceFile, given: Dialect | None) -> Dialect | None:
    return given if given is not None else None if file.is_records else sniff(file)


def _renamed(
    events: InteractionLog,
    source: Source,
    renumbered: tuple[str, str, str],
    report: ReadReport,
    items: SourceFile | None,
) -> InteractionLog:
    """Events whose items have the ids of the items' file, by the table that says so.

    Numbers of the log are ids of other items there, so titles without that table would be wrong ones.
    """
    pattern, number, item_id = renumbered
    file = None if source.is_file else source.find(pattern)
    if file is None:
        if items is not None:
            raise ValueError(f"metadata: expected {pattern} beside the log, whose numbers are no ids, got none")
        return events
    table: dict[str, str] = {}
    for _, (numbers, ids), malformed in read_rows(file, sniff(file), (number, item_id)):
        if malformed:
            raise ValueError(f"{file}:{malformed[0].line}: {malformed[0].reason}")
        table |= zip(numbers.to_pylist(), ids.to_pylist(), strict=True)
    lost = [name for name in events.item_ids if name not in table]
    if lost:
        raise ValueError(f"{file}: expected every number of the log, got {len(lost)} that it lacks (as {lost[0]!r})")
    report.notes.append(f"items are named by {file.name}")
    return replace(events, item_ids=[table[name] for name in events.item_ids])
