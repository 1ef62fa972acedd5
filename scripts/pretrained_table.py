"""What pretrained weights give, as tables of docs/quality.md: from the lines that ``pretrained_study.py`` has left.

    python -m scripts.pretrained_table              # docs/results/pretrained*.jsonl → docs/quality.md

The first results have the trials that chose the learning rates, ``pretrained_small`` is of a smaller budget. A trial
that was not chosen on the valid rows is not shown, and its test ranks are not read. Intervals of 95 % are by a
bootstrap that draws users (with all their rows) and seeds, both with replacement; differences are paired by both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flr.evaluate.metrics import row_metrics

from .marks import filled, with_interval
from .pretrained_study import chosen, finished, trials

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/quality.md"
RESULTS = {name: ROOT / f"docs/results/{name}.jsonl" for name in ("pretrained", "pretrained_small")}
METRICS = ("hr@10", "ndcg@10")
KINDS = {
    "lora": "SmolLM2, adapters",
    "random": "random, all weights trained",
    "random-lora": "random, adapters",
}
MODES = ("none", "anchor", "latentr3", "flr", "flr-mixture")
#: What other thoughts are compared with.
BASES = {"none": "less that of no thought", "anchor": "less that of one more token"}
SAMPLES = 2000


def by_row(test: dict[str, Any]) -> dict[str, np.ndarray]:
    """Metrics float64 [rows] of a run's ranks."""
    ranks = np.zeros(test["of"], np.int64)
    ranks[test["rows"]] = test["ranks"]
    return {name: row_metrics(ranks)[name] for name in METRICS}


def interval(values: np.ndarray, users: np.ndarray) -> list[float]:
    """Mean, low and high of values [seeds, rows]; users and seeds are drawn with replacement.

    Args:
        values: float64 [S, N].
        users: int64 [N], the user of every row, numbered from 0.
    """
    sizes = np.bincount(users)
    sums = np.stack([np.bincount(users, one) for one in values])  # [S, users]
    draw = np.random.default_rng(0)
    means = []
    for _ in range(SAMPLES):
        counts = np.bincount(draw.integers(0, len(sizes), len(sizes)), minlength=len(sizes))
        seeds = draw.integers(0, len(values), len(values))
        means.append((sums[seeds] @ counts).mean() / (sizes @ counts))
    return [float(values.mean()), *(float(x) for x in np.quantile(means, [0.025, 0.975]))]


def shown(
    done: dict[str, dict[str, Any]], best: set[tuple[str, float]]
) -> dict[tuple[str, str], dict[tuple[str, str], dict[int, Any]]]:
    """Runs of the tables by (data, codec), then by (kind of weights, mode), then by seed; ``best``: as chosen."""
    runs: dict[tuple[str, str], dict[tuple[str, str], dict[int, Any]]] = {}
    for found in done.values():
        if found["weights"] != "item-kNN" and "test" in found and (found["weights"], found["rate"]) in best:
            group = runs.setdefault((found["data"], found["codec"]), {})
            group.setdefault((found["weights"], found["mode"]), {})[found["seed"]] = found
    return runs


def difference(of: dict[int, Any], base: dict[int, Any], users: np.ndarray) -> str:
    """NDCG@10 of some runs less that of others, over the seeds of both, which are named where one side has more."""
    seeds = sorted(of.keys() & base.keys())
    if not seeds:
        return ""
    pairs = [by_row(of[s]["test"])["ndcg@10"] - by_row(base[s]["test"])["ndcg@10"] for s in seeds]
    mean, low, high = interval(np.stack(pairs), users)
    bold = "**" if low > 0 or high < 0 else ""
    alone = "" if len(seeds) == len(of) == len(base) else f", seed {', '.join(map(str, seeds))} alone"
    return f"{bold}{with_interval(mean, low, high, '+')}{bold}{alone}"


def tables(done: dict[str, dict[str, Any]], trials_done: dict[str, dict[str, Any]]) -> str:
    """All tables in Markdown, each with its budget, and what they have in common below.

    Args:
        done: lines by name.
        trials_done: those among which are the trials that chose the rates.
    """
    best, lines = chosen(trials_done), []
    columns = ("weights", "thought", "seeds", "HR@10", "NDCG@10")
    for (data, codec), group in sorted(shown(done, set(best.values())).items()):
        knn = done[f"{data}.item-kNN"]
        users = np.asarray(knn["users"])
        bases = [mode for mode in BASES if any(other not in ("none", mode) for _, other in group)]
        bases = [mode for mode in bases if any(other == mode for _, other in group)]
        random = any(not weights.startswith("lora") for weights, _ in group)
        heads = [*columns, *(BASES[mode] for mode in bases), *(["less that of random"] if random else [])]
        lines += [f"\n*{data}, `{codec}`*\n", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for weights, mode in sorted(group, key=lambda of: (MODES.index(of[1]), of[0])):
            seeds = group[weights, mode]
            cells = [KINDS[weights], mode, str(len(seeds)), *_measured([one["test"] for one in seeds.values()], users)]
            cells += [
                "" if mode in ("none", base) else difference(seeds, group.get((weights, base), {}), users)
                for base in bases
            ]
            other = group.get((best["random"][0], mode), {}) if "random" in best else {}
            if random:
                cells.append(difference(seeds, other, users) if weights == "lora" else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| item-kNN | | | {' | '.join(_measured([knn['test']], users))} |{' |' * (len(heads) - 5)}")
        lines += ["", _budget([run for seeds in group.values() for run in seeds.values()])]
    return "\n".join([*lines, "", _in_common(done)]).strip()


def _measured(tests: list[dict[str, Any]], users: np.ndarray) -> list[str]:
    values = [by_row(test) for test in tests]
    mean, low, high = interval(np.stack([one["ndcg@10"] for one in values]), users)
    return [f"{np.mean([one['hr@10'] for one in values]):.4f}", with_interval(mean, low, high)]


def _budget(runs: list[dict[str, Any]]) -> str:
    """What a table's trainings cost, in a sentence."""
    steps, rows, devices = (
        sorted({str(run.get(name, "CPU core")) for run in runs}) for name in ("steps", "batch_size", "device")
    )
    seconds = sorted(sum(run["seconds"]) for run in runs)
    took = " to ".join(dict.fromkeys(f"{x:.0f}" for x in (seconds[0], seconds[-1])))
    return (
        f"{' or '.join(steps)} steps of {' or '.join(rows)} rows; {took} seconds a run beside others on one "
        f"{' or '.join(devices)}."
    )


def _in_common(done: dict[str, dict[str, Any]]) -> str:
    """What all runs had in common, and the trials, in sentences."""
    tried = [(one, done[one.name]["valid"]) for one in trials() if "valid" in done.get(one.name, ())]
    rows = next(found["test"]["of"] for found in done.values() if found["weights"] == "item-kNN")
    common = f"{rows:,} test rows, evenly spread, whole catalogue, 20 beams; bold where the interval excludes 0."
    if not tried:
        return common
    valid = "; ".join(f"{KINDS[one.weights]}, {one.rate:g}: {found['ndcg@10']:.4f}" for one, found in tried)
    first = trials()[0]
    return (
        f"{common} NDCG@10 on {tried[0][1]['of']:,} rows of valid of {first.data}, `{first.codec}`, by learning rate, "
        f"no thought, seed 0: {valid}."
    )


def page(text: str, results: dict[str, Path] = RESULTS) -> str:
    """``text`` of the page with the tables of the results between its markers."""
    trials_done = finished(results["pretrained"])
    for name, path in results.items():
        text = filled(text, f"quality:{name}", tables(finished(path), trials_done))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
