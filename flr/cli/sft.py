"""``flr sft``: train a recommender. Flags of transformers' TrainingArguments work, or are refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import FLRConfig

from . import voice
from .backbone import ModelOptions
from .on_ray import RayOptions, train_on_ray
from .options import AugmentOptions, DataOptions
from .parsing import emit, parse
from .training import summarise, training_run

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.train import SFTConfig

ABOUT = "Train a recommender on an interaction log; ends with the best model by NDCG@10 on the valid split."


def train(
    data: DataOptions,
    augment: AugmentOptions,
    model_options: ModelOptions,
    config: FLRConfig,
    args: SFTConfig,
    dataset: RecDataset | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Train and save; returns model, processor and a summary. ``args.resume_from_checkpoint`` says where it begins."""
    from transformers import set_seed

    from flr.model.backbone import causal_lm
    from flr.train import SFTTrainer
    from flr.train.precision import choose_autocast

    from .card import measured, model_facts, save_card
    from .report import keep_for_report

    dataset = data.load() if dataset is None else dataset
    set_seed(args.seed)
    if model_options.model is not None:
        choose_autocast(args)
    model, processor = model_options.build(data, config, dataset, args.seed, args.use_cpu)
    rows, changes = augment.apply(dataset, processor.max_history)
    trainer = SFTTrainer(model, args, processor, rows, dataset.valid, changes)
    with training_run(trainer) as start:
        if not start.finished:
            outcome = trainer.train()
            valid = None if args.eval_strategy == "no" else trainer.valid_result()
            facts = {"variant": causal_lm(model)._flr_patch.config.variant, "train_rows": len(rows)}
            best = {"best_valid": trainer.state.best_metric, "metric": args.metric_for_best_model}
            start.summary = summarise(args, facts, outcome, best)
    if not start.finished:
        keep_for_report(args, model, processor, dataset, valid)
        options = (data, augment, model_options, config, args)
        about = model_facts(model, processor, dataset, "flr sft", options, model_options.model)
        save_card(args, about, measured(dataset, "valid", valid))
    return model.eval(), processor, start.summary


def main(argv: list[str]) -> int:
    from flr.train import SFTConfig

    classes = (DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig, RayOptions)
    data, augment, model, config, args, cluster, rest = parse("sft", ABOUT, classes, argv)
    if cluster.elsewhere():
        summary = train_on_ray("sft", argv, cluster, args)
    else:
        summary = train(data, augment, model, config, args, data.announce())[2]
    best = (
        ""
        if summary["best_valid"] is None
        else f"Best valid {summary['metric'].upper()}: {summary['best_valid']:.4f}. "
    )
    voice.result(f"{best}Saved in {Path(summary['output_dir'])}.")
    emit(summary, rest.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
