"""Does one run with more factors than needed find how many interests there are? Generated data, many seeds.

    python scripts/factor_number.py --work out/factor-number --results docs/results/factor_number.json

Users mix all of 2, 3, 4 or 6 interests. A mixture of eight factors is trained with ``sparsity_weight`` 0.1, and
``flr factors`` says how many are enough on valid. Neither data nor models are the same for two seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for bench

from bench.machine import facts  # noqa: E402
from flr.cli import sft, voice  # noqa: E402
from flr.cli.backbone import ModelOptions  # noqa: E402
from flr.cli.options import AugmentOptions, DataOptions  # noqa: E402
from flr.config import FLRConfig  # noqa: E402
from flr.data import planted_dataset  # noqa: E402
from flr.explain import factors_needed  # noqa: E402
from flr.files import write_json  # noqa: E402
from flr.train import SFTConfig  # noqa: E402

ITEMS, USERS, FACTORS = 200, 1500, 8


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out/factor-number", help="folder of the runs")
    parser.add_argument("--interests", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sparsity", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def one(args: argparse.Namespace, interests: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train, and count."""
    dataset = planted_dataset(ITEMS, USERS, interests, interests_per_user=interests, seed=seed)
    config = FLRConfig(
        aggregation="mixture", anchor="last", num_factors=FACTORS, factor_size=16, num_refinements=1, init_scale=0.3,
        diversity_weight=0.1, sparsity_weight=args.sparsity,
    )  # fmt: skip
    training = SFTConfig(
        output_dir=str(folder), overwrite_output_dir=True, num_train_epochs=args.epochs, learning_rate=3e-3,
        reasoner_learning_rate=1e-3, embedding_dropout=0.1, output_dropout=0.1, lr_scheduler_type="cosine",
        per_device_train_batch_size=128, seed=seed, use_cpu=True, report_to="none", disable_tqdm=True,
        eval_strategy="no", save_strategy="no", load_best_model_at_end=False, eval_max_users=1,
    )  # fmt: skip
    started = time.process_time()
    model = ModelOptions(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    trained, processor, _ = sft.train(DataOptions(codec="id"), AugmentOptions(), model, config, training, dataset)
    needed = factors_needed(trained, processor, dataset.valid, batch_size=256)
    seconds = round(time.process_time() - started, 1)
    return {"interests": interests, "seed": seed, "cpu_seconds": seconds, **needed.to_dict()}


def main() -> int:
    args, console = options(), Console(stderr=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("flr").setLevel(logging.ERROR)
    runs: list[dict[str, Any]] = []
    for interests in args.interests:
        for seed in range(args.seeds):
            done = args.work / f"{interests}-{seed}.json"
            if not done.is_file():
                with voice.stage(f"{interests} interests, seed {seed}"):
                    write_json(done, one(args, interests, seed, args.work / "run"))
            runs.append(json.loads(done.read_text()))
            console.print(f"{interests} interests, seed {seed}: {runs[-1]['enough']} factors are enough")
    rows = []
    for interests in args.interests:
        found = [run["enough"] for run in runs if run["interests"] == interests]
        rows.append({"interests": interests, "found": found, "right": sum(n == interests for n in found)})
        console.print(rows[-1])
    if args.results:
        settings = {name: getattr(args, name) for name in ("sparsity", "epochs", "seeds")}
        write_json(args.results, {**facts(), **settings, "rows": rows, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
