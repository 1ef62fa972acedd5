"""What a process of a study does: one training by the options of ``flr sft``, and the evaluations that follow it.

The model is built, trained and evaluated in memory by the functions that the commands call; nothing of a run is kept
but numbers. Several jobs follow each other in one process, which has paid for imports and the device already.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, set_seed

from flr.cli import voice
from flr.cli.backbone import ModelOptions
from flr.cli.evaluate import EvaluateOptions
from flr.cli.options import AugmentOptions, DataOptions
from flr.cli.parsing import parse
from flr.config import FLRConfig
from flr.data import CSR, Interactions, NeighbourTable, RecDataset, RecProcessor, fit_linear
from flr.data.item_knn import KEPT_NEIGHBOURS
from flr.decode import CatalogueTrie, rank_one_token
from flr.decode.scoring import resolve_scoring
from flr.evaluate import evaluate
from flr.evaluate.metrics import ranks_from_scores, row_metrics
from flr.model.backbone import evaluating
from flr.train import SFTConfig, SFTTrainer
from flr.train.precision import choose_autocast

METRICS = ("hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
#: Weights of what stands beside a model that are tried on valid.
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))


class Partner(NamedTuple):
    """What stands beside a model: score_j = sum over history items i of decay^age(i) · M_ij, plus a trace.

    Where rows of M are ``probabilities`` the weights are divided by their sum, elsewhere the scores, of which those
    below 0 count as 0.
    """

    decay: float
    matrix: torch.Tensor  # float32 [C, C]
    trace: torch.Tensor  # float32 [C]
    probabilities: bool


class Shared:
    """Data sets, and tables of item-kNN and linear models of those whose models are mixed with them (``mixed``).

    They are made once; processes that are forked later find them.
    """

    def __init__(self, folders: list[str], mixed: Collection[str] = ()) -> None:
        self.data = {folder: DataOptions(data=folder).load() for folder in folders}
        self.tables = {folder: _tables(self.data[folder]) for folder in folders if folder in mixed}
        self._dense: dict[str, dict[str, Partner]] = {}

    def dataset(self, options: DataOptions) -> RecDataset:
        """What the options load."""
        if options.data == "planted":  # of sizes that its options say
            return options.load()
        if options.data not in self.data:
            self.data[options.data] = options.load()
        return self.data[options.data]

    def partners(self, folder: str, dataset: RecDataset, device: torch.device) -> dict[str, Partner]:
        """Item-kNN and the linear model of a data set, on the device; those of a folder are kept for the next job."""
        if folder not in self._dense:
            self._dense = {folder: {}}
            for name, table in (self.tables.get(folder) or _tables(dataset)).items():
                trace = table.scores(CSR.from_rows([[]]))[0]  # of no history
                dense = (torch.from_numpy(x.astype(np.float32)).to(device) for x in (table.similarity.toarray(), trace))
                self._dense[folder][name] = Partner(table.history_decay, *dense, False)
        return self._dense[folder]


def _tables(dataset: RecDataset) -> dict[str, NeighbourTable]:
    size = len(dataset.catalogue)
    return {
        "neighbours": NeighbourTable.fit(dataset.train, size, top=KEPT_NEIGHBOURS),
        "linear": fit_linear(dataset.train, size),
    }


def run_job(job: dict[str, Any], shared: Shared, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train and evaluate.

    Args:
        job: ``argv`` of ``flr sft`` with the settings in it, ``seed``, and ``evaluate``, lists of options of ``flr
            evaluate``; or ``beside``: valid and test, the model alone, and mixed with item-kNN and with its own views
            of single items (one-token codecs without views).
        folder: for checkpoints; emptied at the end.

    Returns:
        What is written of the job as plain values, and ranks int32 [rows] by name.
    """
    started = time.perf_counter()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    place = ["--output_dir", str(folder), "--overwrite_output_dir", "true", "--quiet"]
    seeds = ["--seed", str(job["seed"]), "--data_seed", str(job["seed"])]
    try:
        parts = _parsed([*job["argv"][1:], *seeds, *place])
        model, processor, facts = _trained(parts, shared)
        data, args = parts[0], parts[-1]
        if args.device.type == "cuda":
            facts["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        dataset, found, ranks = shared.dataset(data), {}, {}
        if job.get("beside"):
            found, facts["beside"], ranks = _beside(data.data, model, processor, dataset, shared)
        else:
            for options in job.get("evaluate", []):
                split, values, own = _evaluated(options, model, processor, dataset)
                found[split], ranks[split] = values, own
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts["seconds"] = round(time.perf_counter() - started, 2)
    return {**facts, "metrics": found}, {name: own.astype(np.int32) for name, own in ranks.items()}


def _parsed(argv: list[str]) -> tuple[Any, ...]:
    """Data, augmentation, backbone, thought, training."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the job before, whose precision may be another
    classes = (DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig)
    return parse("sft", "", classes, argv)[:-1]


def _trained(parts: tuple[Any, ...], shared: Shared) -> tuple[Any, RecProcessor, dict[str, Any]]:
    """The best model of a training, its processor, and facts: as ``flr.cli.sft.train``, without what it writes."""
    data, augment, model_options, config, args = parts
    dataset, started = shared.dataset(data), time.perf_counter()
    set_seed(args.seed)
    if model_options.model is not None:
        choose_autocast(args)
    model, processor = model_options.build(data, config, dataset, args.seed, args.use_cpu)
    rows, changes = augment.apply(dataset, processor.max_history)
    trainer = SFTTrainer(model, args, processor, rows, dataset.valid, changes)
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    ready = time.perf_counter()
    trainer.train()
    history = trainer.state.log_history
    evaluations = [line for line in history if "eval_ndcg@10" in line]
    facts = {
        "train_rows": len(rows),
        "steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "build_seconds": round(ready - started, 2),
        "train_seconds": round(time.perf_counter() - ready, 2),
        "eval_seconds": round(sum(line["eval_seconds"] for line in evaluations), 2),
        "by_epoch": [[round(line["epoch"], 3), round(line["eval_ndcg@10"], 6)] for line in evaluations],
        "loss": [round(line["loss"], 4) for line in history if "loss" in line][-1:],
        "best_valid": trainer.state.best_metric,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "graphs": trainer._graphs is not None and not trainer._graphs.refused,
    }
    if evaluations:
        names = ("gate", "attention")
        last = evaluations[-1].items()
        facts["factors"] = {n: round(x, 4) for n, x in last if n.removeprefix("eval_").startswith(names)}
    return model.eval(), processor, facts


def _evaluated(
    argv: list[str], model: Any, processor: RecProcessor, dataset: RecDataset
) -> tuple[str, dict[str, float], np.ndarray]:
    """Split, metrics and ranks of a model by the options of ``flr evaluate``; its --model and --data are not read."""
    options = parse("evaluate", "", (EvaluateOptions, DataOptions), [*argv[1:], "--quiet"])[0]
    rows = getattr(dataset, options.split).spread(options.max_users)
    names = ("batch_size", "num_beams", "scoring", "method", "exclude_seen")
    result = evaluate(model, processor, rows, **{n: getattr(options, n) for n in names}, progress=False, samples=1)
    metrics = {name: round(result.metrics["item"][name], 6) for name in (*METRICS, "coverage@10")}
    return options.split, metrics, result.ranks["item"]


def _beside(
    folder: str, model: Any, processor: RecProcessor, dataset: RecDataset, shared: Shared
) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """Metrics and ranks of valid and test: the model alone, and beside each partner with the best weight of valid."""
    device = next(model.parameters()).device
    partners = {**shared.partners(folder, dataset, device), "views": own_views(model, processor)}
    valid = mixed_ranks(model, processor, dataset.valid, {name: (own, WEIGHTS) for name, own in partners.items()})
    facts: dict[str, Any] = {}
    for name, ranks in valid.items():
        by_weight = [float(row_metrics(own)["ndcg@10"].mean()) for own in ranks]
        best = WEIGHTS[int(np.argmax(by_weight))]
        facts[name] = {"weight": best, "valid_ndcg@10": [round(x, 6) for x in by_weight]}
    wanted = {name: (own, (0.0, facts[name]["weight"])) for name, own in partners.items()}
    test = mixed_ranks(model, processor, dataset.test, wanted)
    found = {"valid": valid["views"][0], "test": test["views"][0]}
    for name, ranks in test.items():
        facts[name]["test"] = _means(ranks[1])
        found[f"test_{name}"] = ranks[1]
    return {split: _means(found[split]) for split in ("valid", "test")}, facts, found


def _means(ranks: np.ndarray) -> dict[str, float]:
    return {name: round(float(own.mean()), 6) for name, own in row_metrics(ranks).items() if name in METRICS}


@torch.inference_mode()
def own_views(model: Any, processor: RecProcessor, decay: float = 0.6, batch_size: int = 512) -> Partner:
    """p(item | one item alone) of a model of one-token items, as :class:`flr.decode.mixture.ViewMixture` mixes it."""
    device, size = next(model.parameters()).device, len(processor.catalogue)
    trie, scoring = CatalogueTrie.from_codec(processor.item_codec).to(device), _scoring(processor)
    parts = []
    for start in range(0, size, batch_size):
        items = np.arange(start, min(start + batch_size, size), dtype=np.int32)
        inputs = processor(CSR(items, np.arange(len(items) + 1)))
        parts.append(rank_one_token(model, inputs, trie, scoring).exp())
    return Partner(decay, torch.cat(parts), torch.zeros(size, device=device), True)


def _scoring(processor: RecProcessor) -> Any:
    return resolve_scoring("auto", processor.scoring)


@torch.inference_mode()
def mixed_ranks(
    model: Any,
    processor: RecProcessor,
    rows: Interactions,
    partners: dict[str, tuple[Partner, tuple[float, ...]]],
    batch_size: int = 512,
) -> dict[str, np.ndarray]:
    """Ranks int64 [weights, rows] of the targets by (1 - w) p_model + w q, q a partner's scores over their sum.

    What :func:`flr.evaluate.fit_neighbours` computes, on the model's device, in float32 and for several partners at
    once; for one-token codecs alone.
    """
    trie = CatalogueTrie.from_codec(processor.item_codec).to(next(model.parameters()).device)
    ranks = {name: np.zeros((len(weights), len(rows)), np.int64) for name, (_, weights) in partners.items()}
    order = np.argsort(-processor.prompt_lengths(rows.histories), kind="stable")
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            part = rows.select(chosen)
            own = rank_one_token(model, processor(part), trie, _scoring(processor)).exp()
            target = torch.from_numpy(part.targets.astype(np.int64)).to(own.device)
            for name, (partner, weights) in partners.items():
                others = _beside_scores(part.histories, partner)
                mixed = [ranks_from_scores((1 - weight) * own + weight * others, target) for weight in weights]
                ranks[name][:, chosen] = torch.stack(mixed).cpu().numpy()
    return ranks


def _beside_scores(histories: CSR, partner: Partner) -> torch.Tensor:
    """A partner's probabilities float32 [B, C]."""
    device = partner.trace.device
    row = np.repeat(np.arange(len(histories.lengths)), histories.lengths)
    items, starts = (
        torch.from_numpy(x.astype(np.int64)).to(device) for x in (histories.values, histories.offsets[:-1])
    )
    share = partner.decay**histories.ages
    if partner.probabilities:
        share = share / np.bincount(row, share, len(histories.lengths))[row]
    weights = torch.from_numpy(share.astype(np.float32)).to(device)
    bags = nn.functional.embedding_bag(items, partner.matrix, starts, mode="sum", per_sample_weights=weights)
    scores = (bags + partner.trace).clamp_min(0)
    return scores if partner.probabilities else scores / scores.sum(1, keepdim=True)


def work(pipe: Any, shared: Shared, folder: Path, log: Path, device: str) -> None:
    """Do jobs that come through a pipe until None comes; after one that fails the process ends."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    voice.choose(True, False, False)
    if device == "cuda":
        torch.zeros(1, device="cuda")  # a device that cannot be had ends the process before it is ready
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        try:
            pipe.send(run_job(job, shared, folder))
        except Exception as error:  # whatever a model of whatever options raises: the study goes on without it
            traceback.print_exc()
            lines = traceback.format_exception(error)
            pipe.send(({"error": "".join(lines)[-2000:]}, {}))
            return
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
