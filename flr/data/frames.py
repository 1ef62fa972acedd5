"""Tables held in memory: pandas, polars, pyarrow and ``datasets.Dataset``, lazy ones too, by one entrance and one exit.

Everything inside is a pyarrow table; narwhals does the reading. A frame's columns are checked when they are read as ids
(text or integers) or as times (numbers, dates or timestamps), and errors name the table and the column.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from narwhals.exceptions import NarwhalsError

from flr.files import shown

KINDS = ("pandas", "polars", "pyarrow", "datasets")
#: What a column may be called where it is not named.
ALIASES = {
    "user": ("user_id", "user"),
    "item": ("item_id", "item"),
    "time": ("timestamp", "time"),
    "title": ("title",),
    "sid": ("sid",),
}
#: The dtype of a column of text: each value has its own length, where NumPy's ``str`` makes all as wide as the longest.
TEXT = np.dtypes.StringDType()
_LATEST = 2.0**53  # a float is a whole number exactly up to here
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_frame(value: Any) -> bool:
    """Whether :func:`as_table` takes ``value``."""
    try:
        return _is_dataset(value) or isinstance(nw.from_native(value, pass_through=True), (nw.DataFrame, nw.LazyFrame))
    except NarwhalsError:  # a frame, but a bad one
        return True


def kind_of(frame: Any) -> str:
    """One of ``KINDS``; lazy frames and others count as the eager kind that is nearest."""
    if _is_dataset(frame):
        return "datasets"
    implementation = nw.from_native(frame).implementation
    return next((kind for kind in ("pandas", "polars") if getattr(implementation, f"is_{kind}")()), "pyarrow")


def as_table(frame: Any, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A frame as a pyarrow table; a lazy one is computed.

    Args:
        frame: pandas, polars (lazy too), pyarrow, ``datasets.Dataset``, or another that narwhals knows.
        name: what errors call it.
        columns: those that are wanted, all by default; the others are not converted.

    Raises:
        ValueError: no frame, two columns of one name, or a column with values of several types.

    Example:
        >>> as_table(pa.table({"user_id": ["ann"], "price": [0.5]}), "log", ["user_id"]).column_names
        ['user_id']
    """
    if _is_dataset(frame):
        chosen = frame if columns is None else frame.select_columns(list(columns))
        return chosen.with_format("arrow")[:]
    if not is_frame(frame):
        wanted = "a pandas, polars or pyarrow table, or a datasets.Dataset"
        hint = _split_hint(frame)
        raise ValueError(f"{name}: expected {wanted}, got {type(frame).__name__}{hint}")
    try:
        table = nw.from_native(frame)
        table = table if columns is None else table.select(*columns)
        if isinstance(table, nw.LazyFrame):
            return table.collect("pyarrow").to_native()
        return table.to_arrow()
    except (NarwhalsError, pa.ArrowException, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: expected different columns, each of one type, got {reason}") from error


def column_names(frame: Any, name: str) -> list[str]:
    """Names of a frame's columns; errors as those of :func:`as_table`."""
    if _is_dataset(frame):
        return list(frame.column_names)
    if isinstance(frame, pa.Table) or not is_frame(frame):
        table = frame if isinstance(frame, pa.Table) else as_table(frame, name)
        return list(table.column_names)
    try:
        return list(nw.from_native(frame).collect_schema().names())
    except NarwhalsError as error:
        raise ValueError(f"{name}: expected different columns, got {' '.join(str(error).split())}") from error


def find_column(names: Sequence[str], role: str, asked: str | None, name: str) -> str:
    """The column for a role: the one ``asked`` for, else the one that bears a usual name.

    Args:
        names: of all columns.
        role: a key of ``ALIASES``, the name of the argument too.
        asked: the column that the caller named, or None.
        name: of the table, for errors.

    Raises:
        ValueError: no such column, two of that name, or several usual names where none was asked for.

    Example:
        >>> find_column(["user_id", "price"], "user", None, "log")
        'user_id'
    """
    wanted = ALIASES[role] if asked is None else (asked,)
    found = [column for column in wanted if column in names]
    if not found:
        raise ValueError(f"{name}: expected a column {' or '.join(wanted)} ({role}=), got {shown(list(names))}")
    if len(found) > 1:
        raise ValueError(f"{name}: expected one column for {role}, got {found}; choose with {role}=")
    if list(names).count(found[0]) > 1:
        raise ValueError(f"{name}: expected one column {found[0]!r}, got {list(names).count(found[0])}")
    return found[0]


def has_column(names: Sequence[str], role: str, asked: str | None) -> bool:
    """Whether there is a column to look for: one was asked for, or one bears a usual name."""
    return asked is not None or any(column in names for column in ALIASES[role])


def pick(frame: Any, name: str, **roles: str | None) -> pa.Table:
    """The columns of a frame that play a role, as a table.

    Args:
        frame: as for :func:`as_table`.
        name: of the frame, for errors.
        roles: the columns asked for by role, None for the usual names; "user" and "item" are needed, others may lack.
    """
    names = column_names(frame, name)
    wanted = [role for role, asked in roles.items() if role in ("user", "item") or has_column(names, role, asked)]
    return as_table(frame, name, list(dict.fromkeys(find_column(names, role, roles[role], name) for role in wanted)))


def id_column(table: pa.Table, column: str, name: str) -> pa.Array:
    """A column of text or integers as text; nulls stay nulls."""
    values = _flat(table[column])
    kind = values.type
    if pa.types.is_decimal(kind) and kind.scale == 0:  # integers of a database
        values, kind = values.cast(pa.string()), pa.string()
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        hint = ""
        if pa.types.is_floating(kind):
            hint = " (pandas turns integers beside missing values into floats: use the type Int64)"
        raise ValueError(f"{name}: column {column!r}: expected text or integers, got {kind}{hint}")
    return values.cast(pa.large_string())


def time_column(table: pa.Table, column: str, name: str) -> tuple[pa.Array, int | None]:
    """Times as int64 or float64, and how many of their unit are a second (None where the unit is not known).

    Timestamps with a zone are moments; those without, and dates, are taken as UTC.
    """
    values = _flat(table[column])
    kind = values.type
    if pa.types.is_date(kind):
        values, kind = values.cast(pa.timestamp("s")), pa.timestamp("s")
    if pa.types.is_timestamp(kind):
        return values.cast(pa.int64()), _PER_SECOND[kind.unit]
    if pa.types.is_floating(kind):
        return values.cast(pa.float64()), None
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        try:
            return values.cast(pa.int64()), None
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name}: column {column!r}: expected times that fit int64, got {error}") from error
    raise ValueError(f"{name}: column {column!r}: expected numbers, dates or timestamps, got {kind}")


def missing_rows(values: pa.Array) -> np.ndarray:
    """bool [rows]: nulls, empty text, and floats that are no time (NaN, infinite, 2^53 and more)."""
    if is_text(values.type):
        missing = pc.fill_null(pc.equal(values, ""), True)
    elif pa.types.is_floating(values.type):
        missing = pc.invert(pc.fill_null(pc.less(pc.abs(values), _LATEST), False))
    else:
        missing = pc.is_null(values)
    return missing.to_numpy(zero_copy_only=False).astype(bool)


def codes(values: pa.Array, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers in order of first appearance, int64 [rows], and the texts that they stand for."""
    encoded = values.take(pa.array(rows)).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def plain_array(values: pa.ChunkedArray | pa.Array) -> np.ndarray | None:
    """A column of numbers, bools, text or moments (as seconds since 1970) without nulls; None for any other."""
    flat = _flat(values)
    if flat.null_count or pa.types.is_null(flat.type):
        return None
    if pa.types.is_date(flat.type) or pa.types.is_timestamp(flat.type):
        ticks, per_second = time_column(pa.table({"time": flat}), "time", "time")
        return np.asarray(ticks.to_numpy(zero_copy_only=False) // (per_second or 1))
    if is_text(flat.type):
        return np.array(flat.to_pylist(), TEXT)
    if any(test(flat.type) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
        return flat.to_numpy(zero_copy_only=False)
    return None


def is_text(kind: pa.DataType) -> bool:
    """Whether a type of Arrow is text, in any of its layouts (string views are new in pyarrow 16)."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of a type of Arrow are text, as they are or as categories; a list of texts is none."""
    return is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def without_views(table: pa.Table) -> pa.Table:
    """The same table with string views as large strings, in lists too: pyarrow's functions lack them.

    >>> without_views(pa.table({"x": pa.array(["a"]).cast(pa.string_view())})).schema.field("x").type
    DataType(large_string)
    """
    for place, field in enumerate(table.schema):
        kind = field.type
        values = getattr(kind, "value_type", kind)
        if str(values) == "string_view":
            wanted = pa.large_string() if values is kind else pa.large_list(pa.large_string())
            table = table.set_column(place, field.name, table.column(place).cast(wanted))
    return table


def to_frame(table: pa.Table, kind: str | None = None, *, like: Any = None) -> Any:
    """A pyarrow table as a frame of another kind.

    Args:
        table: what to convert.
        kind: "pandas", "polars", "pyarrow" or "datasets".
        like: a frame of the kind that is wanted, instead of ``kind``.

    Raises:
        ValueError: an unknown kind, or not exactly one of ``kind`` and ``like``.
        ModuleNotFoundError: the library of that kind is not installed.

    Example:
        >>> to_frame(pa.table({"item_id": ["a"]}), "pyarrow").column_names
        ['item_id']
    """
    if (kind is None) == (like is None):
        raise ValueError(f"kind: expected one of {KINDS}, or like=, got kind={kind!r} and {type(like).__name__}")
    if like is not None and not is_frame(like):
        raise ValueError(f"like: expected a frame, got {type(like).__name__}")
    kind = kind_of(like) if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    try:
        if kind == "datasets":
            from datasets import Dataset

            return Dataset(table)
        frame = nw.from_native(table, eager_only=True)
        if kind == "pyarrow":
            return table
        return frame.to_pandas() if kind == "pandas" else frame.to_polars()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"kind: expected {kind} to be installed, got {error}", name=kind) from None


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array without dictionary."""
    if isinstance(column, pa.ChunkedArray):
        column = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_dataset(value: Any) -> bool:
    """``datasets.Dataset``, without importing that library."""
    datasets = sys.modules.get("datasets")
    return isinstance(value, getattr(datasets, "Dataset", ()))


def _split_hint(value: Any) -> str:
    datasets = sys.modules.get("datasets")
    if isinstance(value, getattr(datasets, "IterableDataset", ())):
        return "; load it without streaming"
    if isinstance(value, dict):  # a DatasetDict, or columns
        return f" with keys {list(value)[:8]}; choose one, or make a table of them"
    return ""
