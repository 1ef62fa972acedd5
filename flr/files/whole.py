"""Files and folders that are written whole or not at all, and JSON and Parquet read with checks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, AnyStr

import pyarrow as pa
import pyarrow.parquet as pq

PathLike = str | os.PathLike[str]
NOT_UTF8 = "\ufffd"  # what ``errors="replace"`` puts in the place of other bytes


@contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it takes the place of ``path`` only when the block ends without error.

    What writers of this path left behind when they were killed is removed.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary, descriptor = _claimed(lambda: _empty_file(final))
    try:
        yield temporary
        _share(temporary, 0o666)
        os.replace(temporary, final)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: PathLike) -> Iterator[Path]:
    """Yield a new folder beside ``path``, whose name it need not know; it is deleted when the block ends.

    What was left behind for the same ``path`` by processes that were killed is removed.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary, descriptor = _claimed(
        lambda: tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
    )
    try:
        _share(temporary, 0o777)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:  # locked to its end: nobody puts back what was replaced
            os.close(descriptor)


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that is renamed to ``path`` when the block ends without error.

    An older folder of that name is moved aside first and deleted last, so that no moment has a half-written one. Where
    a writer was killed in between, the next one puts the older folder back before it begins.
    """
    final = Path(path)
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(final.stat().st_mode):
            raise ValueError(f"path: expected a folder or a free name, got the file {final}")
    with temporary_folder(final) as temporary:
        yield temporary
        while not _take_place(temporary, final):
            pass  # another writer moved the folder, or put its own there, between two steps


def _take_place(temporary: Path, final: Path) -> bool:
    """Rename to ``final`` and delete what was there; False, with ``temporary`` as it was, if another came between."""
    if not final.exists():
        return _put(temporary, final)
    with temporary_folder(final) as aside:
        kept = aside / _OLD
        try:
            os.replace(final, kept)
        except FileNotFoundError:
            return False
        try:
            return _put(temporary, final)  # what is there otherwise is newer than what was moved aside
        except BaseException:
            os.replace(kept, final)
            raise


def _put(folder: Path, final: Path) -> bool:
    """Rename ``folder`` to ``final``; False where there is one by now."""
    try:
        os.replace(folder, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


_OLD = ".old"  # in a temporary folder: the folder that was replaced


def _claimed(make: Callable[[], str]) -> tuple[Path, int | None]:
    """A new temporary file or folder and the descriptor that locks it; without one on Windows.

    Until it is locked, another writer may take it for abandoned and remove it: then another one is made.
    """
    while True:
        temporary = Path(make())
        if os.name == "nt":
            return temporary, None
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        _lock(descriptor, wait=True)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _remove_abandoned(final: Path) -> None:
    """Delete temporary files and folders of ``final`` that nobody locks: whoever made them is dead."""
    name = re.compile(re.escape(f".{final.name}.") + r"[a-z0-9_]{8}\.tmp")
    for path in [path for path in final.parent.iterdir() if name.fullmatch(path.name)]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # gone meanwhile, or not ours
            continue
        try:
            if not _lock(descriptor):
                continue
            if (path / _OLD).is_dir() and not final.exists():
                _put(path / _OLD, final)  # or another writer's came first, and is newer
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file for as long as it is open; False where another has, or where there are no such locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _empty_file(final: Path) -> str:
    descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
    os.close(descriptor)
    return name


def _share(path: Path, mode: int) -> None:
    """Give ``path`` the mode of any other new file: temporary ones are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def naming(path: PathLike, what: str) -> Iterator[None]:
    """Around the reading of ``path``: whatever is wrong with its content becomes one ValueError that names it.

    Errors of the system and those that name the path already pass. ``what`` says what was expected.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, (OSError, ValueError)) and str(path) in str(error):
            raise
        if isinstance(error, ValueError) and ": expected " in text:
            raise ValueError(f"{path}: {text:.600}") from error
        raise ValueError(f"{path}: expected {what}, got {type(error).__name__}: {text:.300}") from error


def shown(value: Any, most: int = 300) -> str:
    """What a file holds, for an error: its repr, cut where it is long.

    >>> shown(["user", "item"]), shown("x" * 1000, most=8)
    ("['user', 'item']", "'xxxxxxx…")
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def check_regular(path: PathLike, what: str) -> None:
    """ValueError where ``path`` is no regular file: reading a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"path: expected {what} at {path}, got none") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise ValueError(f"path: expected {what} at {path}, got {kind}")


def read_json(path: PathLike, limit: int = 1 << 28) -> dict[str, Any]:
    """Read a JSON object of at most ``limit`` bytes; ValueError naming the file where it is anything else."""
    check_regular(path, "a JSON file")
    with open(path, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes, got more")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of too many digits and wrong encodings are ValueErrors
        raise ValueError(f"{path}: expected JSON, got {error!s:.300}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def sha256(path: PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    """Write ``table`` as one Parquet file with checksums, atomically."""
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_parquet(path: PathLike, columns: dict[str, Callable[[pa.DataType], bool]]) -> pa.Table:
    """Read a Parquet file and check that the named columns are there with a type that their test accepts.

    Raises:
        ValueError: naming the file, where it is missing, damaged, larger than ``_MAX_ROWS`` and ``_MAX_BYTES``
            (unpacked) by its own account, or has other columns.
    """
    check_regular(path, "a Parquet file")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.metadata
            size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
            if not (0 <= metadata.num_rows <= _MAX_ROWS and 0 <= size <= _MAX_BYTES):
                wanted = f"{path}: expected at most {_MAX_ROWS} rows and {_MAX_BYTES} bytes unpacked"
                raise ValueError(f"{wanted}, got {metadata.num_rows} and {size}")
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a Parquet file, got {' '.join(str(error).split()):.300}") from error
    for name, accepts in columns.items():
        if table.column_names.count(name) != 1:
            raise ValueError(f"{path}: expected one column {name!r}, got {shown(table.column_names)}")
        if not accepts(table.schema.field(name).type):
            raise ValueError(f"{path}: column {name!r}: expected another type, got {table.schema.field(name).type}")
    return table


_MAX_ROWS = 1 << 31
_MAX_BYTES = 1 << 37
