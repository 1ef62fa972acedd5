"""One entry for every form of data on disk: :func:`load_dataset`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flr.files import PathLike

from .interactions import RecDataset
from .published import is_published, read_published
from .recbole import inter_files, read_recbole
from .tables import LOG_NAME, read_tables

_READERS: dict[str, Callable[..., RecDataset]] = {
    "prepared": RecDataset.load,
    "csv": read_published,
    "recbole": read_recbole,
    "parquet": read_tables,
}


def load_dataset(path: PathLike | Any, format: str = "auto", **options: Any) -> RecDataset:
    """Read a data set.

    Args:
        path: a folder, or a file for "recbole" (.inter) and "parquet" (the log); or the log itself, one row an event,
            as a pandas, polars or pyarrow table or a ``datasets.Dataset``, with the options of
            :func:`flr.data.tables.read_tables`: ``items`` (a table or a file), ``user``, ``item``, ``time``, ``title``.
        format: "auto" looks at what is there; "prepared" is what :meth:`RecDataset.save` wrote, "csv" the published CSV
            form (:func:`flr.data.published.read_published`), "recbole" atomic files
            (:func:`flr.data.recbole.read_recbole`), "parquet" a log and its items
            (:func:`flr.data.tables.read_tables`). Raw Amazon reviews need a filter and a metadata file: see
            :func:`flr.data.prepare_amazon`.
        options: of that reader, e.g. ``max_bad_share``, ``split``, ``max_history``, ``min_interactions``.

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
        >>> load_dataset(log, items=pa.table({"item_id": [1, 2, 3, 4], "title": ["A", "B", "C", "D"]}))
        RecDataset('pyarrow': 4 items; 10 train, 1 valid, 1 test rows)
    """
    if not isinstance(path, (str, os.PathLike)):
        if format != "auto":
            raise ValueError(f"format: expected 'auto' for a table in memory, got {format!r}")
        return _read(read_tables, path, "tables", options)
    place = Path(path)
    if not place.exists():
        raise ValueError(f"path: expected a folder or a file, got nothing at {place}")
    if format == "auto":
        format = _detect(place)
    if format not in _READERS:
        raise ValueError(f"format: expected one of {['auto', *_READERS]}, got {format!r}")
    return _read(_READERS[format], place, repr(format), options)


def _read(reader: Callable[..., RecDataset], source: Any, form: str, options: dict[str, Any]) -> RecDataset:
    known = list(inspect.signature(reader).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"options: expected {known or 'none'} for format {form}, got {option!r}")
    return reader(source, **options)


def _detect(place: Path) -> str:
    if (place / "meta.json").is_file():
        return "prepared"
    if place.is_dir() and is_published(place):
        return "csv"
    if place.suffix == ".inter" or inter_files(place):
        return "recbole"
    if place.suffix == ".parquet" or (place / LOG_NAME).is_file():
        return "parquet"
    names = sorted(file.name for file in place.iterdir())[:10] if place.is_dir() else place.name
    raise ValueError(
        f"path: expected meta.json (prepared), items.txt and test.csv (published CSV), one .inter file (RecBole) or "
        f"{LOG_NAME} (Parquet) in {place}, got {names}"
    )
