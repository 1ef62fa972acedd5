"""``flr rl``: latent GRPO on a model that ``flr sft`` wrote, by transformers' TrainingArguments and some of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import SHARE, Numbers, check_numbers, option

from . import voice
from .on_ray import RayOptions, train_on_ray
from .options import DataOptions, load_trained
from .parsing import REVISION, emit, parse
from .training import summarise, training_run
from .weights import WeightOptions

if TYPE_CHECKING:
    from flr.data import RecDataset, RecProcessor
    from flr.train import LatentGRPOConfig, LatentGRPOTrainer

ABOUT = "Reinforcement after SFT: noisy thoughts of each user, rewarded by what they make of the target (latent GRPO)."


@dataclass
class RLOptions(WeightOptions):
    """What to start from."""

    model: str = option("runs/sft", "Folder that flr sft wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    held_back: float = option(
        0.0,
        "Reinforce on this share of train alone, the latest rows, which flr sft --held_back left out.",
    )

    numbers: ClassVar[Mapping[str, Numbers]] = {"held_back": SHARE}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)


def train(
    options: RLOptions,
    data: DataOptions,
    args: LatentGRPOConfig,
    dataset: RecDataset | None = None,
) -> tuple[Any, RecProcessor, dict[str, Any]]:
    """Train and save; returns model, processor and a summary. ``args.resume_from_checkpoint`` says where it begins."""
    from transformers import set_seed

    from flr.data import hold_back
    from flr.model.folder import is_adapter, local_folder
    from flr.train import LatentGRPOTrainer
    from flr.train.precision import choose_autocast

    from .card import measured, model_facts, save_card
    from .report import keep_for_report

    dataset = data.load() if dataset is None else dataset
    set_seed(args.seed)
    choose_autocast(args)
    adapted = is_adapter(local_folder(options.model, revision=options.revision))
    loading = options.to_train(args.train_backbone and not adapted, args.use_cpu)
    model, processor = load_trained(options.model, dataset, options.revision, True, data, **loading)
    processor.views = data.views(processor.views)
    rows = hold_back(dataset.train, options.held_back)[1] if options.held_back else dataset.train
    trainer = LatentGRPOTrainer(model, args, processor, rows, dataset.valid)
    with training_run(trainer) as start:
        if not start.finished:
            ranks = args.eval_strategy != "no"
            start.summary = _reinforce(trainer, options, args, ranks)
            valid = trainer.valid_result() if ranks else None
    if not start.finished:
        keep_for_report(args, model, processor, dataset, valid)
        about = model_facts(model, processor, dataset, "flr rl", (data, args), options.model)
        save_card(args, about, measured(dataset, "valid", valid))
    return model.eval(), processor, start.summary


def _reinforce(trainer: LatentGRPOTrainer, options: RLOptions, args: LatentGRPOConfig, ranks: bool) -> dict[str, Any]:
    """Train, and where valid is ranked compare with the model given; returns the summary."""
    names = [f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}", "eval_target_logprob"]
    before = trainer.evaluate() if ranks else {}
    outcome = trainer.train()
    lines = list(trainer.state.log_history)  # the model chosen is evaluated at the last step again
    after = trainer.evaluate() if ranks else {}
    history: dict[float, dict[str, float]] = {}
    for line in lines:
        if values := {name: line[name] for name in names if name in line}:
            history.setdefault(line["step"], {"step": line["step"]}).update(values)
    facts = {name: getattr(args, name) for name in ("policy", "advantage", "learning_rate", "seed")}

    def chosen(metrics: dict[str, float]) -> dict[str, float]:
        return {name.removeprefix("eval_"): metrics[name] for name in names if name in metrics}

    results = {"before": chosen(before), "after": chosen(after), "history": list(history.values())}
    return summarise(args, {"from": options.model, **facts}, outcome, results)


def main(argv: list[str]) -> int:
    from flr.train import LatentGRPOConfig

    classes = (RLOptions, DataOptions, LatentGRPOConfig, RayOptions)
    options, data, args, cluster, rest = parse("rl", ABOUT, classes, argv)
    if cluster.elsewhere():
        summary = train_on_ray("rl", argv, cluster, args)
    else:
        summary = train(options, data, args, data.announce())[2]
    for name, value in summary["after"].items():
        voice.result(f"Valid {name.upper()}: {summary['before'][name]:.4f} before, {value:.4f} after.")
    voice.result(f"Saved in {Path(summary['output_dir'])}.")
    emit(summary, rest.json)
    return 0
