"""What a study found, as the numbers that its tables show: docs/results/study.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flr.data import load_dataset
from flr.evaluate import evaluate_scorer
from flr.evaluate.baselines import ItemKNN
from flr.evaluate.metrics import row_metrics

from ..quality_groups import groups, traits
from .queue import read_ranks, read_results
from .stats import Resampled

#: Differences that are asked for: of this, less that.
PAIRS = (
    ("flr-mixture", "anchor"),
    ("flr-mixture", "offsets-mixture"),
    ("flr-mixture", "flr"),
    ("flr-mixture", "none"),
    ("flr", "anchor"),
    ("flr", "offsets"),
    ("flr", "latentr3"),
    ("offsets-mixture", "anchor"),
    ("anchor", "none"),
)
METRICS = ("hr@10", "ndcg@10")


def chosen_settings(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The setting of each variant: the best NDCG@10 on valid among those that every variant has tried."""
    tuned = [line for line in lines if line.get("tune")]
    tried = [{t["setting"] for t in tuned if t["variant"] == v} for v in {t["variant"] for t in tuned}]
    shared = set.intersection(*tried) if tried else set()
    best: dict[str, tuple[float, str]] = {}
    for line in (t for t in tuned if t["setting"] in shared):
        found = (line["metrics"]["valid"]["ndcg@10"], line["setting"])
        best[line["variant"]] = max(best.get(line["variant"], found), found)
    return {variant: setting for variant, (_, setting) in best.items()}


def summary(folder: Path, data: Path) -> dict[str, Any]:
    """All tables of the results in a folder; ``data`` holds the prepared data sets by name."""
    lines = [line for line in read_results(folder) if "error" not in line]
    chosen = chosen_settings(lines)
    runs = [_run(line) for line in lines]
    out: dict[str, Any] = {"chosen": chosen, "runs": runs, "device": sorted({line["device"] for line in lines})}
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        wanted = line["setting"] in (None, chosen.get(line["variant"], line["setting"]))
        if wanted and (not line.get("tune") or line["variant"] in chosen):
            tags = line["tags"]
            parts.setdefault((tags["data"], tags["codec"], tags.get("change", "")), []).append(line)
    out["tables"] = []
    main = parts.get(("instruments", "id", ""), [])
    for (name, codec, change), own in parts.items():
        beside = [line for line in main if line["variant"] in {x["variant"] for x in own}] if change else []
        out["tables"].append(
            {"data": name, "codec": codec, "change": change, **_table(folder, data / name, own, beside)}
        )
    return out


def _run(line: dict[str, Any]) -> dict[str, Any]:
    names = (
        "name",
        "seed",
        "variant",
        "setting",
        "tags",
        "parameters",
        "steps",
        "train_seconds",
        "seconds",
        "by_epoch",
    )
    kept = {name: line[name] for name in names if name in line}
    kept |= {split: {m: own[m] for m in METRICS} for split, own in line["metrics"].items()}
    weights = {name: own["weight"] for name, own in line.get("beside", {}).items()}
    return {**kept, "weights": weights, "gpu_gb": line.get("gpu_gb")}


def _table(folder: Path, data: Path, lines: list[dict[str, Any]], beside: list[dict[str, Any]]) -> dict[str, Any]:
    """Models of one data set and codec; ``beside`` are those that ``lines`` were changed from."""
    dataset = load_dataset(data)
    drawn = Resampled(dataset.test.users)
    values = _values(folder, lines)
    out: dict[str, Any] = {"rows": len(dataset.test), "items": len(dataset.catalogue), "models": {}}
    for variant, ways in values.items():
        own = [line for line in lines if line["variant"] == variant]
        entry: dict[str, Any] = {"seeds": len(own), "seconds": float(np.median([x["train_seconds"] for x in own]))}
        entry |= {"parameters": own[0]["parameters"], "setting": own[0]["setting"]}
        for way, by_metric in ways.items():
            entry[way] = {m: drawn.interval(by_metric[m]) for m in METRICS}
        if beside:
            base = _values(folder, [x for x in beside if x["variant"] == variant])[variant]
            entry["less"] = drawn.difference(base["test"]["ndcg@10"], ways["test"]["ndcg@10"])
        out["models"][variant] = entry
    if beside:
        return out
    knn = evaluate_scorer(ItemKNN(dataset.train, len(dataset.catalogue)), dataset.test, dataset.catalogue, samples=1)
    alone = {m: row_metrics(knn.ranks["item"])[m][None] for m in METRICS}
    out["item-kNN"] = {m: drawn.interval(alone[m]) for m in METRICS}
    out["pairs"] = []
    for name, other in PAIRS:
        if name in values and other in values:
            pair = [name, other]
            for way in ("test", "test_neighbours", "test_views"):
                if way in values[name] and way in values[other]:
                    ndcg = (values[x][way]["ndcg@10"] for x in (other, name))
                    pair.append([way, *drawn.difference(*ndcg)])
            out["pairs"].append(pair)
    if "anchor" in values:
        out["groups"] = _by_group(values, drawn, dataset)
    return out


def _by_group(values: dict[str, Any], drawn: Resampled, dataset: Any) -> list[dict[str, Any]]:
    """Differences to one more token by groups of test rows."""
    rows = []
    for trait, own in traits(dataset).items():
        for label, chosen in groups(own):
            ndcg = {name: ways["test"]["ndcg@10"] for name, ways in values.items()}
            row: dict[str, Any] = {"trait": trait, "group": label, "rows": len(chosen)}
            row["control"] = float(ndcg["anchor"][:, chosen].mean())
            row["differences"] = {
                name: drawn.difference(ndcg["anchor"], x, chosen) for name, x in ndcg.items() if name != "anchor"
            }
            rows.append(row)
    return rows


def _values(folder: Path, lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """[seeds, rows] by variant, way ("test", "test_neighbours", "test_views") and metric."""
    found: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {}
    for line in sorted(lines, key=lambda x: x["seed"]):
        for way, ranks in read_ranks(folder, line).items():
            if way.startswith("test"):
                for metric in METRICS:
                    by_metric = found.setdefault(line["variant"], {}).setdefault(way, {})
                    by_metric.setdefault(metric, []).append(row_metrics(ranks)[metric])
    return {v: {w: {m: np.stack(x) for m, x in b.items()} for w, b in ways.items()} for v, ways in found.items()}
