"""One entry for every form of data on disk: :func:`load_dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flr.files import PathLike

from .interactions import RecDataset
from .public import LAYOUTS, read_public
from .published import is_published, read_published
from .recbole import inter_files, read_recbole
from .sequences import read_sequences
from .sources import Progress, SourceFile
from .splits import check_splitting, split_log
from .tables import LOG_NAME, read_tables
from .text_log import RawLog, Request, table_log
from .times import Bound, check_bounds, within

_BOUNDS = frozenset({"max_bad_share", "name", "progress"})
_SPLITTING = _BOUNDS | {"split", "max_history", "min_interactions"}
_ALL = _SPLITTING | {"user", "item", "time", "title", "metadata", "since", "until"}


class _Form(NamedTuple):
    """A form of logs: what reads it, the options that it has, its split where nobody says, why it lacks options."""

    read: Callable[[Any, Request], RawLog]
    takes: frozenset[str] = _ALL
    split: str = "time"
    why: str = ""


def _table(path: Path, request: Request) -> RawLog:
    return table_log(request, SourceFile(path, None, request.progress), path.name.split(".")[0])


_UNTIMED = _ALL - {"item", "time", "since", "until"}
_LOGS: dict[str, _Form] = {
    **{kind: _Form(partial(read_public, kind)) for kind in LAYOUTS},
    "recbole": _Form(read_recbole),
    "parquet": _Form(read_tables),
    "csv": _Form(_table),
    "sequences": _Form(read_sequences, _UNTIMED, "leave_one_out", "a sequence has neither columns nor times"),
}
_PUBLISHED = _Form(_table, _BOUNDS - {"progress"}, why="its rows are split and named already")
_PREPARED = _Form(_table, frozenset(), why="it was read and split before")

#: The forms that :func:`load_dataset` reads.
FORMATS = ("prepared", *_LOGS)


def load_dataset(
    path: PathLike | Any,
    format: str = "auto",
    *,
    metadata: PathLike | Any = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    title: str | None = None,
    split: str | None = None,
    max_history: int | None = None,
    min_interactions: int | None = None,
    since: Bound | None = None,
    until: Bound | None = None,
    max_bad_share: float | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> RecDataset:
    """Read a data set. docs/data.md describes every form.

    Args:
        path: a folder or a file; or the log itself, one row an event, as a pandas, polars or pyarrow table or a
            ``datasets.Dataset``.
        format: "auto" looks at what is there. "prepared" is what :meth:`RecDataset.save` wrote; "movielens", "amazon",
            "steam", "yelp" and "goodreads" are the published files (:mod:`flr.data.public`); "recbole" atomic files;
            "parquet" a log and its items; "csv" the CSV form of this field's papers (:mod:`flr.data.published`), or any
            log of text with a header; "sequences" one user's items in order (:mod:`flr.data.sequences`).
        metadata: what describes the items: a file, or, where the log is a Parquet file or a table in memory, such a
            table. Of a file titles alone are read, unless both it and the log are one of the two.
        user, item, time, title: columns; None for the form's own, or the usual names (``flr.data.frames.ALIASES``).
        split: "time" (8:1:1 by time) or "leave_one_out", which **leaks the future** (see
            :func:`flr.data.splits.split_log`). Default: "time"; sequences have no times, so "leave_one_out".
        max_history: items of a history, at least 1. Default: 10.
        min_interactions: k of the k-core filter over users and items. Default: 0, no filter.
        since, until: events of since <= time < until; see :func:`flr.data.times.within`.
        max_bad_share: malformed rows allowed, 0..1, of each file. Default: 0.01.
        name: of the data set; by default of the file, or the kind of the table.
        progress: called with a file's name, bytes read, bytes in all, while a file of text is read.

    Raises:
        ValueError: nothing readable at ``path``, an option that the form does not have, malformed data.

    Example:
        >>> import pyarrow as pa
        >>> import tempfile
        >>> from flr.data import planted_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     planted_dataset(num_items=40, num_users=50).save(folder + "/toy")
        ...     load_dataset(folder + "/toy").name
        'planted'
        >>> users = [user for user in ("ann", "bob", "cid", "dan") for _ in range(4)]
        >>> log = pa.table({"user_id": users, "item_id": [1, 2, 3, 4] * 4, "timestamp": list(range(16))})
        >>> load_dataset(log, metadata=pa.table({"item_id": [1, 2, 3, 4], "title": ["A", "B", "C", "D"]}))
        RecDataset('pyarrow': 4 items; 10 train, 1 valid, 1 test rows)
    """
    given = {key: value for key, value in locals().items() if key not in ("path", "format") and value is not None}
    if not isinstance(path, (str, os.PathLike)):
        if format != "auto":
            raise ValueError(f"format: expected 'auto' for a table in memory, got {format!r}")
        return _split(_Form(read_tables), path, given)
    place, format = Path(path), resolve(path, format)
    form = _form(place, format)
    for option, value in given.items():
        if option not in form.takes:
            raise ValueError(f"{option}: expected none for {place} ({format}; {form.why}), got {value!r}")
    if form is _PREPARED:
        return RecDataset.load(place)
    if form is _PUBLISHED:
        return read_published(place, **given)
    return _split(form, place, given)


def resolve(path: PathLike, format: str) -> str:
    """The form at ``path``: ``format``, or what is there for "auto".

    Raises:
        ValueError: nothing there, an unknown format, or nothing that is recognised.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"path: expected a folder or a file, got nothing at {place}")
    if format == "auto":
        return _detect(place)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {['auto', *FORMATS]}, got {format!r}")
    return format


def options_of(path: PathLike, format: str) -> frozenset[str]:
    """The options of :func:`load_dataset` that mean something for what is at ``path``."""
    return _form(Path(path), resolve(path, format)).takes


def _form(place: Path, format: str) -> _Form:
    if format == "prepared":
        return _PREPARED
    return _PUBLISHED if format == "csv" and place.is_dir() else _LOGS[format]


def _split(form: _Form, source: Any, given: dict[str, Any]) -> RecDataset:
    """Read a log and make rows of it."""
    defaults: dict[str, Any] = {"split": form.split, "max_history": 10, "min_interactions": 0}
    defaults |= {"since": None, "until": None, "name": None}
    asked = {key: given.pop(key, default) for key, default in defaults.items()}
    split, max_history, min_interactions, since, until, name = asked.values()
    if split == "time" and form.split != "time":
        raise ValueError(f"split: expected {form.split!r} for {source} ({form.why}), got 'time'")
    check_splitting(split, max_history, min_interactions)  # before hours of reading
    check_bounds(since, until)
    request = Request(**given)
    if not isinstance(request.metadata, (str, os.PathLike, type(None))) and form.read is not read_tables:
        wanted = "a file beside a log that is neither a Parquet file nor a table in memory"
        raise ValueError(f"metadata: expected {wanted}, got {type(request.metadata).__name__}")
    request.report.check(request.max_bad_share)
    log = form.read(source, request)
    events = within(log.events, since, until, request.report)
    return split_log(events, split, max_history, min_interactions, name or log.name, request.report, log.describe)


def _detect(place: Path) -> str:
    if (place / "meta.json").is_file():
        return "prepared"
    if place.is_dir() and is_published(place):
        return "csv"
    if place.suffix == ".inter" or inter_files(place):
        return "recbole"
    if place.suffix == ".parquet" or (place / LOG_NAME).is_file():
        return "parquet"
    if place.is_dir() and any(place.glob("*inter.json")):
        return "sequences"
    names = sorted(file.name for file in place.iterdir())[:10] if place.is_dir() else place.name
    raise ValueError(
        f"path: expected meta.json (prepared), items.txt and test.csv (published CSV), one .inter file (RecBole), "
        f"{LOG_NAME} (Parquet) or inter.json (sequences) in {place}, or its format by name, got {names}"
    )
