"""The result of an evaluation: ranks, metrics with intervals, files, a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.table import Table
from rich.text import Text

from flr.files import write_json, write_parquet

from .metrics import (
    COVERAGE_CUTOFF,
    Difference,
    Interval,
    bootstrap_intervals,
    coverage,
    paired_difference,
    rank_metrics,
    row_metrics,
)

Level = Literal["item", "title"]

_LEVELS: tuple[Level, ...] = ("item", "title")
_KEPT = ("name", "num_items", "settings", "samples", "seed")  # beside the rows, in both files
_TRAIT = "trait_"  # what columns of traits are called by
_TABLE_METRICS = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


@dataclass
class EvalResult:
    """Ranks of an evaluation and what follows from them.

    Attributes:
        name: of the model, for tables.
        users: user id of every row, in the order of the interactions; rows of one user are resampled together.
        targets: int64 [n] item indices.
        ranks: "item" and "title": int64 [n], 1 is best, 0 not given (see :mod:`flr.evaluate.metrics`).
        items, scores: int64 and float32 [n, k]: the items given to each row, best first, -1 / -inf past the end.
        num_items: C.
        settings: how it was made.
        traits: int64 [n] by name, of every row: "history_length" in items, and "target_popularity", how often its
            target is one in training, where that is known.
        metrics: by level ("item", "title") and name ("hr@10", "ndcg@10", "mrr", …); "item" has coverage@10 too.
        intervals: bootstrap intervals of the same, coverage excepted.
    """

    name: str
    users: list[str]
    targets: np.ndarray
    ranks: dict[str, np.ndarray]
    items: np.ndarray
    scores: np.ndarray
    num_items: int
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(init=False)
    intervals: dict[str, dict[str, Interval]] = field(init=False)
    samples: int = 1000
    seed: int = 0
    traits: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = {level: rank_metrics(ranks) for level, ranks in self.ranks.items()}
        self.intervals = {
            level: bootstrap_intervals(row_metrics(ranks), self.users, self.samples, seed=self.seed)
            for level, ranks in self.ranks.items()
        }
        self.metrics["item"][f"coverage@{COVERAGE_CUTOFF}"] = coverage(self.items, self.num_items)

    def __len__(self) -> int:
        return len(self.users)

    def __repr__(self) -> str:
        m = self.metrics["item"]
        return f"EvalResult({self.name!r}, {len(self)} rows, hr@10={m['hr@10']:.4f}, ndcg@10={m['ndcg@10']:.4f})"

    def difference(self, other: EvalResult, metric: str = "ndcg@10", level: Level = "item") -> Difference:
        """``other``'s mean minus this one's, with a paired bootstrap interval; ValueError unless rows are the same."""
        if self.users != other.users or not np.array_equal(self.targets, other.targets):
            raise ValueError(f"other: expected the rows of {self.name!r}, got different users or targets")
        a, b = (row_metrics(result.ranks[level])[metric] for result in (self, other))
        return paired_difference(a, b, self.users, self.samples, seed=self.seed)

    def save(self, path: str | Path) -> None:
        """Write ``ranks.parquet`` (one row a prediction) and ``metrics.json`` into a folder, each atomically."""
        folder = Path(path)
        columns = {
            "user": pa.array(self.users, pa.string()),
            "target": pa.array(self.targets),
            **{f"rank_{level}": pa.array(self.ranks[level]) for level in _LEVELS},
            **{_TRAIT + name: pa.array(np.asarray(values, np.int64)) for name, values in self.traits.items()},
            "items": _lists(self.items),
            "scores": _lists(self.scores),
        }
        meta = {key: getattr(self, key) for key in _KEPT}
        table = pa.table(columns).replace_schema_metadata({"flr": json.dumps({"kind": "evaluation", **meta})})
        write_parquet(folder / "ranks.parquet", table)
        report = {**meta, "rows": len(self), "metrics": self.metrics, "intervals": self.intervals}
        write_json(folder / "metrics.json", report)

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read what :meth:`save` wrote; ValueError where it is something else."""
        file = Path(path) / "ranks.parquet"
        if not file.is_file():
            raise ValueError(f"path: expected a saved evaluation, {file} is missing")
        table = pq.read_table(file)
        meta = json.loads((table.schema.metadata or {}).get(b"flr", b"{}"))
        if meta.get("kind") != "evaluation":
            raise ValueError(f"{file}: expected the ranks of an evaluation, got {meta.get('kind')!r}")
        return cls(
            users=table["user"].to_pylist(),
            targets=table["target"].to_numpy(),
            ranks={level: table[f"rank_{level}"].to_numpy() for level in _LEVELS},
            items=_matrix(table["items"]),
            scores=_matrix(table["scores"]),
            traits={n.removeprefix(_TRAIT): table[n].to_numpy() for n in table.column_names if n.startswith(_TRAIT)},
            **{key: meta[key] for key in _KEPT},
        )

    def table(self, *others: EvalResult, level: Level = "item", metrics: Sequence[str] = _TABLE_METRICS) -> Table:
        """Rich table: this result and ``others`` (e.g. popularity and item-kNN) beside it, a column each."""
        results = (self, *others)
        rows = f"{len(self)} predictions over {self.num_items} items"
        looks: dict[str, Any] = {
            "title_justify": "left",
            "title_style": "bold",
            "box": box.SIMPLE_HEAD,
            "pad_edge": False,
        }
        table = Table(title=f"{rows}, by {level}; 95 % bootstrap intervals", **looks)
        table.add_column("metric")
        for result in results:
            table.add_column(Text(result.name), justify="right")
        best = {m: max(r.metrics[level][m] for r in results) for m in metrics}
        for metric in metrics:
            cells = []
            for result in results:
                value, interval = result.metrics[level][metric], result.intervals[level][metric]
                number = f"[bold]{value:.4f}[/bold]" if value == best[metric] and len(results) > 1 else f"{value:.4f}"
                cells.append(f"{number} [dim]{interval.low:.4f}–{interval.high:.4f}[/dim]")
            table.add_row(metric.upper(), *cells)
        name = f"coverage@{COVERAGE_CUTOFF}"
        table.add_row(name.capitalize(), *(f"{result.metrics['item'][name]:.4f}" for result in results))
        return table


def _lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).ravel()), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
