"""Supervised fine-tuning with transformers' ``Trainer``: its arguments work, or are refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flr.config import IGNORE
from flr.data import Augment, Interactions, RecProcessor, SFTCollator
from flr.model.backbone import mixes

from .arguments import SFTConfig
from .base import RecTrainer
from .settings import of_augment
from .step_graphs import padded
from .throughput import COUNTS


class SFTTrainer(RecTrainer):
    """Trains a patched model to continue histories with the next item.

    Args:
        model: patched (``flr.patch_model``), any variant.
        args: :class:`SFTConfig`.
        processor: makes prompts and targets; saved beside every checkpoint's weights.
        train, valid: interactions; ``valid`` is ranked over the whole catalogue (``eval_ndcg@10`` …) and may be None.
        augment: changes of training histories.
        kwargs: as for ``transformers.Trainer``.

    The order of rows, augmentation and dropout depend on (seed, epoch, row) and checkpointed generators alone: a run
    that was killed and resumed from its last whole checkpoint reaches the weights of an undisturbed one.
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
        processor.scoring = args.normalisation
        self._collate = SFTCollator(processor, augment, args.seed)
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._names: tuple[str, ...] = ()
        if (smoothing := args.label_smoothing_factor) and mixes(model):
            raise ValueError(f"label_smoothing_factor: expected 0 with aggregation mixture, got {smoothing}")
        if smoothing and self._collate.is_soft:
            raise ValueError(f"label_smoothing_factor: expected 0 where targets are drawn, got {smoothing}")
        super().__init__(model, args, processor, train, valid, of_augment(augment), **kwargs)
        self.label_smoothing = args.label_smoothing_factor
        self._dropout(args.embedding_dropout, args.output_dropout)

    def _dropout(self, inputs: float, outputs: float) -> None:
        """Dropout where small models trained from scratch need it; hooks of this instance, off in evaluation."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if inputs:
            table = model.get_input_embeddings()
            table.register_forward_hook(lambda m, _, x: nn.functional.dropout(x, inputs, m.training))
        if outputs and self.catalogue_loss is not None and self.trie.depth > 1:
            self.catalogue_loss.output_dropout = outputs  # which reads rows of the lm_head, where it pays
        elif outputs:
            head = model.get_output_embeddings()
            head.register_forward_pre_hook(lambda m, x: (nn.functional.dropout(x[0], outputs, m.training), *x[1:]))

    def _batch(self, rows: list[Any]) -> dict[str, Any]:
        batch = self._collate(rows)
        del batch["item_positions"]  # for explanations, not for the model
        if self.catalogue_loss is not None:
            batch["labels"] = self.catalogue_loss.target_nodes(batch["labels"])
        if self.args.device.type == "cuda" or self.args.torch_compile:
            # fixed shapes and no synchronisation; on the CPU lm_head rows cost more than a look at the data, which a
            # compiler would have to break off for
            first_label = int((batch["labels"] != IGNORE).any(0).int().argmax())
            start = first_label - self.processor.num_thoughts
            whole: dict[str, Any] = {**batch, "thought_start": start}
            return whole if self._graphs is None else padded(whole, first_label)
        return dict(batch)

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
            elif id(parameter) in tables or ".trainable_tokens_delta." in name:
                key = (table_rate, table_decay)
            else:
                key = (args.learning_rate, args.weight_decay if name in decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
        parts = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
        return self._optimizer(parts, model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("rows", None)
        inputs.pop(COUNTS, None)
        if self.label_smoothing and model.training:
            inputs = {**inputs, "label_smoothing": self.label_smoothing}
        if self.catalogue_loss is not None:
            inputs = {**inputs, "catalogue_loss": self.catalogue_loss}
        if not model.training:
            inputs = {name: x for name, x in inputs.items() if name not in ("soft_targets", "soft_weights")}
        if self._graphs is not None and model.training and not return_outputs:
            return self._graphed_loss(model, inputs, num_items_in_batch)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if model.training and outputs.flr is not None:
            self._note(outputs.flr.losses)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            outputs.loss = outputs.loss * self.accelerator.num_processes  # a share of a sum, which DDP and FSDP average
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _note(self, terms: dict[str, torch.Tensor]) -> None:
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.detach())

    def _graphed_loss(self, model: Any, inputs: dict[str, Any], num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The loss of a training batch; its operations by a CUDA graph where these shapes have come before."""
        assert self._graphs is not None
        if isinstance(num_items, int):
            num_items = torch.tensor(num_items, device=self.args.device)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        if num_items is not None:
            tensors["num_items_in_batch"] = num_items
        others = {name: x for name, x in inputs.items() if name not in tensors}

        def call(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            outputs = model(**tensors, **others)
            losses = {} if outputs.flr is None else outputs.flr.losses
            self._names = tuple(losses)  # the same for every batch
            return outputs.loss, *losses.values()

        key = tuple(
            (name, x if isinstance(x, int | float | bool | str | None) else id(x)) for name, x in others.items()
        )
        results: Any = self._graphs(call, tensors, model, key)
        self._note(dict(zip(self._names, results[1:], strict=True)))
        return results[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._terms:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._terms.items()}
            self._terms = {}
        super().log(logs, start_time)
