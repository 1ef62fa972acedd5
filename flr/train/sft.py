"""Supervised fine-tuning with transformers' ``Trainer``: every one of its arguments works."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from flr.config import IGNORE
from flr.data import Augment, EpochSampler, InteractionDataset, Interactions, RecProcessor, SFTCollator
from flr.decode import CatalogueTrie
from flr.decode.scoring import check_scoring
from flr.evaluate import evaluate
from flr.model.catalogue_loss import CatalogueLoss


@dataclass
class SFTConfig(TrainingArguments):
    """``TrainingArguments`` plus what a reasoner and a catalogue need; defaults that differ are the ones named here.

    The reasoner is a small module on a large or a well-tuned one: it learns slowly, with decay of its own.
    """

    output_dir: str | None = field(default="runs/sft", metadata={"help": "Checkpoints, and at the end the best model."})
    reasoner_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the reasoner. Default: a tenth of --learning_rate."}
    )
    reasoner_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the reasoner."})
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the token tables. Default: --learning_rate."}
    )
    embedding_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the token tables. Default: --weight_decay."}
    )
    normalisation: str = field(
        default="full",
        metadata={
            "help": "What a target token competes with: full (the vocabulary) or catalogue (what continues an item there)."
        },
    )
    embedding_dropout: float = field(default=0.0, metadata={"help": "Dropout on input embeddings, in [0, 1)."})
    output_dropout: float = field(default=0.0, metadata={"help": "Dropout on the lm_head's input, in [0, 1)."})
    eval_num_beams: int = field(default=20, metadata={"help": "Beams of the evaluation after every epoch."})
    eval_max_users: int | None = field(
        default=None, metadata={"help": "Evaluate on that many users only, evenly spread. Default: all."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are interactions."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to rank the valid split: no, steps, epoch."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to write a checkpoint: no, steps, epoch, best."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one included."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best model on the valid split."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether a larger metric is better."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 — HfArgumentParser expects None first
        default="tensorboard", metadata={"help": "Where to log."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self) -> None:
        check_scoring(self.normalisation, "normalisation")
        for name in ("embedding_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, got True; rows are interactions, not tensors")
        super().__post_init__()


class SFTTrainer(Trainer):
    """Trains a patched model to continue histories with the next item.

    Args:
        model: patched (``flr.patch_model``), any variant.
        args: :class:`SFTConfig`.
        processor: makes prompts and targets; saved beside every checkpoint's weights.
        train, valid: interactions; ``valid`` is ranked over the whole catalogue (``eval_ndcg@10`` …) and may be None.
        augment: changes of training histories.
        kwargs: as for ``transformers.Trainer``.

    The order of rows, the augmentation and dropout depend on (seed, epoch, row) and on the checkpointed generators alone:
    a run that was killed and resumed from its last complete checkpoint reaches the weights of an undisturbed one.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        processor: RecProcessor,
        train: Interactions,
        valid: Interactions | None = None,
        augment: Augment | None = None,
        **kwargs: Any,
    ) -> None:
        self.processor = processor
        self.valid = _spread(valid, args.eval_max_users)
        self.trie = CatalogueTrie.from_codec(processor.item_codec)
        if isinstance(args, SFTConfig):  # reinforcement goes on with what it finds
            processor.scoring = args.normalisation
        self.catalogue = CatalogueLoss(self.trie) if processor.scoring == "catalogue" else None
        self._collate = SFTCollator(processor, augment, seed=args.seed)
        self._terms: dict[str, list[torch.Tensor]] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=self._batch,
            train_dataset=InteractionDataset(train),
            eval_dataset=None if self.valid is None else InteractionDataset(self.valid),
            **kwargs,
        )
        self.label_smoothing, self.label_smoother = args.label_smoothing_factor, None  # done in the model's forward
        self._dropout(args.embedding_dropout, args.output_dropout)

    def _dropout(self, inputs: float, outputs: float) -> None:
        """Dropout where small models trained from scratch need it; hooks of this instance, off in evaluation."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if inputs:
            table = model.get_input_embeddings()
            table.register_forward_hook(lambda m, _, x: nn.functional.dropout(x, inputs, m.training))
        if outputs and self.catalogue is not None and self.trie.depth > 1:
            self.catalogue.output_dropout = outputs  # which reads rows of the lm_head, where it pays
        elif outputs:
            head = model.get_output_embeddings()
            head.register_forward_pre_hook(lambda m, x: (nn.functional.dropout(x[0], outputs, m.training), *x[1:]))

    def _batch(self, rows: list[Any]) -> dict[str, Any]:
        batch = self._collate(rows)
        del batch["item_positions"]  # for explanations, not for the model
        if self.catalogue is not None:
            batch["labels"] = self.catalogue.edges(batch["labels"])
        if self.args.device.type == "cuda" and self.processor.num_thoughts:
            # fixed shapes and no synchronisation; on the CPU lm_head rows cost more than a look at the data
            first_label = int((batch["labels"] != IGNORE).any(0).int().argmax())
            return {**batch, "thought_start": first_label - self.processor.num_thoughts}
        return dict(batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(len(rows), seed=self.args.data_seed or self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._grouped_optimizer(model if model is not None else self.model)
        return self.optimizer

    def _grouped_optimizer(self, model: Any) -> torch.optim.Optimizer:
        args: Any = self.args
        decayed = set(self.get_decay_parameter_names(model))
        unwrapped: Any = self.accelerator.unwrap_model(model)
        tables = {id(unwrapped.get_input_embeddings().weight), id(unwrapped.get_output_embeddings().weight)}
        slow = args.learning_rate / 10 if args.reasoner_learning_rate is None else args.reasoner_learning_rate
        table_rate = args.learning_rate if args.embedding_learning_rate is None else args.embedding_learning_rate
        table_decay = args.weight_decay if args.embedding_weight_decay is None else args.embedding_weight_decay
        groups: dict[tuple[float, float], list[torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if ".flr." in f".{name}":
                key = (slow, args.reasoner_weight_decay)
            elif id(parameter) in tables:
                key = (table_rate, table_decay)
            else:
                key = (args.learning_rate, args.weight_decay if name in decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
        cls, options = self.get_optimizer_cls_and_kwargs(args, model)
        return cls([{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()], **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_smoothing and model.training:
            inputs = {**inputs, "label_smoothing": self.label_smoothing}
        if self.catalogue is not None:
            inputs = {**inputs, "catalogue": self.catalogue}
        soft = (inputs.pop("soft_targets", None), inputs.pop("soft_weights", None))
        if soft[0] is None or not model.training:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        else:
            outputs = self._soft_loss(model, inputs, *soft, num_items_in_batch)
        if model.training and outputs.flr is not None:
            for name, value in outputs.flr.losses.items():
                self._terms.setdefault(name, []).append(value.detach())
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            outputs.loss = outputs.loss * self.accelerator.num_processes  # a share of a sum, which DDP and FSDP average
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @staticmethod
    def _soft_loss(model, inputs, targets, weights, num_items):
        """Rows with weights: cross-entropy against the whole distribution that their label was drawn from."""
        labels = inputs["labels"]
        items = (labels != IGNORE).sum() if num_items is None else num_items
        is_soft = weights.sum(1) > 0
        # one-token targets end every row: column -2, the last of the prompt, predicts them
        keep = torch.tensor([labels.shape[1] - 2], device=labels.device)
        hard = labels.masked_fill(is_soft[:, None], IGNORE)
        inputs = {**inputs, "labels": hard, "logits_to_keep": keep, "skip_logits": False}
        outputs = model(**inputs, num_items_in_batch=items)
        logits, catalogue = outputs.logits[:, 0].float(), inputs.get("catalogue")
        logp = logits.log_softmax(-1) if catalogue is None else catalogue.root_log_softmax(logits)
        outputs.loss = outputs.loss - (logp.gather(1, targets) * weights).sum() / items
        return outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._terms:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._terms.items()}
            self._terms = {}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """HR, NDCG and MRR over the whole catalogue, ``eval_ndcg@10`` and so on, by item."""
        rows: Any = self.valid if eval_dataset is None else eval_dataset.interactions
        args: Any = self.args
        result = evaluate(
            self.accelerator.unwrap_model(self.model),
            self.processor,
            rows,
            batch_size=args.per_device_eval_batch_size,
            num_beams=args.eval_num_beams,
            trie=self.trie,
            progress=False,
            samples=1,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics["item"].items()}
        metrics[f"{metric_key_prefix}_seconds"] = result.settings["seconds"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or str(self.args.output_dir))


def _spread(rows: Interactions | None, most: int | None) -> Interactions | None:
    if rows is None or most is None or len(rows) <= most:
        return rows
    return rows.select([i * len(rows) // most for i in range(most)])


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest ``checkpoint-*`` folder that was written to its end; None if there is none.

    ``Trainer`` writes trainer_state.json last, so a folder without a readable one is what a kill left behind.
    """
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
