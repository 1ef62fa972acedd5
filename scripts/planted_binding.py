"""What factors of the quickstart's models look for, and what they look at, as a table of docs/quality.md.

    python -m scripts.planted_binding --run          # trains; about 50 seconds of one core a model
    python -m scripts.planted_binding                # docs/quality.md alone

Every model is one of `flr quickstart`, which docs/results/planted_binding.json says. "untrained" is mode flr before its
first step, with item embeddings made of the titles: what it has, training did not bring. "groups" is
``--factors_from_groups true``. "latest" is no model: four
factors that know the interests and look at the latest item of theirs, and evenly where a history has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flr.cli import sft
from flr.cli.compare import mode_config
from flr.cli.quickstart import QuickstartOptions, settings
from flr.data import RecDataset
from flr.evaluate import evaluate
from flr.explain import agreement, assign_factors, factor_interest
from flr.files import read_json, write_json

from .marks import filled
from .quickstart_table import span

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/planted_binding.json", ROOT / "docs/quality.md"
MODES = {
    "flr": "K factors, one sum",
    "flr-plain": "K factors, one sum, regularisers off",
    "flr-mixture": "K factors, each with a thought of its own",
    "flr-groups": "K factors, one sum, which begin with groups of items",
    "flr-mixture-groups": "K factors, each with a thought of its own, which begin with groups of items",
    "untrained": "mode flr before its first step",
    "untrained-groups": "mode flr-groups before its first step",
    "latest": "no model: factors that know the interests and look at the latest item of theirs",
}
SEEDS = 6


def measured(mode: str, seed: int, dataset: RecDataset) -> dict[str, Any]:
    """Train the quickstart's model of a mode, or none, and measure it on test."""
    interests = dataset.catalogue.attributes["interest"]
    with tempfile.TemporaryDirectory() as folder:
        _, data, augment, model_options, config, args = settings(QuickstartOptions(output_dir=folder))
        kind = mode.removesuffix("-groups")
        model_options = dataclasses.replace(model_options, factors_from_groups=kind != mode)
        if kind == "untrained":
            torch.manual_seed(seed)
            model, processor = model_options.build(data, mode_config("flr", config), dataset, seed, use_cpu=True)
        else:
            args = dataclasses.replace(args, seed=seed, data_seed=seed)
            model, processor, _ = sft.train(data, augment, model_options, mode_config(kind, config), args, dataset)
    found = {"mode": mode, "seed": seed}
    for by in ("attention", "scores"):
        agreed = factor_interest(model, processor, dataset.test, interests, by=by)
        found |= {f"nmi_{by}": round(agreed.nmi, 4), f"chance_{by}": round(agreed.chance or 0, 4)}
    if kind != "untrained":
        metrics = evaluate(model, processor, dataset.test, progress=False).metrics["item"]
        found["ndcg@10"] = round(metrics["ndcg@10"], 4)
    return found


def latest(dataset: RecDataset) -> dict[str, Any]:
    """The agreement by attention of factors that know the interests and look at nothing but the latest item."""
    interests = dataset.catalogue.attributes["interest"]
    number, columns = int(interests.max()) + 1, []
    for row in range(len(dataset.test)):
        history = np.asarray(dataset.test[row].history)
        if len(history) < 2:
            continue
        attention = np.full((number, len(history)), 1 / len(history))
        for k in range(number):
            if len(own := np.flatnonzero(interests[history] == k)):
                attention[k] = 0.1 / len(history)
                attention[k, own[-1]] += 0.9
        columns.append((assign_factors(attention), history, np.full(len(history), row)))
    factors, items, rows = (np.concatenate(column) for column in zip(*columns, strict=True))
    agreed = agreement(factors, items, rows, interests, number)
    return {"mode": "latest", "nmi_attention": round(agreed.nmi, 4), "chance_attention": round(agreed.chance or 0, 4)}


def table(report: dict[str, Any]) -> str:
    """Means over seeds with the lowest and the highest."""
    names = ("ndcg@10", "nmi_attention", "nmi_scores")
    lines = ["| | what it is | seeds | NDCG@10 | NMI by attention | NMI by scores |", "|---|---|---|---|---|---|"]
    for mode, what in MODES.items():
        rows = [row for row in report["rows"] if row["mode"] == mode]
        cells = [span([row[name] for row in rows if name in row]) for name in names]
        lines.append(f"| {mode} | {what} | {len(rows) if 'seed' in rows[0] else ''} | {' | '.join(cells)} |")
    chance = max(row[name] for row in report["rows"] for name in row if name.startswith("chance"))
    lines.append(f"\nThe test split: means over seeds, from the lowest to the highest. By chance {chance:.3f} at most.")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "quality:planted_binding", table(read_json(RESULT, 1 << 20)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="Train and measure; known rows are kept.")
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        dataset = settings(QuickstartOptions())[1].load()
        rows = read_json(RESULT, 1 << 20)["rows"] if RESULT.is_file() else [latest(dataset)]
        known = {(row["mode"], row.get("seed")) for row in rows}
        for seed in range(SEEDS):
            for mode in MODES:
                if mode != "latest" and (mode, seed) not in known:
                    rows.append(measured(mode, seed, dataset))
                    write_json(RESULT, {"rows": rows})
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
