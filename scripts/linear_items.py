"""The linear item-item model beside item-kNN on real data, as a table of docs/quality.md.

    python -m scripts.linear_items --run --data data    # two minutes of one core; data: as in scripts/study
    python -m scripts.linear_items                      # docs/quality.md alone

Both are fitted on training rows alone and have the package's defaults.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np

from flr.data import Interactions, RecDataset, fit_linear, load_dataset
from flr.evaluate import evaluate_scorer
from flr.evaluate.baselines import ItemKNN, LinearItems
from flr.evaluate.metrics import row_metrics
from flr.files import read_json, write_json

from .marks import filled, with_interval
from .study.stats import Resampled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/linear_items.json", ROOT / "docs/quality.md"
SHOPS = ("instruments", "amazon-cds", "amazon-office")
FORWARD = "linear, without what came before"


def measured(dataset: RecDataset) -> dict[str, Any]:
    """Both on valid and test, their difference with its interval over users, and the forward half alone on valid."""
    found: dict[str, Any] = {"items": len(dataset.catalogue), "rows": len(dataset.train)}
    scorers = []
    for kind in (ItemKNN, LinearItems):
        started = time.process_time()
        scorers.append(kind(dataset.train, len(dataset.catalogue)))
        found[f"{kind.name}, CPU seconds"] = round(time.process_time() - started, 2)
    for split in ("valid", "test"):
        rows: Interactions = getattr(dataset, split)
        each = []
        for scorer in scorers:
            result = evaluate_scorer(scorer, rows, dataset.catalogue, samples=1)
            by_row = row_metrics(result.ranks["item"])
            found.setdefault(scorer.name, {})[split] = _means(by_row)
            each.append(by_row["ndcg@10"][None])
        found[f"less item-kNN, {split}"] = [round(x, 6) for x in Resampled(rows.users).difference(*each)]
    forward = copy.copy(scorers[-1])
    forward.table = fit_linear(dataset.train, len(dataset.catalogue), backward=0.0)
    ranks = evaluate_scorer(forward, dataset.valid, dataset.catalogue, samples=1).ranks["item"]
    found[FORWARD] = _means(row_metrics(ranks))
    return found


def _means(by_row: dict[str, np.ndarray]) -> list[float]:
    """HR@10 and NDCG@10."""
    return [round(float(by_row[name].mean()), 6) for name in ("hr@10", "ndcg@10")]


def table(found: dict[str, Any]) -> str:
    """HR@10 and NDCG@10, and the difference of the two; bold where the interval excludes 0."""
    heads = ["data", "", "valid HR@10", "NDCG@10", "test HR@10", "NDCG@10", "less that of item-kNN", "CPU seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for shop in SHOPS:
        own = found[shop]
        mean, low, high = own["less item-kNN, test"]
        less = with_interval(mean, low, high, "+")
        less = f"**{less}**" if low > 0 or high < 0 else less
        for name in (ItemKNN.name, LinearItems.name):
            values = [f"{x:.4f}" for split in ("valid", "test") for x in own[name][split]]
            cells = [shop, name, *values, less if name == LinearItems.name else "", own[f"{name}, CPU seconds"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append(f"| {shop} | {FORWARD} | {' | '.join(f'{x:.4f}' for x in own[FORWARD])} |{'  |' * 4}")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "quality:linear_items", table(read_json(RESULT, 1 << 20)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="Fit and measure.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="Folder of instruments and the Amazon data.")
    args = parser.parse_args()
    if args.run:
        write_json(RESULT, {shop: measured(load_dataset(args.data / shop)) for shop in SHOPS})
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
