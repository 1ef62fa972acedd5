"""The CSV form in which this field's papers publish Amazon data: train, valid, test.csv and items.txt in a folder.

One CSV row is one prediction. Columns user_id, history_item_id (a Python list literal) and item_id are needed,
timestamp is optional, others are not parsed. items.txt is tab-separated: ``title, id`` or ``sid, title, id``.
sid.index.json, where present, gives the codes of every id's semantic ID.
"""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from typing import Any

from flr.files import NOT_UTF8, PathLike, bounded_lines, read_json, shown

from .catalogue import Catalogue
from .codes import split_codes
from .delimited import csv_rows
from .interactions import PARTS, Interactions, RecDataset
from .report import ReadReport

_NEEDED = ("user_id", "history_item_id", "item_id")
_MAX_CELL = 1 << 17  # characters of a list cell; csv's own limit is the same
_MAX_LINE = 1 << 20  # characters of a line of items.txt


def is_published(folder: Path) -> bool:
    """Whether ``folder`` holds this form."""
    return (folder / "items.txt").is_file() and (folder / "test.csv").is_file()


def read_published(path: PathLike, *, max_bad_share: float = 0.01, name: str | None = None) -> RecDataset:
    """Read a folder in the published CSV form.

    Malformed rows (wrong number of cells, no list literal, an id that items.txt lacks, an empty or too long cell) are
    counted and shown in the report; past ``max_bad_share`` of all rows they are a ValueError.
    """
    folder = Path(path)
    report = ReadReport(source=str(folder))
    for needed in ("items.txt", *(f"{part}.csv" for part in PARTS)):
        if not (folder / needed).is_file():
            raise ValueError(f"path: expected {needed} in {folder}, got none")
    catalogue = _read_items(folder, report)
    parts = [_read_rows(folder / f"{part}.csv", catalogue, report) for part in PARTS]
    report.check(max_bad_share)
    report.rows_kept = sum(map(len, parts))
    report.users = len({user for part in parts for user in part.users})
    report.items = len(catalogue)
    report.note_repeated("title", catalogue.titles)
    return RecDataset(catalogue, parts[0], parts[1], parts[2], name or folder.name, report)


def _read_items(folder: Path, report: ReadReport) -> Catalogue:
    file = folder / "items.txt"
    ids: dict[str, None] = {}
    titles: list[str] = []
    sids: list[str | None] = []
    bad, replaced = ReadReport(source=str(file)), 0
    with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, whole in bounded_lines(lines, _MAX_LINE):
            if whole is None:
                bad.rows_read += 1
                bad.add_bad(file.name, number, f"expected at most {_MAX_LINE} characters, got more")
                continue
            line = whole.rstrip("\r\n")
            if not line:
                continue
            bad.rows_read += 1
            cells = line.split("\t")
            if len(cells) not in (2, 3):
                bad.add_bad(file.name, number, f"expected 2 or 3 tab-separated cells, got {len(cells)}")
            elif not cells[-1] or cells[-1] in ids or NOT_UTF8 in "".join([cells[-1], *cells[:-2]]):
                bad.add_bad(file.name, number, f"expected a new item id in UTF-8, got {cells[-1][:80]!r}")
            else:
                ids[cells[-1]] = None
                titles.append(cells[-2])
                replaced += NOT_UTF8 in cells[-2]
                sids.append(cells[0] if len(cells) == 3 else None)
    bad.check(0.0)  # an item lost would turn up as many bad rows, so none is
    if replaced:
        report.notes.append(f"{file.name}: {replaced} titles are not UTF-8; {NOT_UTF8} stands for what is not")
    index_file = folder / "sid.index.json"
    index: dict[str, Any] = read_json(index_file) if index_file.is_file() else {}
    if not index and None in sids:
        return Catalogue(ids, titles)
    codes: list[tuple[str, ...]] = []
    differing = 0
    for item_id, sid in zip(ids, sids, strict=True):
        listed = index.get(item_id)
        if listed is not None and not (isinstance(listed, list) and all(isinstance(code, str) for code in listed)):
            raise ValueError(f"{index_file}: expected a list of codes for id {shown(item_id)}, got {shown(listed)}")
        parsed = split_codes(sid) if sid else ()
        chosen = tuple(listed) if listed else parsed
        if not chosen:
            raise ValueError(f"{folder}: expected a semantic ID for every item, got none for id {shown(item_id)}")
        differing += bool(listed and parsed and tuple(listed) != parsed)
        codes.append(chosen)
    if differing:
        rule = "differ between items.txt and sid.index.json; the latter's are used"
        report.notes.append(f"{differing} semantic IDs {rule}")
    report.note_repeated("semantic ID", codes)
    return Catalogue(ids, titles, codes)


def _read_rows(file: Path, catalogue: Catalogue, report: ReadReport) -> Interactions:
    index = {item_id: position for position, item_id in enumerate(catalogue.item_ids)}
    users: list[str] = []
    histories: list[list[int]] = []
    targets: list[int] = []
    timestamps: list[int] = []
    other_titles = 0
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as text:
        rows = csv_rows(csv.reader(text, strict=True))  # lenient, an open quote joins two rows to one that looks good
        header = next(rows, (1, [], None, 1))[1]
        missing = [name for name in _NEEDED if name not in header]
        if missing:
            raise ValueError(f"{file}: expected columns {list(_NEEDED)}, got {shown(header)}")
        at = {name: position for position, name in enumerate(header)}
        for line, cells, error, lines in rows:
            report.rows_read += 1
            try:
                if error is not None or len(cells) != len(header):
                    report.rows_read += lines - 1  # an open quote swallows the lines after it: count what was lost
                    raise _BadCell(error or f"expected {len(header)} cells, got {len(cells)}", lines)
                user = cells[at["user_id"]]
                if not user or NOT_UTF8 in user:
                    raise _BadCell(f"user_id: expected an id in UTF-8, got {user[:80]!r}")
                history = [_item(index, item) for item in _literal_list(cells[at["history_item_id"]])]
                target = _item(index, cells[at["item_id"]])
                if "timestamp" in at:
                    timestamps.append(_timestamp(cells[at["timestamp"]]))
            except _BadCell as bad:
                report.add_bad(file.name, line, str(bad), bad.lines)
                continue
            users.append(user)
            histories.append(history)
            targets.append(target)
            if "item_title" in at:
                other_titles += cells[at["item_title"]].split() != catalogue.titles[target].split()
    if other_titles:
        report.notes.append(f"{file.name}: {other_titles} rows give their item another title than items.txt")
    return Interactions(users, histories, targets, timestamps if "timestamp" in at else None)


class _BadCell(Exception):
    """A row that cannot be read, and the lines that it takes."""

    def __init__(self, reason: str, lines: int = 1) -> None:
        super().__init__(reason)
        self.lines = lines


def _literal_list(cell: str) -> list[Any]:
    if len(cell) > _MAX_CELL:
        raise _BadCell(f"history_item_id: expected at most {_MAX_CELL} characters, got {len(cell)}")
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise _BadCell(f"history_item_id: expected a list literal, got {cell[:80]!r}") from None
    if not isinstance(value, list):
        raise _BadCell(f"history_item_id: expected a list, got {type(value).__name__}")
    return value


def _item(index: dict[str, int], value: Any) -> int:
    known = index.get(str(value)) if isinstance(value, (str, int)) else None
    if known is None:
        raise _BadCell(f"expected an item id of items.txt, got {str(value)[:80]!r}")
    return known


def _timestamp(cell: str) -> int:
    try:
        time = int(cell) if cell.isascii() and cell.isdecimal() else int(float(cell))
    except (ValueError, OverflowError):
        raise _BadCell(f"timestamp: expected a number, got {cell[:80]!r}") from None
    if not -(2**63) <= time < 2**63:
        raise _BadCell(f"timestamp: expected a number below 2^63, got {cell[:80]!r}")
    return time
