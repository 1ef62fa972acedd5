"""Whole-catalogue evaluation: ranks of every held-out target, metrics by item and by title, intervals, files, a table.

    result = evaluate(model, processor, dataset.test)
    result.save("runs/cds")
    rich.print(result.table(evaluate_scorer(Popularity(dataset.train, C), dataset.test, dataset.catalogue)))

Rows are worked off in the order of their prompts' lengths, in parts of fixed size; what a row gets depends neither on the
batch it is in nor on the padding. With an output directory each finished part is a file, so that a killed evaluation goes on
where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from flr.data import CSR, Catalogue, HistoryViews, Interactions, RecProcessor
from flr.decode import CatalogueTrie, Scoring, beam_search, rank_one_token, score_all_items
from flr.decode.scoring import resolve_scoring
from flr.files import atomic_file, write_json, write_parquet
from flr.model.backbone import evaluating
from flr_kernels.order import order_key

from .metrics import (
    COVERAGE_CUTOFF,
    Difference,
    Interval,
    bootstrap_intervals,
    coverage,
    group_ids,
    paired_difference,
    rank_metrics,
    ranks_from_lists,
    ranks_from_scores,
    row_metrics,
)

Method = Literal["auto", "beam", "exhaustive"]
Level = Literal["item", "title"]

_PART_ROWS = 1024
_MAX_LOGITS = 1 << 27  # of one step: users a batch are cut so that B·W·V stays below (512 MiB in float32)
_TABLE_METRICS = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


class Scorer(Protocol):
    """What ranks a catalogue without a prompt: the baselines."""

    @property
    def name(self) -> str: ...

    def scores(self, histories: CSR) -> np.ndarray:
        """Float [B, C] for B histories, higher is better."""


class _Ranked(NamedTuple):
    """What is kept of a row; [n] and [n, k]."""

    by_item: np.ndarray
    by_title: np.ndarray
    items: np.ndarray
    scores: np.ndarray


@dataclass
class EvalResult:
    """Ranks of an evaluation and what follows from them.

    Attributes:
        name: of the model, for tables.
        users: user id of every row, in the order of the interactions; rows of one user are resampled together.
        targets: int64 [n] item indices.
        ranks: "item" and "title": int64 [n], 1 is best, 0 not given (see flr.metrics).
        items, scores: int64 and float32 [n, k]: the items given to each row, best first, -1 / -inf past the end.
        num_items: C.
        settings: how it was made.
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
        """`other`'s mean minus this one's, with a paired bootstrap interval; ValueError unless the rows are the same."""
        if self.users != other.users or not np.array_equal(self.targets, other.targets):
            raise ValueError(f"other: expected the rows of {self.name!r}, got different users or targets")
        a, b = (row_metrics(result.ranks[level])[metric] for result in (self, other))
        return paired_difference(a, b, self.users, self.samples, seed=self.seed)

    def save(self, path: str | Path) -> None:
        """Write `ranks.parquet` (one row a prediction) and `metrics.json` into the folder `path`, each atomically."""
        folder = Path(path)
        columns = {
            "user": pa.array(self.users, pa.string()),
            "target": pa.array(self.targets),
            "rank_item": pa.array(self.ranks["item"]),
            "rank_title": pa.array(self.ranks["title"]),
            "items": _lists(self.items),
            "scores": _lists(self.scores),
        }
        meta = {"name": self.name, "num_items": self.num_items, "settings": self.settings}
        meta |= {"samples": self.samples, "seed": self.seed}
        table = pa.table(columns).replace_schema_metadata({"flr": json.dumps({"kind": "evaluation", **meta})})
        write_parquet(folder / "ranks.parquet", table)
        report = {
            **meta,
            "rows": len(self),
            "metrics": self.metrics,
            "intervals": {level: {k: list(v) for k, v in x.items()} for level, x in self.intervals.items()},
        }
        write_json(folder / "metrics.json", report)

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read what `save` wrote; ValueError where it is something else."""
        file = Path(path) / "ranks.parquet"
        if not file.is_file():
            raise ValueError(f"path: expected a saved evaluation, {file} is missing")
        table = pq.read_table(file)
        meta = json.loads((table.schema.metadata or {}).get(b"flr", b"{}"))
        if meta.get("kind") != "evaluation":
            raise ValueError(f"{file}: expected the ranks of an evaluation, got {meta.get('kind')!r}")
        return cls(
            name=meta["name"],
            users=table["user"].to_pylist(),
            targets=table["target"].to_numpy(),
            ranks={level: table[f"rank_{level}"].to_numpy() for level in ("item", "title")},
            items=_matrix(table["items"]),
            scores=_matrix(table["scores"]),
            num_items=meta["num_items"],
            settings=meta["settings"],
            samples=meta["samples"],
            seed=meta["seed"],
        )

    def table(self, *others: EvalResult, level: Level = "item", metrics: Sequence[str] = _TABLE_METRICS) -> Table:
        """Rich table: this result and `others` (e.g. popularity and item-kNN) beside it, a column each."""
        results = (self, *others)
        table = Table(
            title=f"{len(self)} predictions over {self.num_items} items, by {level}; 95 % bootstrap intervals"
        )
        table.add_column("metric")
        for result in results:
            table.add_column(result.name, justify="right")
        best = {m: max(r.metrics[level][m] for r in results) for m in metrics}
        for metric in metrics:
            cells = []
            for result in results:
                value, interval = result.metrics[level][metric], result.intervals[level][metric]
                number = f"[bold]{value:.4f}[/bold]" if value == best[metric] and len(results) > 1 else f"{value:.4f}"
                cells.append(f"{number} [dim]{interval.low:.4f}–{interval.high:.4f}[/dim]")
            table.add_row(metric, *cells)
        name = f"coverage@{COVERAGE_CUTOFF}"
        table.add_row(name, *(f"{result.metrics['item'][name]:.4f}" for result in results))
        return table


def evaluate(
    model: nn.Module,
    processor: RecProcessor,
    interactions: Interactions,
    *,
    batch_size: int = 64,
    num_beams: int = 20,
    scoring: Scoring | Literal["auto"] = "auto",
    method: Method = "auto",
    exclude_seen: bool = False,
    top_k: int = 20,
    output_dir: str | Path | None = None,
    progress: bool = True,
    name: str = "model",
    trie: CatalogueTrie | None = None,
    views: HistoryViews | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> EvalResult:
    """Rank every row's target among the whole catalogue.

    The model runs in eval mode under inference_mode; its modes are restored afterwards.

    Args:
        model: patched or plain causal LM. processor: its RecProcessor. interactions: the rows, e.g. `dataset.test`.
        batch_size: users at a time at most; fewer where B·W·V logits would take more than 512 MiB. No influence on results.
        num_beams: W of the beam search.
        scoring: "full" or "catalogue", see flr.decode; "auto" takes the processor's, that of training.
        method: "exhaustive" scores every item, so every target has its exact rank; "beam" ranks what a beam search finds and
            gives other targets rank 0; "auto" is exhaustive where items are single tokens (one step answers), else beam.
        exclude_seen: never give an item of the row's history (then a target that repeats one has rank 0).
        top_k: items kept a row, at least 20; with "beam", also the length of the ranked list.
        output_dir: write the result there (`EvalResult.save`), and parts as they finish: after a kill the same call, on the
            same weights and rows, goes on from them. Parts of other settings are never used, and removed at the end.
        progress: show a progress bar on stderr.
        name: of the result, for tables.
        trie: of the processor's codec on the model's device, if the caller keeps one; else built here.
        views: rank by a mixture over views of the history (flr.views; not resumed); default: the processor's, if it has any.
        samples, seed: of the bootstrap.

    Raises:
        ValueError: no rows, an argument out of range, and as `beam_search`.
    """
    scoring = resolve_scoring(scoring, processor.scoring)
    if method not in ("auto", "beam", "exhaustive"):
        raise ValueError(f"method: expected 'auto', 'beam' or 'exhaustive', got {method!r}")
    if batch_size < 1 or num_beams < 1 or top_k < 20:
        raise ValueError(
            f"expected batch_size >= 1, num_beams >= 1 and top_k >= 20, got {batch_size}, {num_beams} and {top_k}"
        )
    _check_rows(interactions, len(processor.catalogue))
    device = next(model.parameters()).device
    trie = (CatalogueTrie.from_codec(processor.item_codec) if trie is None else trie).to(device)
    if trie.num_items != len(processor.catalogue):
        raise ValueError(f"trie: expected {len(processor.catalogue)} items, got {trie.num_items}")
    views = processor.views if views is None else views
    if views is not None:
        from flr.decode.mixture import (
            ViewMixture,  # it scores like a baseline; imported here because it stands on this package
        )

        beams = max(num_beams, top_k)
        mixture = ViewMixture(
            model, processor, views, num_beams=beams, batch_size=batch_size, scoring=scoring, trie=trie, name=name
        )
        with evaluating(model):
            result = evaluate_scorer(
                mixture, interactions, processor.catalogue, exclude_seen=exclude_seen, top_k=top_k, samples=samples,
                seed=seed, progress=progress,
            )  # fmt: skip
        result.settings |= {"scoring": scoring, "num_beams": beams, "codec": processor.codec, "views": asdict(views)}
        if output_dir is not None:
            result.save(output_dir)
        return result
    if method == "auto":
        method = "exhaustive" if trie.depth == 1 else "beam"
    groups = group_ids(processor.catalogue.titles)
    on_device = torch.from_numpy(groups).to(device)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or trie.max_token + 1)
    width = num_beams if method == "beam" else 1
    batch_size = max(1, min(batch_size, _MAX_LOGITS // (width * vocabulary)))

    def rank(rows: np.ndarray) -> _Ranked:
        part = interactions.select(rows)
        inputs = processor(part)
        exclude = padded_rows(part.histories) if exclude_seen else None
        targets = torch.from_numpy(part.targets.astype(np.int64)).to(device)
        if method == "beam":
            found = beam_search(model, inputs, trie, num_beams, top_k, scoring, exclude=exclude)
            return _from_lists(found.items.cpu().numpy(), found.scores.cpu().numpy(), part.targets, groups)
        score = rank_one_token if trie.depth == 1 else score_all_items
        return _from_scores(score(model, inputs, trie, scoring, exclude=exclude), targets, on_device, top_k)

    settings: dict[str, Any] = {
        "method": method,
        "scoring": scoring,
        "num_beams": num_beams if method == "beam" else None,
        "exclude_seen": exclude_seen,
        "top_k": top_k,
        "codec": processor.codec,
    }
    prompts = processor.prompts(interactions.histories)
    order = np.argsort(prompts.tokens.lengths, kind="stable")
    parts_folder = None
    if output_dir is not None:
        fingerprint = _fingerprint(
            settings, _state_checksums(model), prompts.tokens, processor.item_codec, interactions, processor.catalogue
        )
        parts_folder = Path(output_dir) / "parts" / fingerprint
    started = time.perf_counter()
    with torch.inference_mode(), _bar(progress, f"evaluating {name}", len(interactions)) as advance:
        ranked = _in_parts(rank, order, batch_size, parts_folder, advance)
    settings["seconds"] = round(time.perf_counter() - started, 3)
    result = _result(name, interactions, ranked, len(processor.catalogue), settings, samples, seed)
    if output_dir is not None:
        result.save(output_dir)
        shutil.rmtree(Path(output_dir) / "parts", ignore_errors=True)
    return result


def evaluate_scorer(
    scorer: Scorer,
    interactions: Interactions,
    catalogue: Catalogue,
    *,
    batch_size: int = 256,
    exclude_seen: bool = False,
    top_k: int = 20,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> EvalResult:
    """`evaluate` for what scores the catalogue directly, e.g. the baselines: exact ranks, ties against it."""
    _check_rows(interactions, len(catalogue))
    groups = torch.from_numpy(group_ids(catalogue.titles))

    def rank(rows: np.ndarray) -> _Ranked:
        part = interactions.select(rows)
        scores = torch.from_numpy(np.asarray(scorer.scores(part.histories)))
        if exclude_seen:
            lengths = part.histories.offsets[1:] - part.histories.offsets[:-1]
            seen = torch.from_numpy(np.repeat(np.arange(len(part)), lengths))
            scores[seen, torch.from_numpy(part.histories.values.astype(np.int64))] = -torch.inf
        return _from_scores(scores, torch.from_numpy(part.targets.astype(np.int64)), groups, top_k)

    started = time.perf_counter()
    with _bar(progress, f"evaluating {scorer.name}", len(interactions)) as advance:
        ranked = _in_parts(rank, np.arange(len(interactions)), batch_size, None, advance)
    settings = {"method": "exhaustive", "exclude_seen": exclude_seen, "top_k": top_k}
    settings["seconds"] = round(time.perf_counter() - started, 3)
    return _result(scorer.name, interactions, ranked, len(catalogue), settings, samples, seed)


def padded_rows(rows: CSR) -> torch.Tensor:
    """int64 [B, longest] of CSR rows, padded with -1: what `beam_search(exclude=…)` takes."""
    lengths = np.diff(rows.offsets)
    padded = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = rows.values
    return torch.from_numpy(padded)


def _check_rows(interactions: Interactions, num_items: int) -> None:
    if len(interactions) == 0:
        raise ValueError("interactions: expected at least one row, got none")
    if interactions.max_index >= num_items:
        raise ValueError(f"interactions: expected item indices below {num_items}, got {interactions.max_index}")


def _from_lists(items: np.ndarray, scores: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> _Ranked:
    by_item = ranks_from_lists(items, scores, targets)
    return _Ranked(by_item, ranks_from_lists(items, scores, targets, groups), items, scores)


def _from_scores(scores: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor, top_k: int) -> _Ranked:
    if scores.dtype == torch.float32:
        key = order_key(scores, torch.arange(scores.shape[1], device=scores.device))  # ties: smaller index first
        items = key.topk(min(top_k, scores.shape[1]), dim=1).indices
    else:
        items = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    best = scores.gather(1, items)
    items = items.masked_fill(best == -torch.inf, -1)
    missing = top_k - items.shape[1]
    items = nn.functional.pad(items, (0, missing), value=-1)
    best = nn.functional.pad(best, (0, missing), value=-torch.inf)
    ranked = ranks_from_scores(scores, targets), ranks_from_scores(scores, targets, groups), items, best
    return _Ranked(*(x.cpu().numpy() for x in ranked))


def _in_parts(
    rank: Callable[[np.ndarray], _Ranked],
    order: np.ndarray,
    batch_size: int,
    folder: Path | None,
    advance: Callable[[int], None],
) -> _Ranked:
    """`rank` of all rows, taken in `order`, with finished parts of _PART_ROWS kept in `folder`; in the rows' own order."""
    parts = []
    for start in range(0, len(order), _PART_ROWS):
        rows = order[start : start + _PART_ROWS]
        file = None if folder is None else folder / f"{start:09d}.npz"
        part = None if file is None else _read_part(file, len(rows))
        if part is None:
            batches = []
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                batches.append(rank(batch))
                advance(len(batch))
            part = _Ranked(*(np.concatenate(x) for x in zip(*batches, strict=True)))
            if file is not None:
                with atomic_file(file) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, **part._asdict())
        else:
            advance(len(rows))
        parts.append(part)
    back = np.argsort(order)
    return _Ranked(*(np.concatenate(x)[back] for x in zip(*parts, strict=True)))


def _read_part(file: Path, rows: int) -> _Ranked | None:
    """A finished part; None where it is absent or was cut short."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            part = _Ranked(*(arrays[name] for name in _Ranked._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return part if all(len(x) == rows for x in part) else None


def _result(
    name: str,
    interactions: Interactions,
    ranked: _Ranked,
    num_items: int,
    settings: dict[str, Any],
    samples: int,
    seed: int,
) -> EvalResult:
    return EvalResult(
        name=name,
        users=list(interactions.users),
        targets=interactions.targets.astype(np.int64),
        ranks={"item": ranked.by_item.astype(np.int64), "title": ranked.by_title.astype(np.int64)},
        items=ranked.items.astype(np.int64),
        scores=ranked.scores.astype(np.float32),
        num_items=num_items,
        settings=settings,
        samples=samples,
        seed=seed,
    )


def _state_checksums(model: nn.Module) -> Iterator[bytes]:
    """Name, shape, dtype and integer sums of every weight's bits, and the configuration: what the outputs depend on."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        yield config.to_json_string(use_diff=False).encode()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            bits = tensor.detach().contiguous().flatten().view(integers)
            sums = [int(bits[i::7].sum(dtype=torch.int64)) for i in (0, 3)] + [int(bits.sum(dtype=torch.int64))]
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode()


def _fingerprint(
    settings: Mapping[str, Any],
    weights: Iterable[bytes],
    prompts: CSR,
    codec: Any,
    interactions: Interactions,
    catalogue: Catalogue,
) -> str:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12)
    for chunk in weights:
        digest.update(chunk)
    rows = (interactions.histories.values, interactions.histories.offsets, interactions.targets)
    for array in (prompts.values, prompts.offsets, codec.tokens, codec.offsets, *rows, group_ids(catalogue.titles)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextmanager
def _bar(enabled: bool, text: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(text, total=total)
        yield lambda rows: bar.advance(task, rows)


def _lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).ravel()), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
