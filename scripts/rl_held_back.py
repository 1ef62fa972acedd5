"""Reinforcement on rows that supervised training has not seen, beside spending the same rows on supervised training.

    flr sft --config examples/instruments.yaml --teacher none --embedding_dropout 0.1 --output_dropout 0.1 \\
        --anchor last --output_dir runs/all
    flr sft … the same … --output_dir runs/rest --held_back 0.1
    python -m scripts.rl_held_back --data data/instruments --rest runs/rest --all runs/all

Every way goes on from the model of --rest with the rows that it did not see, for the same number of epochs, at each of
the learning rates; the epoch and the rate are chosen by NDCG@10 on valid users (--eval_max_users), and test is looked
at once, with what was chosen. Differences are paired by user, with 95 % bootstrap intervals over users. Results go to
docs/results/rl_held_back.json and into the table of docs/rl.md; --table writes the page alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.machine import facts
from flr.cli import rl, sft
from flr.cli.backbone import ModelOptions
from flr.cli.options import AugmentOptions, DataOptions
from flr.data import RecDataset, RecProcessor, hold_back
from flr.evaluate import evaluate
from flr.evaluate.metrics import paired_difference, row_metrics
from flr.files import read_json, write_json
from flr.model.checkpoint import from_pretrained
from flr.train import LatentGRPOConfig, SFTConfig

from .marks import filled, with_interval

#: Options of latent GRPO by way; None is supervised training of all weights.
WAYS: dict[str, dict[str, Any] | None] = {
    "supervised, all weights": None,
    "likelihood of the thought": {"likelihood_weight": 1.0},
    "reinforced, log-likelihood": {"reward": "log_likelihood"},
    "reinforced, NDCG@10": {"reward": "ndcg@10"},
    "hybrid, NDCG@10": {
        "reward": "ndcg@10",
        "likelihood_weight": 0.2,
        "likelihood_adaptive": True,
        "noise_target": 0.5,
        "kl_weight": 0.01,
        "kl_target": 0.5,
    },
}
ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/rl_held_back.json", ROOT / "docs/rl.md"
RATES = (1e-3, 3e-3)
METRICS = ("hr@10", "ndcg@10")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--rest", type=Path, help="trained without the rows held back")
    parser.add_argument("--all", type=Path, help="trained on all rows; left out where not given")
    parser.add_argument("--held_back", type=float, default=0.1)
    parser.add_argument("--work", type=Path, default=ROOT / "out/rl-held-back", help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--eval_max_users", type=int, default=6193)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--results", type=Path, default=RESULT, help="JSON with every run and the table")
    parser.add_argument("--table", action="store_true", help="only write the page, from the result")
    args = parser.parse_args()
    if not args.table and not (args.data and args.rest):
        parser.error("expected --data and --rest")
    return args


def train(args: argparse.Namespace, way: str, rate: float, dataset: RecDataset, folder: Path) -> dict[str, Any]:
    """One run; returns its best valid NDCG@10 and CPU seconds."""
    shared: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": args.epochs, "lr_scheduler_type": "linear", "seed": args.seed,
        "eval_max_users": args.eval_max_users, "per_device_eval_batch_size": 512, "use_cpu": True, "bf16": True,
        "report_to": "none", "disable_tqdm": True, "save_total_limit": 1, "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    data = DataOptions(data=args.data, codec="id", max_history=20)
    started = time.process_time()
    settings = WAYS[way]
    if settings is None:
        held = dataclasses.replace(dataset, train=hold_back(dataset.train, args.held_back)[1])
        model = ModelOptions(model=str(args.rest), attn_implementation="eager")
        rates = {"learning_rate": rate, "embedding_learning_rate": 2 * rate, "reasoner_learning_rate": rate / 2}
        dropout = {"embedding_dropout": 0.1, "output_dropout": 0.1}
        own = SFTConfig(per_device_train_batch_size=512, **rates, **dropout, **shared)
        config = from_pretrained(args.rest)._flr_patch.config
        best = sft.train(data, AugmentOptions(), model, config, own, held)[2]["best_valid"]
    else:
        chosen = rl.RLOptions(model=str(args.rest), held_back=args.held_back, attn_implementation="eager")
        own = LatentGRPOConfig(per_device_train_batch_size=128, learning_rate=rate, **settings, **shared)
        best = rl.train(chosen, data, own, dataset)[2]["after"]["ndcg@10"]
    return {"way": way, "rate": rate, "valid ndcg@10": best, "cpu_seconds": round(time.process_time() - started, 1)}


def measured(folder: Path, dataset: RecDataset) -> dict[str, np.ndarray]:
    """Values [n] of the test users by metric."""
    model, processor = from_pretrained(folder), RecProcessor.from_pretrained(folder)
    result = evaluate(model, processor, dataset.test, batch_size=512, progress=False, samples=1)
    return {name: row_metrics(result.ranks["item"])[name] for name in METRICS}


def row(name: str, values: dict[str, np.ndarray], base: dict[str, np.ndarray], users: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name} | {metric: float(x.mean()) for metric, x in values.items()}
    if values is not base:
        found["difference"] = paired_difference(base["ndcg@10"], values["ndcg@10"], users)._asdict()
    return found


def table(studies: list[dict[str, Any]]) -> str:
    """The results in Markdown, a study a seed."""
    lines = ["| | seed | rate | valid NDCG@10 | test HR@10 | test NDCG@10 | less that of rows left out | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    names = dict.fromkeys(row["name"] for study in studies for row in study["rows"])
    for name in names:
        for study in studies:
            for row in (row for row in study["rows"] if row["name"] == name):
                d = row.get("difference")
                change = "" if d is None else with_interval(d["mean"], d["low"], d["high"], "+")
                cells = [name, str(study["seed"]), f"{row['rate']:g}" if "rate" in row else ""]
                cells.append(f"{row['valid ndcg@10']:.4f}" if "rate" in row else "")
                cells += [f"{row['hr@10']:.4f}", f"{row['ndcg@10']:.4f}", change, f"{row.get('cpu_seconds', '')}"]
                lines.append(f"| {' | '.join(cells)} |")
    first = studies[0]
    about = f"{first['rows_held']:,} rows held back, {first['epochs']} epochs on them"
    about += f", {first['test_users']:,} test users, whole catalogue"
    lines.append(f"\n{about}; choices by {first['valid_users']:,} users of valid.")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "rl:held_back", table(read_json(RESULT, 1 << 24)["studies"]))


def with_study(path: Path, study: dict[str, Any]) -> dict[str, Any]:
    """The results in a file with this study in the place of an earlier one of its seed."""
    others = read_json(path, 1 << 24)["studies"] if path.is_file() else []
    kept = [other for other in others if other["seed"] != study["seed"]]
    return {"studies": sorted([*kept, study], key=lambda each: each["seed"])}


def study(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    data = DataOptions(data=args.data, codec="id", max_history=20)
    dataset = data.load()
    runs: list[dict[str, Any]] = []
    for way in args.ways:
        for rate in RATES:
            folder = args.work / f"{way.replace(', ', '-').replace(' ', '_')}-{rate:g}"
            done = folder / "run.json"
            if not done.is_file():
                write_json(done, train(args, way, rate, dataset, folder))
            runs.append({**json.loads(done.read_text()), "folder": str(folder)})
            console.print(runs[-1])
    base = measured(args.rest, dataset)
    users = dataset.test.users
    rows = [row("rows left out", base, base, users)]
    if args.all:
        rows.append(row("supervised from the start", measured(args.all, dataset), base, users))
    for way in args.ways:
        best = max((run for run in runs if run["way"] == way), key=lambda run: run["valid ndcg@10"])
        rows.append({**row(way, measured(Path(best["folder"]), dataset), base, users), **best})
    for found in rows:
        found.pop("folder", None)
        console.print(found)
    held = hold_back(dataset.train, args.held_back)[1]
    settings = {"held_back": args.held_back, "rows_held": len(held), "epochs": args.epochs, "seed": args.seed}
    settings |= {"test_users": len(users), "valid_users": min(args.eval_max_users, len(dataset.valid))}
    runs = [{name: value for name, value in run.items() if name != "folder"} for run in runs]
    return {**facts(), **settings, "rows": rows, "runs": runs}


def main() -> int:
    args = options()
    if not args.table:
        write_json(args.results, with_study(args.results, study(args, Console(stderr=True))))
    if args.results == RESULT:
        PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
