"""``flr rl``: latent GRPO on a model that ``flr sft`` wrote. Every flag of transformers' TrainingArguments works."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from flr.data import RecDataset, RecProcessor
from flr.model.checkpoint import from_pretrained
from flr.train import LatentGRPOConfig, LatentGRPOTrainer, last_complete_checkpoint

from .options import DataOptions
from .parsing import console, emit, parse

ABOUT = "Reinforcement after SFT: noisy thoughts of each user, rewarded by what they make of the target (latent GRPO)."


@dataclass
class RLOptions:
    """What to start from."""

    model: str = field(default="runs/sft", metadata={"help": "Folder that flr sft wrote."})


def train(
    options: RLOptions,
    data: DataOptions,
    args: LatentGRPOConfig,
    dataset: RecDataset | None = None,
    resume: bool = True,
) -> tuple[Any, RecProcessor, dict[str, Any]]:
    """Train and save; returns model, processor and a summary. Continues from the last complete checkpoint, if any."""
    dataset = data.load() if dataset is None else dataset
    set_seed(args.seed)
    model, processor = from_pretrained(options.model), RecProcessor.from_pretrained(options.model)
    if processor.catalogue.item_ids != dataset.catalogue.item_ids:
        raise ValueError(f"data: expected the catalogue that {options.model} was trained on, got another one")
    if data.views() is not None:
        processor.views = data.views()
    trainer = LatentGRPOTrainer(model, args, processor, dataset.train, dataset.valid)
    checkpoint = last_complete_checkpoint(str(args.output_dir)) if resume else None
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint}")
    names = [f"eval_{args.metric_for_best_model}", "eval_target_logprob"]
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for --json
        before = trainer.evaluate()
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        lines = list(trainer.state.log_history)  # the model chosen is evaluated at the last step again
        after = trainer.evaluate()
    trainer.save_model(str(args.output_dir))
    trainer.save_state()
    history: dict[float, dict[str, float]] = {}
    for line in lines:
        if found := {name: line[name] for name in names if name in line}:
            history.setdefault(line["step"], {"step": line["step"]}).update(found)
    summary = {
        "output_dir": str(args.output_dir),
        "from": options.model,
        "policy": args.policy,
        "advantage": args.advantage,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "steps": outcome.global_step,
        "seconds": outcome.metrics.get("train_runtime"),
        "before": {name.removeprefix("eval_"): before[name] for name in names if name in before},
        "after": {name.removeprefix("eval_"): after[name] for name in names if name in after},
        "history": list(history.values()),
    }
    return model.eval(), processor, summary


def main(argv: list[str]) -> int:
    options, data, args, rest = parse("rl", ABOUT, (RLOptions, DataOptions, LatentGRPOConfig), argv)
    if args.resume_from_checkpoint not in (None, "auto", "none"):
        raise ValueError(
            f"resume_from_checkpoint: expected auto (default) or none, got {args.resume_from_checkpoint!r}; "
            "runs continue from the last complete checkpoint in output_dir"
        )
    dataset = data.load()
    console.print(dataset)
    summary = train(options, data, args, dataset, args.resume_from_checkpoint != "none")[2]
    for name, value in summary["after"].items():
        console.print(f"valid {name}: {summary['before'][name]:.4f} before, {value:.4f} after")
    console.print(f"saved in {Path(summary['output_dir'])}")
    emit(summary, rest.json)
    return 0
