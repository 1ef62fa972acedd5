"""RecBole atomic files: NAME.inter and, where there is one, NAME.item; tab-separated under a typed header."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flr.files import check_regular, shown

from .delimited import Dialect, first_line
from .sources import SourceFile
from .text_log import Columns, ItemColumns, RawLog, Request, described, text_events, text_titles, titles_of

_TYPES = ("token", "token_seq", "float", "float_seq")
_TIMES = ("timestamp", "time", "date", "datetime")


def read_recbole(path: Path, request: Request) -> RawLog:
    """Events and titles of atomic files: ``path`` is an .inter file or a folder with exactly one.

    The header names fields as ``user_id:token``. Fields that ``request`` does not name are found: user_id, or the one
    token field with "user" in its name; item_id, or the one other token field, or the one whose name ends in _id;
    timestamp, or the one float field called time, date or datetime or ending in timestamp; title or name, or the one
    field whose name ends so. Where no one field is meant, the error says between which to choose. Times are kept in the
    file's unit.
    """
    file = _inter_file(path)
    report = request.report
    report.source = str(file)
    source = SourceFile(file, None, request.progress)
    fields = _fields(source)
    user = _field(fields, "user", request.user, _users(fields), file)
    item = _field(fields, "item", request.item, _items(fields, user), file)
    times = _times(fields)
    time = _field(fields, "time", request.time, times, file) if request.time or times else None
    unusual = [f"{role} {name}" for role, name, usual in
               (("user", user, "user_id"), ("item", item, "item_id"), ("time", time, "timestamp"))
               if name not in (usual, None)]  # fmt: skip
    if unusual:
        report.notes.append(f"{file.name}: fields taken for {', '.join(unusual)}")
    dialect = Dialect("\t", tuple(fields), quoted=False)
    events = text_events(source, dialect, Columns(user, item, time), report)
    report.check(request.max_bad_share)
    if request.metadata is not None:
        own = partial(titles_of, request.metadata_file(), request, usual=ItemColumns(item, ("title",)))
        return RawLog(events, file.stem, described(request, own))
    items = SourceFile(file.with_suffix(".item"))
    if not items.path.is_file():
        if request.title is not None:
            raise ValueError(f"title: expected {items.name} beside {file.name}, or metadata, got none")
        return RawLog(events, file.stem, described(request))
    about = _about(items, item, request)
    titles = about and partial(text_titles, items, Dialect("\t", tuple(_fields(items)), quoted=False), about, request)
    return RawLog(events, file.stem, described(request, titles or None))


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


def _fields(file: SourceFile) -> dict[str, str]:
    """Type by name of the fields, in their order."""
    check_regular(file.path, "a text file")
    fields: dict[str, str] = {}
    for cell in first_line(file).split("\t"):
        field, colon, kind = cell.rpartition(":")
        if not colon or kind not in _TYPES or field in fields:
            wanted = f"a header of different NAME:TYPE cells (types {_TYPES})"
            raise ValueError(f"{file}: expected {wanted}, got {cell[:80]!r}")
        fields[field] = kind
    return fields


def _field(fields: dict[str, str], role: str, asked: str | None, found: Sequence[str], file: Path) -> str:
    if asked is not None and asked not in fields:
        raise ValueError(f"{role}: expected a field of {file}, {shown(list(fields))}, got {asked!r}")
    if asked is None and len(found) != 1:
        got = shown(list(found or fields))
        raise ValueError(f"{file}: expected one field for {role}, got {got}; choose with {role}=")
    return found[0] if asked is None else asked


def _tokens(fields: dict[str, str]) -> list[str]:
    return [name for name, kind in fields.items() if kind == "token"]


def _users(fields: dict[str, str]) -> list[str]:
    tokens = _tokens(fields)
    named = [name for name in tokens if "user" in name.lower()]
    return ["user_id"] if "user_id" in tokens else named or (tokens[:1] if len(tokens) == 2 else [])


def _items(fields: dict[str, str], user: str) -> list[str]:
    tokens = [name for name in _tokens(fields) if name != user]
    if "item_id" in tokens:
        return ["item_id"]
    ids = [name for name in tokens if name.lower().endswith("_id") or name.lower() == "id"]
    return tokens if len(tokens) == 1 else ids or tokens


def _times(fields: dict[str, str]) -> list[str]:
    floats = [name for name, kind in fields.items() if kind == "float"]
    found = [name for name in floats if name.lower() in _TIMES or name.lower().endswith("timestamp")]
    return ["timestamp"] if "timestamp" in floats else found  # not "times", which counts


def _about(items: SourceFile, item: str, request: Request) -> ItemColumns | None:
    """Where an .item file has ids and titles; None, and a note, where no one field is meant for titles."""
    fields = _fields(items)
    asked = request.item if request.item in fields else item if item in fields else None
    key = _field(fields, "item", asked, _items(fields, ""), items.path)
    if request.title is not None:
        return ItemColumns(key, (_field(fields, "title", request.title, (), items.path),))
    texts = [name for name, kind in fields.items() if name != key and kind in ("token", "token_seq")]
    for ending in ("title", "name"):
        exact = [name for name in texts if name.lower() == ending]
        found = exact or [name for name in texts if name.lower().endswith(ending)]
        if len(found) == 1:
            return ItemColumns(key, (found[0],))
    lacking = f"no single field for titles among {shown(list(fields))}"
    request.report.notes.append(f"{items.name}: {lacking}; name it with title")
    return None
