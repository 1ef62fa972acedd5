"""What the commands write into a model's card: the model, its data, the options of the command, and metrics."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from flr import __version__
from flr.data import RecDataset, RecProcessor
from flr.data.interactions import PARTS
from flr.evaluate import EvalResult
from flr.model.backbone import causal_lm, is_patched
from flr.report.model_card import Evaluation, Measured, ModelFacts, drop_metrics, has_model_part, write_card
from flr.train.zero import count_parameters

from . import voice

_METRICS = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
#: Options that say where things are, who runs the command or how it shows its progress, and those that transformers
#: sets from others.
_PRIVATE = (
    "data", "model", "output_dir", "logging_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub",
    "hub_model_id", "hub_token", "resume_from_checkpoint", "trackio_space_id", "local_rank", "use_cpu",
    "activation_checkpointing", "dataloader_pin_memory", "do_eval",
)  # fmt: skip


def changed_settings(options: Sequence[Any]) -> dict[str, Any]:
    """Options of a command that are not their defaults, as plain values; no paths, no names of people or runs."""
    changed = {}
    for part in options:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = value.value if isinstance(value, enum.Enum) else value
            plain = isinstance(value, (bool, int, float, str)) and not (isinstance(value, str) and os.sep in value)
            same = value == default or (default is None and value is False)
            if plain and field.init and field.name not in _PRIVATE and not same:
                changed[field.name] = value
    return changed


def model_facts(
    model: Any,
    processor: RecProcessor,
    dataset: RecDataset,
    command: str | None = None,
    options: Sequence[Any] = (),
    start: str | None = None,
) -> ModelFacts:
    """What the card says of a model that ``command`` trained on ``dataset``, from the model ``start`` on."""
    lm = causal_lm(model)
    thought = lm._flr_patch.config if is_patched(lm) else None
    variant = "none" if thought is None else thought.variant
    facts: dict[str, Any] = {
        "Data": data_name(dataset),
        "Users": len({user for part in PARTS for user in getattr(dataset, part).users}),
        "Items (size of the catalogue)": len(processor.catalogue),
        "Interactions (train, valid, test)": ", ".join(str(len(getattr(dataset, part))) for part in PARTS),
        "Item codec": processor.codec,
        "Variant of the thought": variant,
    }
    if thought is not None and thought.thought_count:
        factors: dict[str, Any] = {"Factors K": thought.num_factors, "Refinements T": thought.num_refinements}
        factors |= {"Aggregation of the factors": thought.aggregation} if thought.mixes else {}
        facts |= factors if hasattr(lm, "flr") else {}
        facts["Thoughts N"] = thought.num_thoughts
    facts |= {"Base model": type(lm).__name__, "Parameters": f"{count_parameters(lm):,}"}
    facts |= {"Latest items in a prompt": processor.max_history, "Scoring": processor.scoring}
    versions = {"flr": __version__, "transformers": transformers.__version__}
    versions["torch"] = torch.__version__
    return ModelFacts(
        title=f"Recommender for {data_name(dataset)}",
        facts=facts,
        example=processor.catalogue.item_ids[:2],
        command=command,
        settings=changed_settings(options),
        versions=versions,
        base_model=start if start is not None and not Path(start).exists() else None,
    )


def data_name(dataset: RecDataset) -> str:
    """The data set's name without the folders above it."""
    return Path(dataset.name).name or "unnamed data"


def measured(dataset: RecDataset, split: str, result: EvalResult | None) -> Evaluation | None:
    """The card's metrics of an evaluation, by item; None without one."""
    if result is None:
        return None
    metrics, intervals = result.metrics["item"], result.intervals["item"]
    values = [Measured(name, metrics[name], intervals[name].low, intervals[name].high) for name in _METRICS]
    told = ("method", "num_beams", "scoring", "exclude_seen")
    how = {name: result.settings[name] for name in told if result.settings.get(name) is not None}
    if (views := result.settings.get("views")) is not None:
        names = {"views_weight": "weight", "views_decay": "decay", "neighbours_weight": "neighbours"}
        how |= {name: views[field] for name, field in names.items()}
    return Evaluation(data_name(dataset), split, values, {**how, "rows": len(result)})


def save_card(args: TrainingArguments, facts: ModelFacts, evaluation: Evaluation | None) -> None:
    """Write the card of a model that was trained into its ``output_dir``; metrics of weights before go."""
    if args.should_save:
        _written(str(args.output_dir), facts, evaluation, trained=True)


def update_card(folder: str, facts: ModelFacts, evaluation: Evaluation | None, trained: bool = False) -> None:
    """Bring metrics into the card in ``folder``; ``facts`` where it was ``trained`` or does not say what it is.

    Of a model that was ``trained``, metrics that are there are those of other weights, and go.
    """
    if Path(folder).is_dir():  # else a model on the Hub, whose card is its owner's
        _written(folder, facts, evaluation, trained)


def drop_measured(folder: str) -> None:
    """Take the metrics out of the card in ``folder``, whose model answers otherwise from now on; says so."""
    try:
        if drop_metrics(folder):
            voice.note("The model card has no metrics any more, which were of other answers; flr evaluate adds some.")
    except (OSError, ValueError) as error:
        voice.warn(f"the model card stays as it is, with metrics of other answers: {error}")


def _written(folder: str, facts: ModelFacts, evaluation: Evaluation | None, trained: bool) -> None:
    try:
        if trained:
            drop_metrics(folder)
        write_card(folder, facts if trained or not has_model_part(folder) else None, evaluation)
    except (OSError, ValueError) as error:  # what was computed is worth more than its card
        voice.warn(f"the model card stays as it is: {error}")
