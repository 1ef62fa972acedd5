"""One worker: a model that is loaded once, and shards that it turns into parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from flr.recommend import Recommendation, Recommender

from .inputs import read_rows, used_columns
from .plan import Plan, Shard
from .queries import Asked, RowReader
from .storage import Place

_LONGEST = 500  # characters of a reason


@dataclass(frozen=True)
class Outcome:
    """What became of a shard.

    Attributes:
        shard: its number.
        users: lists that were written; 0 where it failed.
        seconds: that it took.
        reason: why it failed; None where it is done.
    """

    shard: int
    users: int
    seconds: float
    reason: str | None = None


class Worker:
    """Computes shards of a plan, with its own model.

    Args:
        plan: of the run.
        device: where the model is put, as torch names it.

    Raises:
        OSError, ValueError: the model cannot be loaded, is not that of the plan (any more), or its catalogue lacks an
            attribute that a column filters by.
    """

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan = plan
        loading: dict[str, Any] = {**plan.hub, **plan.settings.loading()}
        self.recommender = Recommender.from_pretrained(plan.model, device, **loading)
        plan.check_here()  # once it is loaded: it may have been replaced since the plan was made
        self.reader = RowReader(self.recommender, plan.settings)
        self.recommender.check(plan.settings.k, plan.settings.beams, plan.settings.scoring)
        if plan.files:
            self.reader.check(self._columns)

    @cached_property
    def _columns(self) -> list[str]:
        settings, url = self.plan.settings, self.plan.files[0].url
        with Place.of(url).parquet() as file:
            return list(used_columns(file.schema_arrow, url, settings.user, settings.history))

    def __call__(self, shard: Shard) -> Outcome:
        """Compute a shard and write its part; whatever goes wrong with it is the outcome's reason."""
        began = time.monotonic()
        try:
            with threads(self.plan.settings.threads):
                self.plan.part(shard).write_parquet(self.lists(shard))
        except Exception as error:
            text = " ".join(str(error).split())
            told = text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
            return Outcome(shard.number, 0, time.monotonic() - began, told[:_LONGEST])
        return Outcome(shard.number, shard.users, time.monotonic() - began)

    def lists(self, shard: Shard) -> pa.Table:
        """A row a user: the user as in the input, item_ids and scores best first, and unknown names that were skipped.

        A function of the plan and the shard, whoever computes it: which users are computed together depends on the
        lengths of their prompts and their order in the shard alone.
        """
        users, asked = self._rows(shard)
        settings = self.plan.settings
        found: dict[int, list[Recommendation]] = {}
        for rows in self.recommender.parts([one.history for one in asked], settings.beams):
            queries = [self.reader.query(asked[row]) for row in rows]
            answers, _ = self.recommender.ranked(queries, settings.beams, settings.scoring, shares=False)  # type: ignore[arg-type]
            found.update(zip(rows, answers, strict=True))
        lists = [found[row] for row in range(len(asked))]
        columns = {
            self.plan.user: users,
            "item_ids": pa.array([[item.item_id for item in items] for items in lists], pa.list_(pa.string())),
            "scores": pa.array([[item.score for item in items] for items in lists], pa.list_(pa.float32())),
            "unknown": pa.array([one.unknown for one in asked], pa.int32()),
        }
        return pa.table(columns).replace_schema_metadata(self.plan.metadata(shard))

    def _rows(self, shard: Shard) -> tuple[pa.ChunkedArray, list[Asked]]:
        """The users of a shard, and what they ask."""
        source = self.plan.files[shard.file]
        place, row = Place.of(source.url), shard.first
        users: list[pa.Array] = []
        asked: list[Asked] = []
        with place.parquet() as file:
            size = place.system.size(place.path)
            if (size, file.metadata.num_rows) != (source.size, source.rows):
                wanted = f"the file of the plan, {source.size} bytes and {source.rows} rows"
                raise ValueError(f"{source.url}: expected {wanted}, got {size} and {file.metadata.num_rows}")
            for piece in read_rows(file, shard.first, shard.last, self._columns):
                column = piece.column(self.plan.user)
                if column.null_count:
                    place_of = row + column.is_null().index(True).as_py()
                    raise ValueError(f"{source.url}: row {place_of}: {self.plan.user}: expected a user, got null")
                users.append(column)
                asked += self.reader.read(piece, source.url, row)
                row += len(piece)
        if row != shard.last:
            raise ValueError(f"{source.url}: expected rows to {shard.last}, got {row}")
        return pa.chunked_array(users), asked


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within the block torch computes with that many threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
