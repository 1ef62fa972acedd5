"""Objects, one a line: JSON, or Python dicts as some public files have them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from flr.files import bounded_lines, shown

from .delimited import Malformed, Rows
from .sources import MAX_LINE, SourceFile

_MAX_LITERAL = 1 << 20  # bytes of a Python dict; its syntax tree takes a hundred times as much
_SLICE = 1 << 15  # objects of a block
_SAMPLE = 1000  # objects whose fields are looked at to tell forms apart

#: An object, or why a line is none.
Record = dict[str, Any] | str


def records(file: SourceFile) -> Iterator[tuple[int, Record]]:
    """(line number, object) of every line that is not blank; a text in its place says why it is none."""
    with file.open() as stream:
        for number, line in bounded_lines(stream, MAX_LINE):
            if line is None:
                yield number, f"expected at most {MAX_LINE} bytes, got more"
            elif line := line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.startswith((b"{'", b"{u'", b'{u"')):
            return f"expected JSON, got {error}"
        value = _literal(line)
        if isinstance(value, str):
            return value
    return value if isinstance(value, dict) else f"expected an object, got {type(value).__name__}"


def _literal(line: bytes) -> Any:
    if len(line) > _MAX_LITERAL:
        return f"expected a Python dict of at most {_MAX_LITERAL} bytes, got {len(line)}"
    try:
        return ast.literal_eval(line.decode("utf-8"))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        return f"expected a Python dict, got {shown(error, 100)}"


def record_names(file: SourceFile) -> list[str]:
    """The fields of the first thousand objects of a file."""
    names: dict[str, None] = {}
    for _, record in islice(records(file), _SAMPLE):
        names |= dict.fromkeys(record if isinstance(record, dict) else ())
    return list(names)


def record_rows(file: SourceFile, wanted: Sequence[str], ids: int = 2) -> Iterator[Rows]:
    """Fields of every object as text; the first ``ids`` have to be text, the others may be numbers or lack."""
    lines: list[int] = []
    cells: list[list[str | None]] = []
    malformed: list[Malformed] = []

    def block() -> Rows:
        columns = tuple(pa.array([row[place] for row in cells], pa.string()) for place in range(len(wanted)))
        return Rows(np.array(lines, np.int64), columns, malformed)

    for line, record in records(file):
        if isinstance(record, str):
            malformed.append(Malformed(line, record))
        else:
            row = [record.get(name) for name in wanted]
            if all(map(_is_id, row[:ids])):
                lines.append(line)
                cells.append([*row[:ids], *map(_as_text, row[ids:])])
            else:
                got = ", ".join(shown(value, 80) for value in row[:ids])
                malformed.append(Malformed(line, f"expected text in {' and '.join(wanted[:ids])}, got {got}"))
        if len(lines) + len(malformed) >= _SLICE:
            yield block()
            lines, cells, malformed = [], [], []
    yield block()


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()  # a lone surrogate is not printable


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value if value.isprintable() else value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else repr(value)
