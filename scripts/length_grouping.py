"""What batches of similar length save, and what they cost in quality.

    python -m scripts.length_grouping speed --data $FLR_DATA/amazon-cds   # padding and CPU time of steps on real titles
    python -m scripts.length_grouping quality --codec title --seeds 4     # test loss and NDCG@10 on generated data
    python -m scripts.length_grouping tables                              # docs/training.md from the results
    python -m scripts.length_grouping tables --check                      # exit 1 where it is stale

``--train_sampling_strategy`` is group_by_length against random. Results go into docs/results/length_grouping.json. A
speed is a ratio within one process on one thread: both orders take steps on one model in turn, at batches spread evenly
over an epoch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flr
from flr.data import RecProcessor, SFTCollator, build_tokenizer, load_dataset, planted_dataset
from flr.evaluate import evaluate
from flr.files import read_json, write_json
from flr.train import SFTConfig, SFTTrainer

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = "docs/training.md", "docs/results/length_grouping.json"
STRATEGIES = ("random", "group_by_length")
_TURN = 2  # steps that one order takes before the other


def trainer_of(
    dataset: Any, codec: str, shape: dict[str, int], seed: int, vocabulary: int, **options: Any
) -> SFTTrainer:
    """Supervised training of a small Llama from scratch, with four factors."""
    tokenizer = build_tokenizer(dataset.catalogue, codec, vocab_size=vocabulary)
    processor = RecProcessor(tokenizer, dataset.catalogue, codec)
    torch.manual_seed(seed)
    sizes = {**shape, "intermediate_size": 2 * shape["hidden_size"], "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    flr.patch_model(model, tokenizer, flr.FLRConfig(num_factors=4))
    quiet = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
    quiet |= {"use_cpu": True, "logging_strategy": "no", "normalisation": "catalogue", "seed": seed}
    args = SFTConfig(output_dir=tempfile.mkdtemp(), **{**quiet, **options})
    return SFTTrainer(model, args, processor, dataset.train)


def padding(trainer: SFTTrainer, order: np.ndarray) -> float:
    """The share of padding in an epoch's batches."""
    rows, processor, size = trainer.train_dataset.interactions, trainer.processor, trainer.args.train_batch_size
    prompts = processor.prompt_lengths(rows.histories)[order]
    targets = processor.item_codec.lengths[rows.targets][order]
    places = sum(
        len(prompts[i : i + size]) * int(prompts[i : i + size].max() + targets[i : i + size].max())
        for i in range(0, len(order), size)
    )
    return 1 - int((prompts + targets).sum()) / places


def speed(folder: str, size: int, rows: int) -> dict[str, Any]:
    """Padding of an epoch in both orders, and how much longer a step in random order takes."""
    shape = {"hidden_size": 128, "num_hidden_layers": 4}
    dataset, found, batches = load_dataset(folder), {"rows": size}, {}
    for strategy in STRATEGIES:
        options = {"per_device_train_batch_size": size, "train_sampling_strategy": strategy}
        trainer = trainer_of(dataset, "title", shape, 0, 8000, **options)
        order = np.array([row for _, row in trainer._get_train_sampler()])
        found[f"padding {strategy}"] = round(padding(trainer, order), 4)
        whole = order[: len(order) // size * size].reshape(-1, size)
        steps = rows // size // _TURN * _TURN
        chosen = whole[((np.arange(steps) + 0.5) * len(whole) / steps).astype(int)]
        batches[strategy] = [trainer._batch([trainer.train_dataset[int(i)] for i in part]) for part in chosen]
    model, optimizer = trainer.model.train(), trainer.create_optimizer()

    def step(batch: dict[str, Any]) -> None:
        trainer.compute_loss(model, dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    step(batches["random"][0])  # what is made at the first call
    for turn, start in enumerate(range(0, steps, _TURN)):
        for strategy in STRATEGIES if turn % 2 else STRATEGIES[::-1]:
            began = time.process_time()
            for batch in batches[strategy][start : start + _TURN]:
                step(batch)
            seconds[strategy].append(time.process_time() - began)
    totals = {strategy: sum(values) for strategy, values in seconds.items()}
    found |= {f"steps per CPU second {s}": round(steps / totals[s], 2) for s in STRATEGIES}
    return found | {"steps": steps, "speedup": round(totals["random"] / totals["group_by_length"], 2), **shape}


@torch.no_grad()
def test_loss(trainer: SFTTrainer, rows: Any) -> float:
    """The mean loss of the test rows' targets."""
    model, collate = trainer.model.eval(), SFTCollator(trainer.processor)
    total = 0.0
    for start in range(0, len(rows), 128):
        batch = collate([rows[i] for i in range(start, min(start + 128, len(rows)))])
        del batch["item_positions"]
        batch["labels"] = trainer.catalogue_loss.target_nodes(batch["labels"])
        total += float(trainer.compute_loss(model, batch)) * min(128, len(rows) - start)
    return total / len(rows)


def quality(codec: str, seed: int, size: int, epochs: int) -> dict[str, Any]:
    """Loss and NDCG@10 on the test rows of generated data after training in both orders from the same weights."""
    dataset = planted_dataset(300, 1000, seed=0)
    found: dict[str, Any] = {"codec": codec, "seed": seed, "rows": size, "epochs": epochs}
    for strategy in STRATEGIES:
        options = {"per_device_train_batch_size": size, "train_sampling_strategy": strategy, "learning_rate": 3e-3}
        options |= {"reasoner_learning_rate": 1e-3, "lr_scheduler_type": "cosine", "num_train_epochs": epochs}
        trainer = trainer_of(dataset, codec, {"hidden_size": 64, "num_hidden_layers": 2}, seed, 600, **options)
        metrics = trainer.train().metrics
        result = evaluate(trainer.model, trainer.processor, dataset.test, progress=False, samples=1)
        found[strategy] = {
            "loss": round(test_loss(trainer, dataset.test), 4),
            "ndcg@10": round(result.metrics["item"]["ndcg@10"], 4),
            "padding": metrics["padding"],
        }
    return found


def speed_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rows a batch | padding, random | padding, grouped | steps per CPU second, grouped / random |",
        "|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * row[f'padding {strategy}']:.0f} %" for strategy in STRATEGIES)
        lines.append(f"| {row['rows']} | {shares} | {row['speedup']:.2f} |")
    return "\n".join(lines)


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and the mean and standard deviation of the differences between runs of one seed."""
    lines = ["| codec | seeds | | random | grouped | difference ± deviation of one seed |", "|---|---|---|---|---|---|"]
    for codec in dict.fromkeys(row["codec"] for row in rows):
        runs = [row for row in rows if row["codec"] == codec]
        for name in ("loss", "ndcg@10"):
            random, grouped = ([run[strategy][name] for run in runs] for strategy in STRATEGIES)
            apart = [b - a for a, b in zip(random, grouped, strict=True)]
            spread = f" ± {statistics.stdev(apart):.4f}" if len(apart) > 1 else ""
            means = f"{statistics.mean(random):.4f} | {statistics.mean(grouped):.4f}"
            lines.append(f"| {codec} | {len(runs)} | {name} | {means} | {statistics.mean(apart):+.4f}{spread} |")
    return "\n".join(lines)


TABLES = {"speed": speed_table, "quality": quality_table}


def page(root: Path = ROOT) -> str:
    """What the page should hold."""
    results = read_json(root / RESULTS)
    text = (root / PAGE).read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = filled(text, f"length_grouping:{name}", table(results[name]))
    return text


def record(part: str, row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Put a row into the results, in the place of the one with the same keys."""
    file = ROOT / RESULTS
    results = read_json(file) if file.exists() else {}
    others = [r for r in results.get(part, []) if any(r[key] != row[key] for key in keys)]
    results[part] = sorted([*others, row], key=lambda r: tuple(r[key] for key in keys))
    write_json(file, results)
    print(part, row, flush=True)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "quality", "tables"])
    parser.add_argument("--data", help="folder of a data set with titles")
    parser.add_argument("--rows", type=int, default=640, help="rows that each order trains on for a speed")
    parser.add_argument("--codec", default="title")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.part == "speed":
        for size in (8, 16, 64):
            record("speed", speed(options.data, size, options.rows), ("rows",))
    elif options.part == "quality":
        for seed in range(options.seeds):
            record("quality", quality(options.codec, seed, 32, options.epochs), ("codec", "seed"))
    else:
        text = page(root)
        if (root / PAGE).read_text(encoding="utf-8") == text:
            return 0
        if options.check:
            sys.stderr.write(f"{PAGE}: expected what {RESULTS} gives; run python -m scripts.length_grouping tables\n")
            return 1
        (root / PAGE).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
