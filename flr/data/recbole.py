"""RecBole atomic files: NAME.inter and, where there is one, NAME.item; tab-separated under a typed header."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flr.files import NOT_UTF8, PathLike, bounded_lines, check_regular, shown

from .events import LogBuilder
from .interactions import RecDataset
from .report import ReadReport
from .splits import split_log, titled_catalogue

_TYPES = ("token", "token_seq", "float", "float_seq")
_MAX_LINE = 1 << 20  # characters
_TITLES = ("title", "name")


def read_recbole(
    path: PathLike,
    *,
    split: str = "time",
    max_history: int = 10,
    min_interactions: int = 1,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    title_field: str | None = None,
    max_bad_share: float = 0.01,
    name: str | None = None,
) -> RecDataset:
    """Read RecBole atomic files: ``path`` is an .inter file or a folder with exactly one.

    The header names fields as ``user_id:token``. The item file's title is ``title_field``, or the one field whose name
    ends in "title" or "name". Timestamps are kept in the file's unit. ``split="leave_one_out"`` **leaks the future**
    (see :func:`flr.data.splits.split_log`). Malformed rows are counted and refused past ``max_bad_share``.
    """
    file = _inter_file(Path(path))
    report = ReadReport(source=str(file))
    log = LogBuilder()
    fields, rows = _open(file, report)
    for needed in (user_field, item_field):
        if needed not in fields:
            raise ValueError(f"{file}: expected a field {needed!r}, got {shown(list(fields))}")
    timed = time_field in fields
    user_at, item_at, time_at = fields[user_field], fields[item_field], fields.get(time_field, 0)
    for line, cells in rows:
        time = _number(cells[time_at]) if timed else 0.0
        ids = cells[user_at], cells[item_at]
        if not all(ids) or NOT_UTF8 in "".join(ids):
            got = f"{ids[0][:80]!r}, {ids[1][:80]!r}"
            report.add_bad(file.name, line, f"expected {user_field} and {item_field} in UTF-8, got {got}")
        elif time is None:
            report.add_bad(file.name, line, f"{time_field}: expected a finite number, got {cells[time_at][:80]!r}")
        else:
            log.add(cells[user_at], cells[item_at], time)
    report.check(max_bad_share)
    items = file.with_suffix(".item")
    titles = _titles(items, item_field, title_field, max_bad_share, report) if items.is_file() else {}

    describe = partial(titled_catalogue, titles=titles, report=report)
    return split_log(log.build(timed), split, max_history, min_interactions, name or file.stem, report, describe)


def inter_files(folder: Path) -> list[Path]:
    """The .inter files of a folder."""
    return sorted(folder.glob("*.inter")) if folder.is_dir() else []


def _inter_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = inter_files(path)
    if len(files) != 1:
        names = [file.name for file in files]
        raise ValueError(f"path: expected an .inter file or a folder with exactly one, got {shown(names)}")
    return files[0]


def _open(file: Path, report: ReadReport) -> tuple[dict[str, int], Iterator[tuple[int, list[str]]]]:
    """Columns by field name, and the rows with one cell a field; ``report`` counts all rows and notes the others."""
    check_regular(file, "a text file")
    lines = _lines(file)
    _, header = next(lines, (1, None))
    if header is None:
        raise ValueError(f"{file}: expected a header, got an empty file")
    fields: dict[str, int] = {}
    for column, cell in enumerate(header.lstrip("\ufeff").split("\t")):
        field, colon, kind = cell.rpartition(":")
        if not colon or kind not in _TYPES or field in fields:
            wanted = f"a header of different NAME:TYPE cells (types {_TYPES})"
            raise ValueError(f"{file}: expected {wanted}, got {cell[:80]!r}")
        fields[field] = column

    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, line in lines:
            report.rows_read += 1
            cells = [] if line is None else line.split("\t")
            if len(cells) == len(fields):
                yield number, cells
            else:
                got = f"more than {_MAX_LINE} characters" if line is None else f"{len(cells)} cells"
                report.add_bad(file.name, number, f"expected {len(fields)} cells, got {got}")

    return fields, rows()


def _lines(file: Path) -> Iterator[tuple[int, str | None]]:
    """(number, text) of every line that is not empty, without its end; None for one past the size bound."""
    with open(file, encoding="utf-8", errors="replace", newline="\n") as stream:
        for number, line in bounded_lines(stream, _MAX_LINE):
            text = None if line is None else line.rstrip("\r\n")
            if text != "":
                yield number, text


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 2**53 else None


def _titles(
    file: Path, item_field: str, title_field: str | None, max_bad_share: float, report: ReadReport
) -> dict[str, str]:
    own = ReadReport(source=str(file))
    fields, rows = _open(file, own)
    if item_field not in fields:
        raise ValueError(f"{file}: expected a field {item_field!r}, got {shown(list(fields))}")
    if title_field is None:
        candidates = [field for field in fields if field != item_field and field.lower().endswith(_TITLES)]
        if len(candidates) != 1:
            lacking = f"no single field for titles among {shown(list(fields))}"
            report.notes.append(f"{file.name}: {lacking}; name it with title_field")
            return {}
        title_field = candidates[0]
    if title_field not in fields:
        raise ValueError(f"title_field: expected one of {shown(list(fields))}, got {title_field!r}")
    titles: dict[str, str] = {}
    for _, cells in rows:
        titles.setdefault(cells[fields[item_field]], cells[fields[title_field]].strip())
    own.check(max_bad_share)
    if replaced := sum(NOT_UTF8 in title for title in titles.values()):
        report.notes.append(f"{file.name}: {replaced} titles are not UTF-8; {NOT_UTF8} stands for what is not")
    report.notes.extend(f"malformed item: {bad.file}:{bad.line}: {bad.reason}" for bad in own.examples)
    return titles
