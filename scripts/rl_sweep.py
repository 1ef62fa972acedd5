"""Does reinforcement after SFT learn? Seeds, rewards, advantages, policies and learning rates.

    python scripts/rl_sweep.py --work out/rl-sweep --results docs/results/rl_planted.json       # generated data
    python scripts/rl_sweep.py --work out/rl-cds --sft examples/amazon-cds.yaml --rl examples/amazon-cds-rl.yaml \
        --data $FLR_DATA/amazon-cds --views 0 1 --results docs/results/rl_cds.json

Every run is ``flr rl`` on a model that ``flr sft`` made with the same seed; what is in --work already is not repeated.
Models are chosen as the commands do, by valid NDCG@10: SFT's is its best epoch, and RL's the best of its own, so
"after" on valid is a maximum over epochs. Valid figures of the last epoch and test figures of the chosen model, which
no choice saw, stand beside it. Differences are after minus before, paired by user, a user's values averaged over seeds
first, with 95 % bootstrap intervals over users.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for bench

from bench.machine import facts  # noqa: E402
from flr.cli import rl, sft  # noqa: E402
from flr.cli.backbone import ModelOptions  # noqa: E402
from flr.cli.options import AugmentOptions, DataOptions  # noqa: E402
from flr.cli.parsing import parse  # noqa: E402
from flr.config import FLRConfig  # noqa: E402
from flr.data import RecDataset, RecProcessor  # noqa: E402
from flr.evaluate import evaluate  # noqa: E402
from flr.evaluate.metrics import paired_difference, row_metrics  # noqa: E402
from flr.files import write_json  # noqa: E402
from flr.model.checkpoint import from_pretrained  # noqa: E402
from flr.train import LatentGRPOConfig, LatentGRPOTrainer, SFTConfig  # noqa: E402

METRICS = ("target_logprob", "hr@10", "ndcg@10")
SPLITS = ("valid", "test")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out/rl-sweep", help="folder of the runs")
    parser.add_argument("--sft", type=Path, default=ROOT / "examples/planted-sft.yaml")
    parser.add_argument("--rl", type=Path, default=ROOT / "examples/planted-rl.yaml")
    parser.add_argument("--data", help="overrides the data of both files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=["1e-5", "5e-5", "1e-4", "5e-4"])
    parser.add_argument("--advantages", nargs="+", default=["grpo", "latentr3"])
    parser.add_argument("--policies", nargs="+", default=["thoughts"])
    parser.add_argument("--rewards", nargs="+", default=["log_likelihood"])
    parser.add_argument("--views", type=float, nargs="+", help="rank with these weights of views; default: as trained")
    parser.add_argument("--results", type=Path, help="JSON with every run and the table")
    return parser.parse_args()


def supervised(args: argparse.Namespace, seed: int) -> Path:
    folder = args.work / f"sft-{seed}"
    if not (folder / "processor_config.json").is_file() or not (folder / "model.safetensors").is_file():
        classes = (DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig)
        argv = ["--config", str(args.sft), "--output_dir", str(folder), "--seed", str(seed), "--report_to", "none"]
        argv += ["--disable_tqdm", "true", *(["--data", args.data] if args.data else [])]
        sft.train(*parse("sft", "", classes, argv)[:-1])
    return folder


def measured(
    folder: Path, parts: tuple, dataset: RecDataset, views: list[float | None], cache: dict[Path, dict]
) -> dict[tuple[str, str], np.ndarray]:
    """Per-row values [n] of a saved model by (split, metric); metrics of views have their weight in the name."""
    if folder in cache:
        return cache[folder]
    model, processor = from_pretrained(folder), RecProcessor.from_pretrained(folder)
    trainer = LatentGRPOTrainer(model, parts[2], processor, dataset.train, dataset.valid)
    saved, found = processor.views, {}
    for split in SPLITS:
        rows = getattr(dataset, split)
        found[split, METRICS[0]] = trainer.target_logprobs(rows)
        for weight in views:
            asked = saved if weight is None else replace(parts[1], views_weight=weight).views()
            processor.views = asked if weight != 0 else None
            beams = parts[2].eval_num_beams
            result = evaluate(model, processor, rows, num_beams=beams, batch_size=256, progress=False, samples=1)
            values = row_metrics(result.ranks["item"])
            for name in METRICS[1:]:
                found[split, name if weight is None else f"{name}, views {weight:g}"] = values[name]
    cache[folder] = found
    return found


def compared(before: list[dict], after: list[dict], dataset: RecDataset) -> dict[str, Any]:
    """By split and metric: means by seed before and after, and the difference of their means with its interval."""
    found: dict[str, Any] = {}
    for split, name in before[0]:
        old, new = ([run[split, name] for run in runs] for runs in (before, after))
        users = getattr(dataset, split).users
        found.setdefault(split, {})[name] = {
            "before": [float(x.mean()) for x in old],
            "after": [float(x.mean()) for x in new],
            "difference": paired_difference(np.mean(old, 0), np.mean(new, 0), users)._asdict(),
        }
    return found


def main() -> int:
    args, console = options(), Console(stderr=True)
    runs: list[dict] = []
    rows: list[dict] = []
    cache: dict[Path, dict] = {}
    dataset = None
    grid = list(itertools.product(args.policies, args.rewards, args.advantages, args.rates))
    with Progress(console=console) as progress:
        task = progress.add_task("rl", total=len(grid) * len(args.seeds))
        for policy, reward, advantage, rate in grid:
            key = {"policy": policy, "reward": reward, "advantage": advantage, "rate": rate}
            before, after, last = [], [], []
            for seed in args.seeds:
                progress.update(task, description=f"{' '.join(key.values())}, seed {seed}")
                start = supervised(args, seed)
                folder = args.work / f"{policy}-{reward}-{advantage}-{rate}-{seed}"
                argv = [
                    "--config",
                    str(args.rl),
                    "--model",
                    str(start),
                    "--output_dir",
                    str(folder),
                    "--seed",
                    str(seed),
                ]
                argv += ["--policy", policy, "--reward", reward, "--advantage", advantage, "--learning_rate", rate]
                argv += ["--report_to", "none", "--disable_tqdm", "true", *(["--data", args.data] if args.data else [])]
                parts = parse("rl", "", (rl.RLOptions, DataOptions, LatentGRPOConfig), argv)
                dataset = parts[1].load() if dataset is None else dataset
                done = folder / "summary.json"
                if not done.is_file():
                    write_json(done, rl.train(*parts[:3], dataset)[2])
                summary = json.loads(done.read_text())
                runs.append({**summary, **key, "output_dir": folder.name, "from": start.name})
                last.append({n: summary["history"][-1][f"eval_{n}"] - x for n, x in summary["before"].items()})
                before.append(measured(start, parts, dataset, args.views or [None], cache))
                after.append(measured(folder, parts, dataset, args.views or [None], {}))
                progress.advance(task)
            assert dataset is not None
            row = {**key, "seeds": args.seeds, **compared(before, after, dataset)}
            row["last epoch minus before, valid"] = {n: [x[n] for x in last] for n in last[0]}
            rows.append(row)
            for split, name in before[0]:
                cell = row[split][name]
                old, new = np.mean(cell["before"]), np.mean(cell["after"])
                d = cell["difference"]
                each = " ".join(f"{b - a:+.4f}" for a, b in zip(cell["before"], cell["after"], strict=True))
                interval = f"{d['low']:+.4f} to {d['high']:+.4f}"
                means = f"{old:.4f} → {new:.4f}", f"{d['mean']:+.4f}"
                print(f"{' '.join(key.values()):42} {split:5} {name:16}", *means, f"({interval})", "seeds", each)
    if args.results:
        found = {**facts(), "sft": args.sft.read_text(), "rl": args.rl.read_text(), "rows": rows, "runs": runs}
        write_json(args.results, found)
        console.print(f"written to {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
