"""Files that are written whole or not at all, and JSON and Parquet read with checks."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr

import pyarrow as pa
import pyarrow.parquet as pq

PathLike = str | os.PathLike[str]


@contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it takes the place of ``path`` only when the block ends without error."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _share(temporary, 0o666)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that is renamed to ``path`` when the block ends without error.

    An older folder of that name is moved aside first and deleted last, so that no moment has a half-written one.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists() and not final.is_dir():
        raise ValueError(f"path: expected a folder or a free name, got the file {final}")
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    _share(temporary, 0o777)
    aside: Path | None = None
    try:
        yield temporary
        if final.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
            os.replace(final, aside / "old")
        os.replace(temporary, final)
    except BaseException:
        if aside is not None and not final.exists() and (aside / "old").exists():
            os.replace(aside / "old", final)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _share(path: Path, mode: int) -> None:
    """Give ``path`` the mode of any other new file: temporary ones are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: PathLike, limit: int = 1 << 26) -> dict[str, Any]:
    """Read a JSON object of at most ``limit`` bytes.

    Raises:
        ValueError: naming the file, where it is missing, longer, not JSON or no object.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"{path}: expected at most {limit} bytes, got more")
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"path: expected a JSON file at {path}, got none") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def bounded_lines(stream: IO[AnyStr], limit: int) -> Iterator[tuple[int, AnyStr | None]]:
    """(number from 1, line with its end) of every line of ``stream``; None for a line longer than ``limit``."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        whole = len(line) <= limit
        while line and not whole and line[-1:] not in ("\n", b"\n"):
            line = stream.readline(limit + 1)
        yield number, line if whole else None


def write_parquet(path: PathLike, table: pa.Table) -> None:
    """Write ``table`` as one Parquet file, atomically."""
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_parquet(path: PathLike, columns: dict[str, Callable[[pa.DataType], bool]]) -> pa.Table:
    """Read a Parquet file and check that the named columns are there with a type that their test accepts."""
    if not Path(path).is_file():
        raise ValueError(f"path: expected a Parquet file at {path}, got none")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: expected a Parquet file, got {error}") from error
    for name, accepts in columns.items():
        if name not in table.column_names:
            raise ValueError(f"{path}: expected a column {name!r}, got {table.column_names}")
        if not accepts(table.schema.field(name).type):
            raise ValueError(f"{path}: column {name!r}: expected another type, got {table.schema.field(name).type}")
    return table
