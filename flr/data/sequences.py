"""One user's items in order: ``user item item …`` a line, or ``{user: [item, …]}`` as JSON; times are not known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from flr.files import NOT_UTF8, bounded_lines, read_json, shown

from .catalogue import Catalogue
from .codes import codes_of_table
from .events import LogBuilder
from .report import ReadReport
from .sources import MAX_LINE, Source, SourceFile
from .splits import titled_catalogue
from .text_log import RawLog, Request, clean_title, plain_title, titles_of

_MAX_JSON = 1 << 31  # bytes
_SLICE = 1 << 18  # events of a block
_LOGS = ("inter.json", "*.inter.json", "sequential_data.txt", "*.txt", "*.txt.gz")
_CODES = ("index.json", "*.index.json")
_TITLES = ("item2title.json", "*.item2title.json", "item.json", "*.item.json")
_MAPS = ("datamaps.json", "*.datamaps.json")
_SEPARATOR = re.compile(r"[\s,]+")


def read_sequences(path: Path, request: Request) -> RawLog:
    """Events, codes and titles of a folder, or events of a file alone.

    A folder holds inter.json (user → items) or one .txt file (a line ``user item item …``; lines of one user are
    joined, so ``user item`` a line will do), and where there are, index.json (item → codes), item2title.json or
    item.json (item → title, or object with a title) and datamaps.json (number → user, number → item). Names may have a
    prefix, as Arts.inter.json. ``request.metadata`` is one of the latter four, or a table with titles.
    ``request.user`` "none" says that lines hold items alone.
    """
    source = Source(path, request.progress)
    file = source.files[0] if source.is_file else source.find(*_LOGS)
    if file is None:
        raise ValueError(f"path: expected inter.json or one .txt file in {path}, got {source.names()}")
    report = request.report
    report.source = str(file)
    if request.user not in (None, "none"):
        wanted = "none (a line holds items alone) or nothing (its first word is the user)"
        raise ValueError(f"user: expected {wanted}, got {request.user!r}")
    is_json = file.beginning(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    if is_json and request.user is not None:
        raise ValueError(f"user: expected nothing for a JSON object, whose keys are the users, got {request.user!r}")
    about = _About(request)
    for patterns in () if source.is_file else (_MAPS, _CODES, _TITLES):
        found = source.find(*patterns)
        if found is not None:
            about.add(found)
    if request.metadata is not None:
        about.add(request.metadata_file())
    log = LogBuilder()
    rows = _json_rows(file) if is_json else _line_rows(file, request.user is None)
    for users, items in _blocks(rows, file.name, report, about):
        log.add(pa.array(users, pa.string()), pa.array(items, pa.string()), None)
    report.check(request.max_bad_share)
    if not len(log):
        raise ValueError(f"{file}: expected sequences, got an empty file")
    name = path.name if path.is_dir() else file.name.split(".")[0]
    return RawLog(log.build(), name, about.catalogue)


def _json_rows(file: SourceFile) -> Iterator[tuple[int, Any, Any]]:
    """(number, user, items) of every user of a JSON object."""
    if file.member is not None:
        raise ValueError(f"path: expected JSON outside an archive, got {file}")
    table = read_json(file.path, _MAX_JSON)
    yield from ((number, user, items) for number, (user, items) in enumerate(table.items(), 1))


def _line_rows(file: SourceFile, named: bool) -> Iterator[tuple[int, Any, Any]]:
    """(line, user, items) of every line that is not blank; a line that is too long has no items."""
    with file.open() as stream:
        for number, line in bounded_lines(stream, MAX_LINE):
            if line is None:
                yield number, str(number), None
                continue
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
            words = [word for word in _SEPARATOR.split(text) if word]
            if words:
                yield (number, words[0], words[1:]) if named else (number, str(number), words)


def _blocks(
    rows: Iterable[tuple[int, Any, Any]], name: str, report: ReadReport, about: _About
) -> Iterator[tuple[list[str], list[str]]]:
    """Users and items, event by event; ``report`` counts events, and one for a row that is malformed."""
    users: list[str] = []
    items: list[str] = []
    for number, user, listed in rows:
        texts = _texts(listed)
        reason = None
        if not user or not user.isprintable() or NOT_UTF8 in user:
            reason = f"expected a user in UTF-8, got {shown(user, 80)}"
        elif not texts:
            reason = f"expected items, text or integers, of user {shown(user, 80)}, got {shown(listed, 80)}"
        report.rows_read += 1 if reason or texts is None else len(texts)
        if reason or texts is None:
            report.add_bad(name, number, str(reason))
            continue
        users += [about.user(user)] * len(texts)
        items += map(about.item, texts)
        if len(items) >= _SLICE:
            yield users, items
            users, items = [], []
    yield users, items


def _texts(listed: Any) -> list[str] | None:
    """Items as text, None where one is none."""
    if not isinstance(listed, list):
        return None
    texts = [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in listed]
    good = (isinstance(text, str) and text and text.isprintable() and NOT_UTF8 not in text for text in texts)
    return texts if all(good) else None


class _About:
    """What files beside the sequences say of users and items."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._maps: dict[str, dict[str, str]] = {}
        self._codes: tuple[str, dict[str, Any]] | None = None
        self._titles: Callable[[list[str]], dict[str, str]] | None = None

    def add(self, file: SourceFile) -> None:
        """Take a file for what its content is: codes, titles, or names of numbers."""
        request = self._request
        if file.member is not None:
            raise ValueError(f"path: expected JSON outside an archive, got {file}")
        if file.is_parquet or not file.is_records or not file.name.endswith(".json"):
            self._titles = partial(titles_of, file, request)
            return
        table = read_json(file.path, _MAX_JSON)
        if "item2id" in table or "id2item" in table:
            self._maps = {role: _names(table, role, file) for role in ("user", "item")}
        elif table and all(isinstance(value, str) for value in table.values()):
            sids = all(value.startswith("<") and value.endswith(">") for value in table.values())
            if sids:
                self._codes = (str(file), table)
            else:
                self._titles = lambda ids: {item: plain_title(table[item]) for item in ids if item in table}
        elif table and all(isinstance(value, list) for value in table.values()):
            self._codes = (str(file), table)
        elif table and all(isinstance(value, dict) for value in table.values()):
            self._titles = partial(_object_titles, table, request.title or "title", file)
        else:
            wanted = "item → codes, item → title, item → object, or maps with item2id or id2item"
            raise ValueError(f"{file}: expected {wanted}, got {shown(table, 80)}")

    def user(self, user: str) -> str:
        """The name of a user."""
        return self._named("user", user)

    def item(self, item: str) -> str:
        """The name of an item."""
        return self._named("item", item)

    def _named(self, role: str, number: str) -> str:
        names = self._maps.get(role)
        if not names:
            return number
        if number not in names:
            raise ValueError(f"datamaps: expected a name for every {role}, got none for {shown(number, 80)}")
        return names[number]

    def catalogue(self, item_ids: list[str]) -> Catalogue:
        """The catalogue of some items."""
        if self._titles is None and self._request.title is not None:
            raise ValueError(f"title: expected metadata with titles, got {self._request.title!r} without")
        titles = self._titles(item_ids) if self._titles is not None else {}
        plain = titled_catalogue(item_ids, titles, self._request.report)
        if self._codes is None:
            return plain
        name, table = self._codes
        codes = codes_of_table(table, item_ids, name)
        self._request.report.note_repeated("semantic ID", codes)
        return Catalogue(plain.item_ids, plain.titles, codes)


def _names(table: dict[str, Any], role: str, file: SourceFile) -> dict[str, str]:
    """Name by number: ``id2item`` as it is, or ``item2id`` turned round."""
    forward, backward = table.get(f"id2{role}"), table.get(f"{role}2id")
    given = forward if forward is not None else backward
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(value, (str, int)) for value in given.values()):
        raise ValueError(f"{file}: expected names by number in id2{role} or {role}2id, got {shown(given, 80)}")
    pairs = ((str(key), str(value)) for key, value in given.items())
    return dict(pairs) if forward is not None else {number: name for name, number in pairs}


def _object_titles(table: dict[str, Any], title: str, file: SourceFile, item_ids: list[str]) -> dict[str, str]:
    if not any(title in value for value in table.values()):
        known = sorted({key for value in table.values() for key in value})
        raise ValueError(f"title: expected a field of {file}, {shown(known)}, got {title!r}")
    texts = {item: table[item].get(title) for item in item_ids if item in table}
    return {item: clean_title(text) for item, text in texts.items() if isinstance(text, str)}
