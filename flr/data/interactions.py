"""Interactions (one row = one prediction: a history and its next item) and the data set that bundles them."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from flr.files import PathLike, atomic_folder, naming, read_json, read_parquet, sha256, shown, write_json, write_parquet

from .catalogue import Catalogue
from .csr import CSR, as_int, check_whole, latest, user_bounds
from .events import read_events
from .frames import holds_text, pick
from .prepared_folder import FILES, FORMAT, ITEMS, META, PARTS, check_output
from .report import ReadReport

_VERSION = 1


class Interaction(NamedTuple):
    """One prediction: after ``history`` (oldest first) the user chose ``target``.

    ``row`` and ``epoch`` say which draw of a data set this is; augmentation derives its random numbers from them
    (see :class:`flr.data.SFTCollator`). Row -1: not from a data set.
    """

    user: str
    history: np.ndarray  # int32 [n], item indices, oldest first
    target: int
    timestamp: int | None = None
    row: int = -1
    epoch: int = 0


class Interactions:
    """Rows of (user, history, target, timestamp), held as arrays.

    Args:
        users: external user id of every row, strings (a user may have many rows).
        histories: :class:`CSR` of item indices, oldest first, or any sequence of integer sequences.
        targets: int32 [rows], the item that follows the history.
        timestamps: int64 [rows], seconds since 1970 of the target, or None.

    Raises:
        ValueError: users that are no text, lengths that differ, offsets that do not ascend, negative indices.

    Example:
        >>> rows = Interactions(["ann", "bob"], [[4, 2], [7]], [5, 2])
        >>> len(rows), rows[0].history.tolist(), rows[1].target
        (2, [4, 2], 2)
    """

    def __init__(
        self,
        users: Iterable[str],
        histories: CSR | Sequence[Sequence[int] | np.ndarray],
        targets: Any,
        timestamps: Any = None,
    ) -> None:
        self.users: list[str] = list(users)
        if others := {kind.__name__ for kind in set(map(type, self.users)) if not issubclass(kind, str)}:
            raise ValueError(f"users: expected ids as text, got {', '.join(sorted(others))}")
        csr = histories if isinstance(histories, CSR) else CSR.from_rows(histories)
        self.histories = CSR(
            as_int("histories.values", csr.values, np.int32), as_int("histories.offsets", csr.offsets, np.int64)
        )
        self.targets: np.ndarray = as_int("targets", targets, np.int32)
        self.timestamps: np.ndarray | None = None if timestamps is None else as_int("timestamps", timestamps, np.int64)
        rows, offsets = len(self.users), self.histories.offsets
        sizes = {"targets": len(self.targets), "histories": len(offsets) - 1}
        if self.timestamps is not None:
            sizes["timestamps"] = len(self.timestamps)
        for name, size in sizes.items():
            if size != rows:
                raise ValueError(f"{name}: expected one a user row ({rows}), got {size}")
        if offsets[0] != 0 or offsets[-1] != len(self.histories.values) or (np.diff(offsets) < 0).any():
            wanted = f"ascending from 0 to {len(self.histories.values)}"
            raise ValueError(f"histories.offsets: expected {wanted}, got {offsets[0]} to {offsets[-1]}")
        if rows and min(self.targets.min(), self.histories.values.min(initial=0)) < 0:
            raise ValueError("histories, targets: expected item indices >= 0, got a negative one")

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        catalogue: Catalogue,
        *,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        max_history: int = 10,
    ) -> Interactions:
        """Rows of a log in memory: every event with an earlier one of its user is a target.

        Args:
            frame: one row an event; pandas, polars, pyarrow, ``datasets.Dataset`` (see :mod:`flr.data.frames`).
            catalogue: the items; the log's ids, written as text, are ids of it.
            user, item, time: columns; None for "user_id" or "user", "item_id" or "item", "timestamp" or "time".
                Without a column of times the rows are in the order of time.
            max_history: items kept of a history, the latest ones.

        Returns:
            Rows by user in order of first appearance, then by time.

        Raises:
            ValueError: a column that is missing or of another type, a null, an item that the catalogue lacks.

        Example:
            >>> log = pa.table({"user_id": [7, 7, 7], "item_id": ["x", "y", "z"], "timestamp": [1, 3, 2]})
            >>> rows = Interactions.from_frame(log, Catalogue(["x", "y", "z"], ["Blue", "Green", "Red"]))
            >>> [(row.history.tolist(), row.target) for row in rows]
            [([0], 2), ([0, 2], 1)]
        """
        check_whole("max_history", max_history, 1)
        table = pick(frame, "frame", user=user, item=item, time=time)
        log = read_events(table, ReadReport("frame"), "frame", user=user, item=item, time=time)
        known = {item_id: index for index, item_id in enumerate(catalogue.item_ids)}
        if log.has_fractions:  # places among the times of this frame say nothing beside those of another one
            wanted = "times as whole numbers, dates, or s, ms, µs or ns since 1970"
            raise ValueError(f"frame: expected {wanted}, got fractions of an unknown unit")
        unknown = [item_id for item_id in log.item_ids if item_id not in known]
        if unknown:
            got = f"{unknown[0]!r} and {len(unknown) - 1} others that it lacks"
            raise ValueError(f"frame: expected items of the catalogue, got {got}")
        items = np.array([known[item_id] for item_id in log.item_ids], np.int32)
        order = log.order()
        users, chosen, times = log.users[order], items[log.items[order]], log.stamps(order)
        start, _ = user_bounds(users)
        rows = np.flatnonzero(np.arange(len(users)) > start)
        names = [log.user_names[number] for number in users[rows].tolist()]
        histories = latest(chosen, start, rows, max_history)
        return cls(names, histories, chosen[rows], None if times is None else times[rows])

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> Interaction:
        place = operator.index(index)
        position = place + len(self) if place < 0 else place
        if not 0 <= position < len(self):
            raise IndexError(f"index: expected below {len(self)}, got {index}")
        timestamp = None if self.timestamps is None else int(self.timestamps[position])
        return Interaction(
            self.users[position], self.histories.row(position), int(self.targets[position]), timestamp, position
        )

    def __iter__(self) -> Iterator[Interaction]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Interactions({len(self)} rows, {len(set(self.users))} users)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Interactions):
            return NotImplemented
        times, others = self.timestamps, other.timestamps
        return (
            self.users == other.users
            and np.array_equal(self.histories.values, other.histories.values)
            and np.array_equal(self.histories.offsets, other.histories.offsets)
            and np.array_equal(self.targets, other.targets)
            and (times is others if times is None or others is None else np.array_equal(times, others))
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def max_index(self) -> int:
        """The largest item index in use, -1 where there is no row."""
        return int(max(self.targets.max(initial=-1), self.histories.values.max(initial=-1)))

    def select(self, indices: Any) -> Interactions:
        """The rows at ``indices`` (integers, or a bool mask of every row), in that order."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"indices: expected a mask of shape ({len(self)},), got {chosen.shape}")
            chosen = np.flatnonzero(chosen)
        chosen = as_int("indices", chosen, np.int64)
        if chosen.size and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise ValueError(f"indices: expected within {len(self)} rows, got {chosen.min()}..{chosen.max()}")
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        return Interactions(
            [self.users[index] for index in chosen.tolist()],
            self.histories.take(chosen),
            self.targets[chosen],
            None if self.timestamps is None else self.timestamps[chosen],
        )

    def spread(self, most: int | None) -> Interactions:
        """``most`` of the rows, evenly spread over them; all where there are no more, or for None."""
        if most is not None:
            check_whole("most", most, 1, 2**63)
        if most is None or len(self) <= most:
            return self
        return self.select(np.arange(most, dtype=np.int64) * len(self) // most)

    def save(self, path: PathLike) -> None:
        """Write one Parquet file (user, history, target, timestamp), atomically."""
        columns = {
            "user": pa.array(self.users, pa.string()).dictionary_encode(),
            "history": pa.LargeListArray.from_arrays(
                pa.array(self.histories.offsets), pa.array(self.histories.values, pa.int32())
            ),
            "target": pa.array(self.targets, pa.int32()),
        }
        if self.timestamps is not None:
            columns["timestamp"] = pa.array(self.timestamps, pa.int64())
        metadata = {"flr": json.dumps({"kind": "interactions", "version": _VERSION})}
        write_parquet(path, pa.table(columns).replace_schema_metadata(metadata))

    @classmethod
    def load(cls, path: PathLike) -> Interactions:
        """Read what :meth:`save` wrote."""
        table = read_parquet(
            path,
            {
                "user": holds_text,
                "history": lambda kind: pa.types.is_large_list(kind) or pa.types.is_list(kind),
                "target": pa.types.is_integer,
            },
        )
        with naming(path, "the rows that were saved"):
            for name in table.column_names:
                if table[name].null_count:
                    raise ValueError(f"{path}: column {name!r}: expected no nulls, got {table[name].null_count}")
            history = table["history"].combine_chunks()
            if isinstance(history, pa.ChunkedArray):  # an empty table keeps its (absent) chunks
                history = pa.concat_arrays(history.chunks) if history.num_chunks else pa.array([], history.type)
            offsets = history.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            values = history.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
            return cls(
                table["user"].to_pylist(),
                CSR(values, offsets - offsets[0]),
                table["target"].to_numpy(),
                table["timestamp"].to_numpy() if "timestamp" in table.column_names else None,
            )


@dataclass
class RecDataset:
    """A catalogue with its training, validation and test rows.

    Attributes:
        report: what was read, what was refused and what to know about the split.

    Raises:
        ValueError: a row names an item past the catalogue.
    """

    catalogue: Catalogue
    train: Interactions
    valid: Interactions
    test: Interactions
    name: str = ""
    report: ReadReport = field(default_factory=ReadReport)

    def __post_init__(self) -> None:
        for part in PARTS:
            highest = getattr(self, part).max_index
            if highest >= len(self.catalogue):
                raise ValueError(f"{part}: expected item indices below {len(self.catalogue)}, got {highest}")

    def __repr__(self) -> str:
        rows = f"{len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test rows"
        return f"RecDataset({self.name!r}: {len(self.catalogue)} items; {rows})"

    def save(self, path: PathLike) -> None:
        """Write a prepared folder (items, train, valid, test as Parquet; meta.json), whole or not at all.

        Raises:
            ValueError: ``path`` is a folder that holds anything else, which would be lost: what may be replaced is
                what this method and ``flr sids`` wrote.
        """
        with atomic_folder(check_output(path)) as folder:
            self.catalogue.save(folder / ITEMS)
            for part in PARTS:
                getattr(self, part).save(folder / f"{part}.parquet")
            files = {file: sha256(folder / file) for file in FILES}
            meta = {"format": FORMAT, "version": _VERSION, "name": self.name, "report": self.report.to_dict()}
            write_json(folder / META, {**meta, "sha256": files})

    @classmethod
    def load(cls, path: PathLike) -> RecDataset:
        """Read a prepared folder; ValueError where a file is missing or was not written by :meth:`save`."""
        folder = Path(path)
        meta = read_json(folder / META)
        if meta.get("format") != FORMAT or meta.get("version") != _VERSION:
            got = f"{shown(meta.get('format'))} version {shown(meta.get('version'))}"
            raise ValueError(f"{folder / META}: expected format {FORMAT!r} version {_VERSION}, got {got}")
        expected = meta.get("sha256", {})  # absent in older folders
        for file in FILES if expected else ():
            if (folder / file).is_file() and (
                not isinstance(expected, dict) or expected.get(file) != sha256(folder / file)
            ):
                raise ValueError(f"{folder / file}: expected the file that was saved with meta.json, got another one")
        with naming(folder / META, "the report of a reading"):
            report = ReadReport.from_dict(meta.get("report", {}))
        catalogue = Catalogue.load(folder / ITEMS)
        train, valid, test = (Interactions.load(folder / f"{part}.parquet") for part in PARTS)
        with naming(folder, "parts of one data set"):
            return cls(catalogue, train, valid, test, str(meta.get("name", "")), report)
