"""Does reinforcement after SFT learn? Seeds, advantages, policies and learning rates on generated data.

    python scripts/rl_sweep.py --work out/rl-sweep                                     # the committed sweep
    python scripts/rl_sweep.py --work out/cds --sft examples/amazon-cds.yaml --rl my-rl.yaml --results cds.json

Every run is `flr rl` on a model that `flr sft` made with the same seed, its summary (valid target log-likelihood and NDCG@10
before and after, and by epoch) a JSON file in --work; a run that is there is not repeated. The table and the
differences go to --results. Models are chosen as the commands do, by valid NDCG@10, unless --last asks for the last epoch's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flr.cli import rl, sft
from flr.cli.options import AugmentOptions, DataOptions, ModelOptions, parse
from flr.config import FLRConfig
from flr.data._io import write_json
from flr.train import LatentGRPOConfig, SFTConfig

ROOT = Path(__file__).parents[1]
NAMES = ("target_logprob", "ndcg@10")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out/rl-sweep", help="folder of the runs")
    parser.add_argument("--sft", type=Path, default=ROOT / "examples/planted-sft.yaml")
    parser.add_argument("--rl", type=Path, default=ROOT / "examples/planted-rl.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=["1e-5", "5e-5", "1e-4", "5e-4"])
    parser.add_argument("--advantages", nargs="+", default=["grpo", "latentr3"])
    parser.add_argument("--policies", nargs="+", default=["thoughts", "tokens"])
    parser.add_argument("--last", action="store_true", help="report the last epoch's model, not the best")
    parser.add_argument("--results", type=Path, help="JSON with every run and the table")
    return parser.parse_args()


def supervised(config: Path, seed: int, folder: Path) -> None:
    if (folder / "processor_config.json").is_file() and (folder / "model.safetensors").is_file():
        return
    classes = (DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig)
    argv = ["--config", str(config), "--output_dir", str(folder), "--seed", str(seed), "--report_to", "none"]
    *parts, _ = parse("sft", "", classes, [*argv, "--disable_tqdm", "true"])
    sft.train(*parts)


def reinforced(config: Path, model: Path, folder: Path, flags: list[str]) -> dict:
    done = folder / "summary.json"
    if done.is_file():
        return json.loads(done.read_text())
    argv = ["--config", str(config), "--model", str(model), "--output_dir", str(folder), *flags]
    parts = parse("rl", "", (rl.RLOptions, DataOptions, LatentGRPOConfig), [*argv, "--disable_tqdm", "true"])
    summary = rl.train(*parts[:3])[2]
    write_json(done, summary)
    return summary


def main() -> int:
    args, console = options(), Console(stderr=True)
    runs: list[dict] = []
    grid = list(itertools.product(args.policies, args.advantages, args.rates, args.seeds))
    with Progress(console=console) as progress:
        task = progress.add_task("rl", total=len(grid))
        for policy, advantage, rate, seed in grid:
            progress.update(task, description=f"{policy} {advantage} {rate}, seed {seed}")
            start = args.work / f"sft-{seed}"
            supervised(args.sft, seed, start)
            flags = ["--policy", policy, "--advantage", advantage, "--learning_rate", rate, "--seed", str(seed)]
            flags += ["--report_to", "none", "--load_best_model_at_end", str(not args.last).lower()]
            summary = reinforced(args.rl, start, args.work / f"{policy}-{advantage}-{rate}-{seed}", flags)
            runs.append({**summary, "policy": policy, "advantage": advantage, "rate": rate, "seed": seed})
            progress.advance(task)
    table = Table(
        "policy", "advantage", "rate", *(f"valid {n}" for n in NAMES), "difference, by seed", title="RL after SFT"
    )
    rows = []
    for key in dict.fromkeys((r["policy"], r["advantage"], r["rate"]) for r in runs):
        mine = [r for r in runs if (r["policy"], r["advantage"], r["rate"]) == key]
        row = dict(zip(("policy", "advantage", "rate"), key, strict=True))
        for name in NAMES:
            row[name] = {
                "before": [r["before"][name] for r in mine],
                "after": [r["after"][name] for r in mine],
                "difference": [r["after"][name] - r["before"][name] for r in mine],
            }
        means = [f"{statistics.mean(row[n]['before']):.4f} → {statistics.mean(row[n]['after']):.4f}" for n in NAMES]
        each = "; ".join(" ".join(f"{d:+.4f}" for d in row[n]["difference"]) for n in NAMES)
        table.add_row(*key, *means, each)
        rows.append(row)
    console.print(table)
    if args.results:
        chosen = "last epoch" if args.last else "best epoch by valid ndcg@10"
        found = {"sft": args.sft.read_text(), "rl": args.rl.read_text(), "chosen": chosen, "rows": rows, "runs": runs}
        write_json(args.results, found)
        console.print(f"written to {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
