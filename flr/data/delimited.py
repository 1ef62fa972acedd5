"""Tables of text, one row a line: CSV, TSV, ``a::b::c``, RecBole's atomic files.

Blocks of lines without a quote or a fault go through pyarrow; where there is one, Python reads the same lines with care
and says which are malformed. Both give the same rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from flr.files import shown

from .sources import MAX_LINE, SourceFile, line_blocks

DELIMITERS = ("\t", "::", ",", ";", "|", " ")
_UNIT = "\x1f"  # stands for "::" where one character is wanted
_SLICE = 1 << 16  # rows that Python reads at a time


class Malformed(NamedTuple):
    """A row that cannot be read: its first line, why, and the lines that it takes."""

    line: int
    reason: str
    rows: int = 1


class Rows(NamedTuple):
    """Some rows of a file: their lines int64 [n], their cells as text [n] by column, and what is malformed beside."""

    lines: np.ndarray
    columns: tuple[pa.Array, ...]
    malformed: list[Malformed]


@dataclass(frozen=True)
class Dialect:
    """How a table of text is written.

    Attributes:
        delimiter: between cells; "::" or one character.
        names: the columns.
        quoted: whether a cell may stand in double quotes.
        header: whether the first line names the columns.
        latin: whether a line that is not UTF-8 is Latin-1.
    """

    delimiter: str
    names: tuple[str, ...]
    quoted: bool = True
    header: bool = True
    latin: bool = False


def first_line(file: SourceFile) -> str:
    """The first line of a file, without its end.

    Raises:
        ValueError: an empty file, or a line without end.
    """
    for _, block in line_blocks(file):
        if block is None:
            break
        text = block.lstrip(b"\r\n").split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", "replace")
        if text:
            return text
    raise ValueError(f"{file}: expected a header, got an empty file")


def sniff(file: SourceFile) -> Dialect:
    """The dialect of a file with a header: the delimiter that gives most columns."""
    line = first_line(file)
    choices = [(delimiter, _header_cells(line, delimiter)) for delimiter in DELIMITERS]
    delimiter, names = max(choices, key=lambda choice: len(choice[1]))
    return Dialect(delimiter, tuple(names), quoted=delimiter != "::")


def _header_cells(line: str, delimiter: str) -> list[str]:
    if len(delimiter) > 1 or '"' not in line:
        return [cell.strip() for cell in line.split(delimiter)]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True))]
    except csv.Error:
        return [line]


def read_rows(file: SourceFile, dialect: Dialect, wanted: Sequence[str]) -> Iterator[Rows]:
    """The columns ``wanted`` of every row that has one cell a column; blank lines do not count."""
    for name in wanted:
        if dialect.names.count(name) != 1:
            got = shown(list(dialect.names))
            raise ValueError(f"{file}: expected one column {name!r}, got {got}")
    places = [dialect.names.index(name) for name in wanted]
    blocks = _without_header(line_blocks(file)) if dialect.header else line_blocks(file)
    for number, block in blocks:
        if block is None:
            reason = f"expected {len(dialect.names)} cells, got more than {MAX_LINE} characters"
            yield _rows([], [], places, [Malformed(number, reason)])
        elif dialect.quoted and b'"' in block:  # a cell may go over lines, and over blocks: Python reads to the end
            yield from _quoted(chain([(number, block)], blocks), dialect, places)
            return
        else:
            quick = _quick(number, block, dialect, places)
            yield _slow(number, block, dialect, places) if quick is None else quick


def _without_header(blocks: Iterator[tuple[int, bytes | None]]) -> Iterator[tuple[int, bytes | None]]:
    for number, block in blocks:
        if block is None:  # cannot be: the header was read before
            continue
        content = block.lstrip(b"\r\n")
        number += block.count(b"\n", 0, len(block) - len(content))
        if not content:
            continue
        rest = content.partition(b"\n")[2]
        if rest:
            yield number + 1, rest
        break
    yield from blocks


def _quick(number: int, block: bytes, dialect: Dialect, places: list[int]) -> Rows | None:
    """The rows of a block by pyarrow, None where a line needs care."""
    delimiter = dialect.delimiter
    if delimiter == "::":
        if _UNIT.encode() in block or b":::" in block:
            return None
        block, delimiter = block.replace(b"::", _UNIT.encode()), _UNIT
    count = block.count(b"\n") + (not block.endswith(b"\n"))
    if block.count(b"\r") != block.count(b"\r\n"):  # pyarrow ends a line there
        return None
    names = [str(place) for place in range(len(dialect.names))]
    chosen = list(dict.fromkeys(names[place] for place in places))
    try:
        table = pacsv.read_csv(
            pa.BufferReader(block),
            pacsv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            pacsv.ParseOptions(delimiter=delimiter, quote_char=False, double_quote=False),
            pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=chosen),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != count:  # blank lines
        return None
    columns = tuple(_one(table[names[place]]) for place in places)
    return Rows(np.arange(number, number + count), columns, [])


def _one(column: pa.ChunkedArray) -> pa.Array:
    chunks = column.chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())


def _slow(number: int, block: bytes, dialect: Dialect, places: list[int]) -> Rows:
    """The rows of a block without quotes, line by line."""
    size = len(dialect.names)
    lines, cells, malformed = [], [], []
    for line, text in enumerate(_text(block, dialect).split("\n"), number):
        text = text.rstrip("\r")
        if not text:
            continue
        row = text.split(dialect.delimiter)
        if len(row) == size:
            lines.append(line)
            cells.append(row)
        else:
            malformed.append(Malformed(line, f"expected {size} cells, got {len(row)} cells"))
    return _rows(lines, cells, places, malformed)


def _quoted(blocks: Iterator[tuple[int, bytes | None]], dialect: Dialect, places: list[int]) -> Iterator[Rows]:
    """The rows of the rest of a file in which cells may be quoted."""
    number, first = next(blocks)

    def texts() -> Iterator[str]:
        for _, block in chain([(number, first)], blocks):
            yield from ["\x00" * (csv.field_size_limit() + 1)] if block is None else _lines(_text(block, dialect))

    reader = csv_rows(csv.reader(texts(), delimiter=dialect.delimiter, strict=True), number)
    size = len(dialect.names)
    lines, cells, malformed = [], [], []
    for line, row, error, taken in reader:
        if error is None and len(row) == size:
            lines.append(line)
            cells.append(row)
        else:
            reason = error or f"expected {size} cells, got {len(row)} cells"
            malformed.append(Malformed(line, reason, taken))
        if len(lines) + len(malformed) >= _SLICE:
            yield _rows(lines, cells, places, malformed)
            lines, cells, malformed = [], [], []
    yield _rows(lines, cells, places, malformed)


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends; only a line feed ends one, as elsewhere here."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def csv_rows(reader: Any, start: int = 1) -> Iterator[tuple[int, list[str], str | None, int]]:
    """(first line, cells, error, lines taken) of every row that is not blank; csv's own errors do not end the file."""
    before = 0
    while True:
        try:
            cells, error = next(reader), None
        except StopIteration:
            return
        except csv.Error as problem:
            cells, error = [], str(problem)
        line, lines, before = before + start, max(reader.line_num - before, 1), reader.line_num
        if cells or error:
            yield line, cells, error, lines


def _rows(lines: list[int], cells: list[list[str]], places: list[int], malformed: list[Malformed]) -> Rows:
    columns = (pa.array([row[place] for row in cells], pa.string()) for place in places)
    return Rows(np.array(lines, np.int64), tuple(columns), malformed)


def _text(block: bytes, dialect: Dialect) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError:
        return block.decode("latin-1") if dialect.latin else block.decode("utf-8", "replace")
