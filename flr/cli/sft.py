"""``flr sft``: train a recommender. Every flag of transformers' TrainingArguments works."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from transformers import set_seed

from flr.config import FLRConfig
from flr.data import RecDataset
from flr.train import SFTConfig, SFTTrainer, last_complete_checkpoint

from .options import AugmentOptions, DataOptions, ModelOptions
from .parsing import console, emit, parse

ABOUT = "Train a recommender on an interaction log; ends with the best model by NDCG@10 on the valid split."


def train(
    data: DataOptions,
    augment: AugmentOptions,
    model_options: ModelOptions,
    config: FLRConfig,
    args: SFTConfig,
    dataset: RecDataset | None = None,
    resume: bool = True,
) -> tuple[Any, Any, dict[str, Any]]:
    """Train and save; returns model, processor and a summary. Continues from the last complete checkpoint, if any."""
    dataset = data.load() if dataset is None else dataset
    set_seed(args.seed)
    model, processor = model_options.build(data, config, dataset, args.seed)
    rows, changes = augment.apply(dataset, data.max_history)
    trainer = SFTTrainer(model, args, processor, rows, dataset.valid, changes)
    checkpoint = last_complete_checkpoint(str(args.output_dir)) if resume else None
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint}")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for --json
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(args.output_dir))
    trainer.save_state()
    summary = {
        "output_dir": str(args.output_dir),
        "variant": config.variant,
        "train_rows": len(rows),
        "steps": outcome.global_step,
        "seconds": outcome.metrics.get("train_runtime"),
        "best_valid": trainer.state.best_metric,
        "metric": args.metric_for_best_model,
    }
    return model.eval(), processor, summary


def main(argv: list[str]) -> int:
    classes = (DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig)
    data, augment, model, config, args, rest = parse("sft", ABOUT, classes, argv)
    if args.resume_from_checkpoint not in (None, "auto", "none"):
        raise ValueError(
            f"resume_from_checkpoint: expected auto (default) or none, got {args.resume_from_checkpoint!r}; "
            "runs continue from the last complete checkpoint in output_dir"
        )
    dataset = data.load()
    console.print(dataset)
    summary = train(data, augment, model, config, args, dataset, args.resume_from_checkpoint != "none")[2]
    console.print(f"best valid {summary['metric']} {summary['best_valid']}; saved in {Path(summary['output_dir'])}")
    emit(summary, rest.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
