"""Raw Amazon reviews and metadata (the 2018 and 2023 releases: one JSON object a line, .json.gz or .jsonl.gz)."""

from __future__ import annotations

import datetime
import gzip
import html
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from flr.files import PathLike, bounded_lines, shown

from .catalogue import Catalogue
from .events import LogBuilder
from .interactions import RecDataset
from .report import ReadReport
from .splits import split_log, titled_catalogue

_MAX_LINE = 1 << 24  # bytes; the longest metadata lines of the releases take about 1 MB
_LATEST = 4102444800  # 2100-01-01, in seconds
_TAG = re.compile(r"</?[a-zA-Z][^<>]*(>|$)")


class _Release(NamedTuple):
    user: str
    item: str
    time: str
    per_second: int  # units of time


_RELEASES = {
    "2018": _Release("reviewerID", "asin", "unixReviewTime", 1),
    "2023": _Release("user_id", "parent_asin", "timestamp", 1000),
}


def prepare_amazon(
    reviews: PathLike,
    metadata: PathLike | None = None,
    *,
    output: PathLike | None = None,
    release: str = "auto",
    split: str = "time",
    max_history: int = 10,
    min_interactions: int = 5,
    since: str | int | None = None,
    until: str | int | None = None,
    max_bad_share: float = 0.01,
    name: str | None = None,
) -> RecDataset:
    """Build a data set from raw Amazon reviews, streamed line by line.

    Args:
        reviews, metadata: files of one category, .json, .jsonl or gzipped; without metadata an item's id stands in for
            its title.
        output: folder to save the data set in, None for none.
        release: "2018" (reviewerID, asin, unixReviewTime), "2023" (user_id, parent_asin, timestamp in ms) or "auto".
        split: "time" (8:1:1 by time) or "leave_one_out"; **leave-one-out leaks the future**: its training data contains
            events later than other users' test events (see :func:`flr.data.splits.split_log`).
        max_history: items of a history.
        min_interactions: k of the k-core filter over users and items.
        since, until: keep reviews of since <= time < until; ISO dates (UTC) or seconds since 1970.
        max_bad_share: malformed lines allowed, 0..1, of each file.
        name: of the data set, the reviews file's name by default.

    Returns:
        RecDataset whose report counts lines read, kept, malformed and left out. Repeated (user, item, time) events
        count once.
    """
    file = Path(reviews)
    report = ReadReport(source=str(file))
    begin, end = _seconds("since", since, -math.inf), _seconds("until", until, math.inf)
    if release != "auto" and release not in _RELEASES:
        raise ValueError(f"release: expected one of {['auto', *_RELEASES]}, got {release!r}")
    log, fields, outside = _reviews(file, _RELEASES.get(release), begin, end, report)
    report.check(max_bad_share)
    if fields is None:
        raise ValueError(f"{file}: expected reviews, got an empty file")
    if outside:
        report.notes.append(f"{outside} events outside since={since!r}, until={until!r}")
    item_field = fields.item

    def describe(item_ids: list[str]) -> Catalogue:
        titles = {} if metadata is None else _titles(Path(metadata), item_field, set(item_ids), max_bad_share, report)
        return titled_catalogue(item_ids, titles, report)

    name = name or file.name.split(".")[0]
    events = log.build(per_second=fields.per_second)
    dataset = split_log(events, split, max_history, min_interactions, name, report, describe)
    if output is not None:
        dataset.save(output)
    return dataset


def _reviews(
    file: Path, fields: _Release | None, begin: float, end: float, report: ReadReport
) -> tuple[LogBuilder, _Release | None, int]:
    """Events of begin <= time < end, the release (of the first good line where not given), number of other events."""
    log, outside = LogBuilder(), 0
    for line, record in _records(file, report):
        fields = fields or next((r for r in _RELEASES.values() if r.user in record and r.item in record), None)
        if fields is None:
            report.add_bad(
                file.name, line, f"expected fields of a 2018 or 2023 review, got {shown(sorted(record)[:8])}"
            )
            continue
        user, item, time = record.get(fields.user), record.get(fields.item), record.get(fields.time)
        if not (_is_id(user) and _is_id(item)):
            report.add_bad(
                file.name,
                line,
                f"expected text in {fields.user} and {fields.item}, got {shown(user, 80)}, {shown(item, 80)}",
            )
        elif isinstance(time, bool) or not isinstance(time, int) or not 0 <= time < _LATEST * fields.per_second:
            report.add_bad(file.name, line, f"{fields.time}: expected a time before 2100, got {shown(time, 80)}")
        elif begin <= time / fields.per_second < end:
            log.add(cast(str, user), cast(str, item), time)
        else:
            outside += 1
    return log, fields, outside


def clean_title(text: str) -> str:
    """A title without HTML tags and entities, control characters, line breaks and page scripts; "" for nothing left.

    >>> clean_title("Rock &amp; <b>Roll</b>\\n"), clean_title('<span class="a-size-medium')
    ('Rock & Roll', '')
    """
    text = html.unescape(_TAG.sub(" ", text)).encode("utf-8", "replace").decode("utf-8")
    if "getTime()" in text:  # a script of the crawled page, known from the 2018 release
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _titles(file: Path, item_field: str, wanted: set[str], max_bad_share: float, report: ReadReport) -> dict[str, str]:
    own = ReadReport(source=str(file))
    titles: dict[str, str] = {}
    for line, record in _records(file, own):
        item, title = record.get(item_field), record.get("title")
        if not _is_id(item):
            own.add_bad(file.name, line, f"expected text in {item_field}, got {shown(item, 80)}")
        elif item in wanted and isinstance(title, str) and not titles.get(item):
            titles[item] = clean_title(title)
    own.check(max_bad_share)
    report.notes.extend(f"malformed metadata: {bad.file}:{bad.line}: {bad.reason}" for bad in own.examples)
    return titles


def _records(file: Path, report: ReadReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every good line; ``report`` counts all lines and notes the others."""
    if not file.is_file():
        raise ValueError(f"path: expected a file at {file}, got none")
    number = 0
    with open(file, "rb") as beginning:
        opener: Callable[[Path, str], Any] = gzip.open if beginning.read(2) == b"\x1f\x8b" else open
    with opener(file, "rb") as stream:
        try:
            for number, line in bounded_lines(stream, _MAX_LINE):
                if line is not None and line.isspace():
                    continue
                report.rows_read += 1
                try:
                    record = None if line is None else json.loads(line)
                except (ValueError, RecursionError) as error:
                    report.add_bad(file.name, number, f"expected JSON, got {error}")
                    continue
                if line is None:
                    report.add_bad(file.name, number, f"expected at most {_MAX_LINE} bytes, got more")
                elif isinstance(record, dict):
                    yield number, record
                else:
                    report.add_bad(file.name, number, f"expected a JSON object, got {type(record).__name__}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}: expected a whole gzip file, got {error} after line {number}") from error


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()  # a lone surrogate is not printable


def _seconds(name: str, value: str | int | None, default: float) -> float:
    if value is None or isinstance(value, int):
        return default if value is None else value
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{name}: expected an ISO date or seconds since 1970, got {value!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()
