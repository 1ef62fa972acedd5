"""What a study found, as the numbers that its tables show: docs/results/study.json."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flr.data import load_dataset
from flr.evaluate import evaluate_scorer
from flr.evaluate.baselines import ItemKNN, LinearItems
from flr.evaluate.metrics import row_metrics

from .groups import groups, traits
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
WAYS = ("test", "test_neighbours", "test_linear", "test_views")  # alone, and with another ranker beside
#: What a result says of its training.
ABOUT = (
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
    "device",
)
MAIN = ("instruments", "id", "")  # data, codec, change
#: Less that of another, by groups of users.
BY_GROUP = (
    ("flr", "anchor"),
    ("offsets-mixture", "anchor"),
    ("flr-mixture", "anchor"),
    ("flr-mixture", "offsets-mixture"),
)
#: What is trained by the recipe again, with other seeds.
REPEATED = ("anchor", "offsets-mixture", "flr-mixture")
#: What is compared training by training, and the differences that are asked for.
COMPARED = ("anchor", "offsets", "flr", "offsets-mixture", "flr-mixture")
COMPARED_PAIRS = (
    ("flr-mixture", "anchor"),
    ("flr-mixture", "offsets-mixture"),
    ("offsets-mixture", "anchor"),
    ("flr", "anchor"),
    ("flr", "offsets"),
)


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


def shared_seeds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those lines whose seed every variant among them has: a table compares models of as many trainings."""
    seeds = [{x["seed"] for x in lines if x["variant"] == v} for v in {line["variant"] for line in lines}]
    shared = set.intersection(*seeds) if seeds else set()
    return [line for line in lines if line["seed"] in shared]


def summary(folders: list[Path], data: Path) -> dict[str, Any]:
    """All tables of the results in some folders; ``data`` holds the prepared data sets by name."""
    lines = lines_of(folders)
    chosen = chosen_settings(lines)
    out: dict[str, Any] = {"chosen": chosen, "runs": [run_of(line) for line in lines]}
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        wanted = line["setting"] in (None, chosen.get(line["variant"], line["setting"]))
        if wanted and (not line.get("tune") or line["variant"] in chosen):
            parts.setdefault(key_of(line["tags"]), []).append(line)
    out["tables"] = []
    main = parts.get(MAIN, [])
    for (name, codec, change), own in parts.items():
        beside = [line for line in main if _conditions(line) in {_conditions(x) for x in own}] if change else []
        table = table_of(data / name, shared_seeds(own), beside)
        out["tables"].append({"data": name, "codec": codec, "change": change, **table})
    linear = [line for line in lines if "linear" in line.get("beside", {}) and key_of(line["tags"]) == MAIN]
    out["linear"] = {}
    for setting in sorted({line["setting"] for line in linear}):
        own = shared_seeds([line for line in linear if line["setting"] == setting])
        out["linear"][setting] = table_of(data / MAIN[0], own, [])
    repeated = [line for line in lines if line["variant"] in COMPARED and key_of(line["tags"]) == MAIN]
    out["repeated"] = _repeated(load_dataset(data / MAIN[0]), repeated)
    return out


def lines_of(folders: list[Path]) -> list[dict[str, Any]]:
    """What has ended well in some folders, with its folder."""
    found = [{**line, "folder": folder} for folder in folders for line in read_results(folder)]
    return [line for line in found if "error" not in line]


def _conditions(line: dict[str, Any]) -> tuple[str, ...]:
    """What two trainings share that differ by one change."""
    return tuple(str(line[name]) for name in ("variant", "setting", "seed", "device"))


def key_of(tags: dict[str, str]) -> tuple[str, str, str]:
    return tags["data"], tags["codec"], tags.get("change", "")


def _repeated(dataset: Any, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Trainings by one setting and seed, each by itself, and the recipe's over its seeds.

    Differences of one training are drawn over users, those of several over seeds as well.
    """
    drawn = Resampled(dataset.test.users)
    together: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        together.setdefault((line["setting"], line["seed"]), {})[line["variant"]] = line
    trainings = []
    for (setting, seed), own in together.items():
        about: dict[str, Any] = {"setting": setting, "seed": seed}
        about["device"] = sorted({line["device"] for line in own.values()})
        about["valid"] = {name: line["metrics"]["valid"]["ndcg@10"] for name, line in own.items()}
        trainings.append(about | _differences(drawn, list(own.values())))
    recipe = [line for line in lines if line["setting"] == "recipe"]
    seeds = {name: [line["seed"] for line in recipe if line["variant"] == name] for name in COMPARED}
    several = shared_seeds([line for line in recipe if len(seeds[line["variant"]]) > 1])
    out = {"trainings": trainings, "recipe": _differences(drawn, several)}
    return out | {"seeds": sorted({line["seed"] for line in several})}


def _differences(drawn: Resampled, lines: list[dict[str, Any]]) -> dict[str, Any]:
    ndcg = {name: ways["test"]["ndcg@10"] for name, ways in _values(lines).items()}
    pairs = [(name, other) for name, other in COMPARED_PAIRS if name in ndcg and other in ndcg]
    return {
        "test": {name: float(x.mean()) for name, x in ndcg.items()},
        "pairs": [[name, other, *drawn.difference(ndcg[other], ndcg[name])] for name, other in pairs],
    }


def run_of(line: dict[str, Any]) -> dict[str, Any]:
    kept = {name: line[name] for name in ABOUT if name in line}
    kept |= {split: {m: own[m] for m in METRICS} for split, own in line["metrics"].items()}
    weights = {name: own["weight"] for name, own in line.get("beside", {}).items()}
    return {**kept, "weights": weights, "gpu_gb": line.get("gpu_gb")}


def table_of(data: Path, lines: list[dict[str, Any]], beside: list[dict[str, Any]]) -> dict[str, Any]:
    """Models of one data set and codec; ``beside`` are those that ``lines`` were changed from."""
    dataset = load_dataset(data)
    drawn = Resampled(dataset.test.users)
    values = _values(lines)
    out: dict[str, Any] = {"rows": len(dataset.test), "items": len(dataset.catalogue), "models": {}}
    out["device"] = sorted({line["device"] for line in lines})
    for variant, ways in values.items():
        own = sorted((line for line in lines if line["variant"] == variant), key=lambda line: line["seed"])
        entry: dict[str, Any] = {"seeds": len(own), "seconds": float(np.median([x["train_seconds"] for x in own]))}
        entry |= {"parameters": own[0]["parameters"], "setting": own[0]["setting"]}
        entry["valid"] = float(np.mean([line["metrics"]["valid"]["ndcg@10"] for line in own]))
        for way, by_metric in ways.items():
            entry[way] = {m: drawn.interval(by_metric[m]) for m in METRICS}
        if "anchor" in values and variant != "anchor":
            entry["less_anchor"] = drawn.difference(values["anchor"]["test"]["ndcg@10"], ways["test"]["ndcg@10"])
        entry["each"] = [[line["seed"], float(x.mean())] for line, x in zip(own, ways["test"]["ndcg@10"], strict=True)]
        if base := [x for x in beside if x["variant"] == variant]:
            unchanged = _values(base)[variant]["test"]["ndcg@10"]
            entry["unchanged"] = float(unchanged.mean())
            entry["less"] = drawn.difference(unchanged, ways["test"]["ndcg@10"])
        out["models"][variant] = entry
    if beside:
        return out
    _beside_baselines(out, values, drawn, data)
    out["pairs"] = []
    for name, other in PAIRS:
        if name in values and other in values:
            pair = [name, other]
            for way in WAYS:
                if way in values[name] and way in values[other]:
                    ndcg = (values[x][way]["ndcg@10"] for x in (other, name))
                    pair.append([way, *drawn.difference(*ndcg)])
            out["pairs"].append(pair)
    if "anchor" in values:
        out["groups"] = _by_group(values, drawn, dataset)
    return out


def _beside_baselines(out: dict[str, Any], values: dict[str, Any], drawn: Resampled, data: Path) -> None:
    """Item-kNN and the linear model, and what models have less than each, by way of answering."""
    for (name, ranks), less in zip(_baseline_ranks(data).items(), ("less_knn", "less_linear"), strict=True):
        alone = {m: row_metrics(ranks)[m][None] for m in METRICS}
        out[name] = {m: drawn.interval(alone[m]) for m in METRICS}
        for variant, ways in values.items():
            found = {w: drawn.difference(alone["ndcg@10"], ways[w]["ndcg@10"]) for w in ways if w != "test_views"}
            out["models"][variant][less] = found


@cache
def _baseline_ranks(data: Path) -> dict[str, np.ndarray]:
    """Of item-kNN and the linear model on test, once for all tables of a data set."""
    dataset = load_dataset(data)
    scorers = [kind(dataset.train, len(dataset.catalogue)) for kind in (ItemKNN, LinearItems)]
    found = [evaluate_scorer(scorer, dataset.test, dataset.catalogue, samples=1) for scorer in scorers]
    return {scorer.name: result.ranks["item"] for scorer, result in zip(scorers, found, strict=True)}


def _by_group(values: dict[str, Any], drawn: Resampled, dataset: Any) -> list[dict[str, Any]]:
    """NDCG@10 of one more token, and differences, by groups of test rows."""
    rows = []
    for trait, own in traits(dataset).items():
        for label, chosen in groups(own):
            ndcg = {name: ways["test"]["ndcg@10"] for name, ways in values.items()}
            row: dict[str, Any] = {"trait": trait, "group": label, "rows": len(chosen)}
            row["control"] = float(ndcg["anchor"][:, chosen].mean())
            asked = [(name, other) for name, other in BY_GROUP if name in ndcg and other in ndcg]
            row["pairs"] = [[a, b, *drawn.difference(ndcg[b], ndcg[a], chosen)] for a, b in asked]
            rows.append(row)
    return rows


def _values(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """[seeds, rows] by variant, way (``WAYS``) and metric."""
    found: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {}
    for line in sorted(lines, key=lambda x: x["seed"]):
        for way, ranks in read_ranks(line["folder"], line).items():
            if way.startswith("test"):
                for metric in METRICS:
                    by_metric = found.setdefault(line["variant"], {}).setdefault(way, {})
                    by_metric.setdefault(metric, []).append(row_metrics(ranks)[metric])
    return {v: {w: {m: np.stack(x) for m, x in b.items()} for w, b in ways.items()} for v, ways in found.items()}
