"""Whole-catalogue evaluation: ranks of every held-out target, metrics by item and by title, intervals, files, a table.

    result = evaluate(model, processor, dataset.test)
    result.save("runs/cds")
    rich.print(result.table(evaluate_scorer(Popularity(dataset.train, C), dataset.test, dataset.catalogue)))

Rows are worked off in the order of their prompts' lengths, the longest first: a batch holds little padding, memory that
does not suffice shows at once, and the time that a progress bar expects is too long rather than too short. What a row
gets depends neither on the batch it is in nor on the padding. With an output directory each finished part is a file, so
that a killed evaluation goes on where it was.
"""

from __future__ import annotations

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
from flr.decode.memory import users_at_once
from flr.decode.mixture import ViewMixture
from flr.decode.scoring import resolve_scoring
from flr.model.backbone import causal_lm, position_limit

from .metrics import group_ids, ranks_from_lists, ranks_from_scores, top_items, within_memory
from .parts import Ranked, fingerprint, in_parts, remove_parts
from .ranks import Share
from .result import EvalResult

Method = Literal["auto", "beam", "exhaustive"]


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
    share: Share = Share(),  # noqa: B008 - a tuple
) -> EvalResult:
    """Rank every row's target among the whole catalogue.

    The model runs in eval mode under inference_mode; its modes are restored afterwards.

    Args:
        model: patched or plain causal LM. processor: its RecProcessor. interactions: the rows, e.g. ``dataset.test``.
        batch_size: users at a time, fewer where B·W·V logits would take more than 256 MiB, or B·C scores of all items
            more than that; results stay the same.
        num_beams: W of the beam search; with fewer than k, metrics at k miss items.
        scoring: "full" or "catalogue", see :mod:`flr.decode`; "auto" takes the processor's, that of training.
        method: "exhaustive" scores every item, so every target has its exact rank; "beam" ranks what a beam search
            gives, other targets have rank 0; "auto" is exhaustive where items are single tokens (one step answers).
        exclude_seen: never give an item of the row's history (then a target that repeats one has rank 0).
        top_k: items kept a row, at least 20; with "beam", also the length of the ranked list.
        output_dir: write the result there (:meth:`EvalResult.save`), and parts as they finish: after a kill the same
            call, on the same weights and rows, goes on from them. Other parts are never used, and removed at the end.
        progress: show a progress bar on stderr, where that is a terminal.
        name: of the result, for tables.
        trie: of the processor's codec on the model's device, if the caller keeps one; else built here.
        views: rank by a mixture over views of the history (:mod:`flr.decode.mixture`; not resumed); default: the
            processor's, if it has any. Under "beam" an item that no beam gave is not given, and targets have their
            ranks among all that were.
        samples, seed: of the bootstrap.
        share: ``Share.own()`` shares the rows among the processes of ``torch.distributed``. Every process calls this,
            with the same model and rows, and gets the whole result; the first one writes.

    Raises:
        ValueError: no rows, an argument out of range, and as ``beam_search``.
    """
    scoring = resolve_scoring(scoring, processor.scoring)
    if method not in ("auto", "beam", "exhaustive"):
        raise ValueError(f"method: expected 'auto', 'beam' or 'exhaustive', got {method!r}")
    for argument, value, least in (("batch_size", batch_size, 1), ("num_beams", num_beams, 1), ("top_k", top_k, 20)):
        if value < least:
            raise ValueError(f"{argument}: expected at least {least}, got {value}")
    _check_rows(interactions, len(processor.catalogue))
    if (config := getattr(causal_lm(model), "config", None)) is not None:
        processor.fit_positions(position_limit(config))
    device = next(model.parameters()).device
    trie = (CatalogueTrie.from_codec(processor.item_codec) if trie is None else trie).to(device)
    if trie.num_items != len(processor.catalogue):
        raise ValueError(f"trie: expected {len(processor.catalogue)} items, got {trie.num_items}")
    views = processor.views if views is None else views
    views = views if views is not None and views.mixes else None
    if method == "auto":
        method = "exhaustive" if trie.depth == 1 else "beam"
    beams = None if method == "exhaustive" else num_beams if views is None else max(num_beams, top_k)
    batch_size = users_at_once(model, trie, beams or 1, batch_size)
    if beams is None or views is not None:
        batch_size = within_memory(batch_size, trie.num_items)
    settings: dict[str, Any] = {"method": method, "scoring": scoring, "num_beams": beams, "exclude_seen": exclude_seen}
    settings |= {"top_k": top_k, "codec": processor.codec}
    mixture = None
    if views is not None:
        settings["views"] = asdict(views)
        mixture = ViewMixture(
            model, processor, views, num_beams=beams, batch_size=batch_size, scoring=scoring, trie=trie
        )
        mixture.expect(interactions.histories)
    rank = _ranker(model, processor, interactions, trie, settings, mixture)
    prompts = processor.prompts(interactions.histories).tokens
    order = _longest_first(prompts.lengths)
    folder = None
    if output_dir is not None and mixture is None:
        folder = Path(output_dir) / "parts" / fingerprint(settings, model, processor, prompts, interactions, order)
    result = _result(
        rank, interactions, len(processor.catalogue), settings, name=name, batch_size=batch_size, order=order,
        folder=folder, samples=samples, seed=seed, progress=progress, share=share,
    )  # fmt: skip
    if output_dir is not None and share.rank == 0:
        result.save(output_dir)
        remove_parts(Path(output_dir) / "parts")
    return result


def _ranker(
    model: nn.Module,
    processor: RecProcessor,
    interactions: Interactions,
    trie: CatalogueTrie,
    settings: dict[str, Any],
    mixture: ViewMixture | None,
) -> Callable[[np.ndarray], Ranked]:
    """What ranks rows as the settings say: a mixture, a beam search or, without ``num_beams``, every item's score."""
    scoring, num_beams, top_k = settings["scoring"], settings["num_beams"], settings["top_k"]
    groups = group_ids(processor.catalogue.titles)
    beside_scores = torch.from_numpy(groups).to("cpu" if mixture is not None else trie.children.device)

    def rank(rows: np.ndarray) -> Ranked:
        part = interactions.select(rows)
        exclude = padded_rows(part.histories) if settings["exclude_seen"] else None
        if mixture is not None:
            scores = torch.from_numpy(mixture.scores(part.histories, exclude, least=top_k))
            return _from_scores(scores, part.targets, beside_scores, top_k)
        inputs = processor(part)
        if num_beams is not None:
            best = beam_search(model, inputs, trie, num_beams, top_k, scoring, exclude=exclude)
            lists = best.items.cpu().numpy(), best.scores.cpu().numpy()
            by_item, by_title = (ranks_from_lists(*lists, part.targets, by) for by in (None, groups))
            return Ranked(by_item, by_title, *lists)
        score = rank_one_token if trie.depth == 1 else score_all_items
        scores = score(model, inputs, trie, scoring, exclude=exclude)
        return _from_scores(scores, part.targets, beside_scores, top_k)

    return rank


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
    order: np.ndarray | None = None,
    share: Share = Share(),  # noqa: B008 - a tuple
) -> EvalResult:
    """:func:`evaluate` for what scores the catalogue directly, e.g. the baselines: exact ranks, ties against it.

    ``order`` is a permutation of the rows, int64 [n], by which they are worked off; the result has them as they are.
    """
    _check_rows(interactions, len(catalogue))
    groups = torch.from_numpy(group_ids(catalogue.titles))

    def rank(rows: np.ndarray) -> Ranked:
        part = interactions.select(rows)
        scores = torch.from_numpy(np.asarray(scorer.scores(part.histories)))
        if exclude_seen:
            seen = torch.from_numpy(np.repeat(np.arange(len(part)), part.histories.lengths))
            scores[seen, torch.from_numpy(part.histories.values.astype(np.int64))] = -torch.inf
        return _from_scores(scores, part.targets, groups, top_k)

    settings = {"method": "exhaustive", "exclude_seen": exclude_seen, "top_k": top_k}
    shared: dict[str, Any] = {"samples": samples, "seed": seed, "progress": progress, "share": share}
    return _result(
        rank, interactions, len(catalogue), settings, name=scorer.name, order=order,
        batch_size=within_memory(batch_size, len(catalogue)), **shared,
    )  # fmt: skip


def padded_rows(rows: CSR) -> torch.Tensor:
    """int64 [B, longest] of CSR rows, padded with -1: what ``beam_search(exclude=…)`` takes."""
    lengths = np.diff(rows.offsets)
    padded = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = rows.values
    return torch.from_numpy(padded)


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The rows by length, equal ones as they stand."""
    return np.argsort(-lengths, kind="stable")


def _check_rows(interactions: Interactions, num_items: int) -> None:
    if len(interactions) == 0:
        raise ValueError("interactions: expected at least one row, got none")
    if interactions.max_index >= num_items:
        raise ValueError(f"interactions: expected item indices below {num_items}, got {interactions.max_index}")


def _from_scores(scores: torch.Tensor, targets: np.ndarray, groups: torch.Tensor, top_k: int) -> Ranked:
    best, items = top_items(scores, top_k)
    items = items.masked_fill(best == -torch.inf, -1)
    missing = top_k - items.shape[1]
    items = nn.functional.pad(items, (0, missing), value=-1)
    best = nn.functional.pad(best, (0, missing), value=-torch.inf)
    own = torch.from_numpy(targets.astype(np.int64)).to(scores.device)
    ranked = ranks_from_scores(scores, own), ranks_from_scores(scores, own, groups), items, best
    return Ranked(*(x.cpu().numpy() for x in ranked))


@torch.inference_mode()
def _result(
    rank: Callable[[np.ndarray], Ranked],
    interactions: Interactions,
    num_items: int,
    settings: dict[str, Any],
    *,
    name: str,
    batch_size: int,
    progress: bool,
    order: np.ndarray | None = None,
    folder: Path | None = None,
    share: Share,
    **bootstrap: int,
) -> EvalResult:
    """Rank all rows, in the order given, and measure the time that it takes."""
    order = np.arange(len(interactions)) if order is None else order
    started = time.perf_counter()
    with progress_bar(progress, f"evaluating {name}", -(-len(interactions) // share.of)) as advance:
        ranked = in_parts(rank, order, batch_size, folder, advance, share)
    settings["seconds"] = round(time.perf_counter() - started, 3)
    return EvalResult(
        name=name,
        users=list(interactions.users),
        targets=interactions.targets.astype(np.int64),
        ranks={"item": ranked.by_item, "title": ranked.by_title},
        items=ranked.items,
        scores=ranked.scores.astype(np.float32),
        num_items=num_items,
        settings=settings,
        traits={"history_length": interactions.histories.lengths.astype(np.int64)},
        **bootstrap,
    )


@contextmanager
def progress_bar(enabled: bool, text: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    shown = enabled and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(text, total=total)
        yield lambda rows: bar.advance(task, rows)
