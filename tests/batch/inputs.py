"""A small model in a folder, and histories with every kind of filter in Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tests.helpers.models import build_recommender

ITEMS, USERS = 40, 46
OPTIONS = {"k": 6, "num_beams": 10, "shard_size": 8}
SHARDS = 6  # 30 and 16 users, at most 8 a shard


def save_model(folder: Path, **options: Any) -> str:
    build_recommender("sid", **options).save_pretrained(folder)
    return str(folder)


def histories(seed: int = 0) -> pa.Table:
    """Users with histories of 0 to 13 items, titles among them, and filters, where they are not null."""
    rng = np.random.default_rng(seed)

    def names(most: int) -> list[str]:
        return [f"item_{i}" for i in rng.integers(0, ITEMS, rng.integers(0, most))]

    def sometimes(value: object) -> object:
        return value if rng.random() < 0.4 else None

    rows = range(USERS)
    return pa.table(
        {
            "user_id": pa.array([1000 + row for row in rows], pa.int64()),
            "history": [names(14) for _ in rows],
            "allow": pa.array([sometimes([*names(20), "item_1"]) for _ in rows], pa.list_(pa.string())),
            "deny": pa.array([sometimes(names(5)) for _ in rows], pa.large_list(pa.string())),
            "exclude_seen": pa.array([sometimes(bool(rng.random() < 0.5)) for _ in rows], pa.bool_()),
            "where.interest": pa.array(
                [sometimes([0, 2, int(rng.integers(0, 4))]) for _ in rows], pa.list_(pa.int64())
            ),
        }
    )


def write_histories(folder: Path, table: pa.Table | None = None) -> str:
    """Two files with small row groups."""
    table = histories() if table is None else table
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, 30), folder / "a.parquet", row_group_size=7)
    pq.write_table(table.slice(30), folder / "b.parquet", row_group_size=100)
    return str(folder)


def read_lists(folder: Path | str) -> list[dict]:
    """All rows of an output in the order of its parts, as any reader of Parquet folders finds them."""
    return ds.dataset(str(folder), format="parquet").to_table().to_pylist()
