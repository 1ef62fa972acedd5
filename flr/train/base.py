"""What both trainers share: rows, the catalogue's trie and loss, evaluation over the whole catalogue, saving."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from flr.data import EpochSampler, InteractionDataset, Interactions, RecProcessor
from flr.decode import CatalogueTrie
from flr.evaluate import EvalResult, evaluate
from flr.model.backbone import causal_lm, is_patched, position_limit
from flr.model.catalogue_loss import CatalogueLoss
from flr.model.saved_config import write_config


class RecTrainer(Trainer):
    """A ``Trainer`` whose rows are interactions.

    A subclass makes batches of rows (``_batch``) and the optimizer (``_grouped_optimizer``).

    Args:
        model: patched.
        args: :class:`~flr.train.arguments.RecTrainingArguments`.
        processor: makes prompts and targets; saved beside every checkpoint's weights.
        train, valid: interactions; ``valid`` is ranked over the whole catalogue and may be None.
        kwargs: as for ``transformers.Trainer``.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        processor: RecProcessor,
        train: Interactions,
        valid: Interactions | None = None,
        **kwargs: Any,
    ) -> None:
        self.processor = processor
        processor.fit_positions(position_limit(causal_lm(model).config))
        processor.kept(train.histories)  # says what will be left out, once and before the first step
        self._best: EvalResult | None = None
        self.valid = _spread(valid, args.eval_max_users)
        self.trie = CatalogueTrie.from_codec(processor.item_codec)
        self.catalogue_loss = CatalogueLoss(self.trie) if processor.scoring == "catalogue" else None
        super().__init__(
            model=model,
            args=args,
            data_collator=self._batch,
            train_dataset=InteractionDataset(train),
            eval_dataset=None if self.valid is None else InteractionDataset(self.valid),
            **kwargs,
        )
        self.label_smoother = None  # done in the model's forward

    def _batch(self, rows: list[Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _grouped_optimizer(self, model: Any) -> torch.optim.Optimizer:
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(len(rows), seed=self.args.data_seed or self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._grouped_optimizer(model if model is not None else self.model)
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """HR, NDCG and MRR over the whole catalogue, ``eval_ndcg@10`` and so on, by item."""
        rows: Any = self.valid if eval_dataset is None else eval_dataset.interactions
        result = self._rank(rows)
        if eval_dataset is None:
            self._note_best(result)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics["item"].items()}
        metrics[f"{metric_key_prefix}_seconds"] = result.settings["seconds"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def valid_result(self, samples: int = 1000) -> EvalResult | None:
        """The valid split ranked by the model as training left it, with intervals; None without such a split.

        Where that is the best model of this run, its evaluation is at hand and is not repeated.
        """
        if self.valid is None:
            return None
        best, name = self._best, self._chosen_by
        if best is None or not self.args.load_best_model_at_end or best.metrics["item"][name] != self.state.best_metric:
            best = self._rank(self.valid)
        return dataclasses.replace(best, samples=samples)

    def _rank(self, rows: Interactions) -> EvalResult:
        args: Any = self.args
        return evaluate(
            self.accelerator.unwrap_model(self.model),
            self.processor,
            rows,
            batch_size=args.per_device_eval_batch_size,
            num_beams=args.eval_num_beams,
            trie=self.trie,
            progress=False,
            samples=1,
        )

    @property
    def _chosen_by(self) -> str:
        return str(self.args.metric_for_best_model).removeprefix("eval_")

    def _note_best(self, result: EvalResult) -> None:
        """Keep the best evaluation of this process, the first of equals as ``Trainer`` does."""
        old, new = (None if x is None else x.metrics["item"].get(self._chosen_by) for x in (self._best, result))
        if new is not None and (old is None or (new > old if self.args.greater_is_better else new < old)):
            self._best = result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self.processor.save_pretrained(folder)
            lm = causal_lm(self.accelerator.unwrap_model(self.model))
            if (folder / "adapter_config.json").is_file() and is_patched(lm):  # PEFT writes the base model's name alone
                write_config(folder / "config.json", lm.config, lm.config.flr)


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
