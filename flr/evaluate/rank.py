"""Whole-catalogue evaluation: ranks of every held-out target, metrics by item and by title, intervals, files, a table.

    result = evaluate(model, processor, dataset.test)
    result.save("runs/cds")
    rich.print(result.table(evaluate_scorer(Popularity(dataset.train, C), dataset.test, dataset.catalogue)))

Rows are worked off in the order of their prompts' lengths, in parts of fixed size; what a row gets depends neither on the
batch it is in nor on the padding. With an output directory each finished part is a file, so that a killed evaluation goes on
where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from flr.data import CSR, Catalogue, HistoryViews, Interactions, RecProcessor
from flr.decode import CatalogueTrie, Scoring, beam_search, rank_one_token, score_all_items
from flr.decode.scoring import resolve_scoring
from flr.model.backbone import evaluating
from flr_kernels.order import order_key

from .metrics import group_ids, ranks_from_lists, ranks_from_scores
from .parts import _fingerprint, _in_parts, _Ranked, _state_checksums
from .result import EvalResult

Method = Literal["auto", "beam", "exhaustive"]

_MAX_LOGITS = 1 << 27  # of one step: users a batch are cut so that B·W·V stays below (512 MiB in float32)


class Scorer(Protocol):
    """What ranks a catalogue without a prompt: the baselines."""

    @property
    def name(self) -> str: ...

    def scores(self, histories: CSR) -> np.ndarray:
        """Float [B, C] for B histories, higher is better."""


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
        from flr.decode.mixture import ViewMixture

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


@contextmanager
def _bar(enabled: bool, text: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(text, total=total)
        yield lambda rows: bar.advance(task, rows)
