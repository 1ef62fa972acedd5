"""What both trainers share: rows, the catalogue's trie and loss, evaluation over the whole catalogue, saving."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from flr.data import EpochSampler, InteractionDataset, Interactions, LengthGroupedSampler, RecProcessor
from flr.decode import CatalogueTrie
from flr.evaluate import EvalResult, evaluate
from flr.files import check_seal, exclusive_folder, move_files, place_folder, read_json, seal_folder
from flr.model.adapter import without_card, write_beside
from flr.model.backbone import causal_lm, may_look, position_limit
from flr.model.catalogue_loss import CatalogueLoss
from flr.model.folder import MODEL_FILES

from .factors import tracing
from .finite import LateLook, check_finite, check_trainable, loss_fault, norm_fault, rows_at_fault
from .prompts import keeping_prompts
from .run_folder import (
    MARKS,
    RUN_NAME,
    STAGING,
    STATE_NAME,
    Start,
    begin,
    best_checkpoint,
    in_main,
    record,
    rotate,
    writing,
)  # fmt: skip
from .settings import run_settings
from .step_graphs import StepGraphs, usable
from .throughput import COUNTS, Throughput, counted
from .zero import check_dtypes, load_whole, whole_weights

logger = logging.getLogger("flr")


class RecTrainer(Trainer):
    """A ``Trainer`` whose rows are interactions.

    A subclass makes batches of rows (``_batch``) and the optimizer (``_grouped_optimizer``).

    Args:
        model: patched.
        args: :class:`~flr.train.arguments.RecTrainingArguments`.
        processor: makes prompts and targets; saved beside every checkpoint's weights.
        train, valid: interactions; ``valid`` is ranked over the whole catalogue, and may be None or empty where
            ``eval_strategy`` is "no".
        settings: what else shapes the run, beside model, arguments, processor and rows.
        kwargs: as for ``transformers.Trainer``.

    A loss, reward or gradient that is not a finite number ends the training with a ValueError that says the step and
    the row, and weights with such numbers are not saved.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        processor: RecProcessor,
        train: Interactions,
        valid: Interactions | None = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_trainable(model)
        if args.deepspeed:
            check_dtypes(model)
        if args.eval_strategy != "no" and not valid:
            wanted = "rows to rank (or --eval_strategy no, --load_best_model_at_end false)"
            raise ValueError(f"valid: expected {wanted}, got none")
        self.processor = processor
        processor.fit_positions(position_limit(causal_lm(model).config))
        processor.kept(train.histories)  # says what will be left out, once and before the first step
        self._best_result: EvalResult | None = None
        self.valid = valid.spread(args.eval_max_users) if valid else None
        self.trie = CatalogueTrie.from_codec(processor.item_codec)
        self.step_loss: Any = 0.0  # of the micro-batches since somebody set it to zero
        self.catalogue_loss = CatalogueLoss(self.trie) if processor.scoring == "catalogue" else None
        given = (args, model, processor, train, self.valid, settings or {})
        self.settings = run_settings(type(self).__name__, *given) if args.process_index == 0 else {}
        self._start: Start | None = None
        self._run_dir: str | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=self._numbered_batch,
            train_dataset=InteractionDataset(train),
            eval_dataset=None if self.valid is None else InteractionDataset(self.valid),
            **kwargs,
        )
        if args.deepspeed:
            load_whole()  # which accelerate has undone
        self.label_smoother = None  # done in the model's forward
        self._graphs = StepGraphs("inductor" if args.compile_layers else None) if usable(args, model) else None
        if args.compile_layers and self._graphs is None:
            raise ValueError("compile_layers: expected steps that CUDA graphs capture, got others (see cuda_graphs)")
        self._best = _BestInPlace()
        self.add_callback(self._best)
        self._late = LateLook()
        self.add_callback(self._late)
        self._throughput = Throughput()
        self.add_callback(self._throughput)

    def _batch(self, rows: list[Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _numbered_batch(self, rows: list[Any]) -> dict[str, Any]:
        return counted({**self._batch(rows), "rows": torch.tensor([row.row for row in rows])})

    def _grouped_optimizer(self, model: Any) -> torch.optim.Optimizer:
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        strategy = self.args.train_sampling_strategy
        if strategy != "group_by_length":
            return EpochSampler(len(rows), seed=seed, shuffle=strategy == "random")
        interactions, processor = rows.interactions, self.processor
        lengths, targets = processor.prompt_lengths(interactions.histories), processor.item_codec.lengths
        batch = self.args.train_batch_size * self.args.world_size
        return LengthGroupedSampler(lengths, batch, targets[interactions.targets], seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._grouped_optimizer(model if model is not None else self.model)
        return self.optimizer

    def _optimizer(self, groups: list[dict[str, Any]], model: Any) -> torch.optim.Optimizer:
        """The optimizer of the arguments over groups of parameters with their rates and decays."""
        args: Any = self.args
        cls, options = self.get_optimizer_cls_and_kwargs(args, model)
        name = getattr(args.optim, "value", args.optim)
        if odd := {"params", "model", "optimizer_dict"} & options.keys():
            raise ValueError(f"optim: expected one that takes groups of parameters, got {name}, which has {odd}")
        if args.optim_args:
            plain = copy.copy(args)
            plain.optim_args = None
            if self.get_optimizer_cls_and_kwargs(plain, model) == (cls, options):
                raise ValueError(f"optim_args: expected what {name} reads, got {args.optim_args!r}")
        return cls(groups, **options)

    # where a run begins

    @contextlib.contextmanager
    def running(self, resume: str | bool | None = None, overwrite: bool | None = None) -> Iterator[Start]:
        """Have ``output_dir`` to itself, and yield where the run begins (:func:`~flr.train.run_folder.begin`).

        ``train`` does this where the caller has not. By default ``resume`` and ``overwrite`` are the arguments' own.

        Raises:
            ValueError: another process trains in ``output_dir``, or it holds another run.
        """
        args: Any = self.args
        resume = args.resume_from_checkpoint if resume is None else resume
        overwrite = args.overwrite_output_dir if overwrite is None else overwrite
        alone = exclusive_folder(args.output_dir) if args.process_index == 0 else contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            in_main(self.args, lambda: stack.enter_context(alone))
            self._start = in_main(self.args, lambda: begin(args.output_dir, self.settings, resume, overwrite))
            try:
                yield self._start
            finally:
                self._start = None

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As of ``transformers.Trainer``; a checkpoint that is damaged or of another run is refused."""
        args: Any = self.args
        if self._start is not None:
            in_main(self.args, lambda: (Path(str(self.args.output_dir)) / RUN_NAME).unlink(missing_ok=True))
            if self._start.checkpoint is not None:
                self._best.place = best_checkpoint(
                    args.output_dir, read_json(Path(self._start.checkpoint) / STATE_NAME)
                )
            with keeping_prompts(self.accelerator.unwrap_model(self.model), args) as kept:
                output = super().train(self._start.checkpoint, trial, ignore_keys_for_eval)
            output.metrics.update(self._throughput.total(self._mean, self.args.world_size))
            output.metrics.update({} if kept is None else kept.figures())
            return output
        with self.running(resume_from_checkpoint or False) as start:
            for notice in start.notices:
                logger.warning(notice)
            if start.finished:
                self.load_finished()
                return TrainOutput(self.state.global_step, math.nan, {})
            return self.train(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    def load_finished(self) -> None:
        """Take weights and state from ``output_dir``, where this run has ended before."""
        folder = Path(str(self.args.output_dir))
        if not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / STATE_NAME))

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Save model, processor and state in ``output_dir``, and that the run is finished, with its ``summary``."""
        folder = str(self.args.output_dir)
        self.save_model(folder)
        with writing(Path(folder)):
            self.save_state()
            if self.args.should_save:
                record(folder, self.settings, summary=dict(summary))

    # steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step; none where a run was continued from its last step, which ``Trainer`` would go past."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        self._throughput.begin()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._throughput.add(batch)
        return batches, num_items

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the processes."""
        return x if self.args.world_size == 1 else self.accelerator.reduce(x.to(self.args.device), "mean").cpu()

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs.pop("rows")
        inputs.pop(COUNTS)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss.detach()
        step = self.state.global_step + 1
        now = may_look(loss)  # what is looked at later has lost its batch and its weights

        def fault() -> str:
            return f"{self._fault(model, inputs, rows, num_items_in_batch) if now else loss_fault(rows)} in step {step}"

        self._late.add(loss, fault)
        return loss

    def _fault(self, model: Any, inputs: dict[str, Any], rows: torch.Tensor, num_items: Any) -> str:
        """What is not finite, and the rows that it comes from."""

        def loss_of(part: dict[str, Any]) -> Any:
            return self.compute_loss(model, self._prepare_inputs(part), num_items_in_batch=num_items)

        # a forward of one process alone would wait for the others
        return loss_fault(rows_at_fault(loss_of, inputs, rows) if self.args.world_size == 1 else rows)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if getattr(self.accelerator, "scaler", None) is not None:
            return norm  # it leaves out steps that overflow, and takes smaller numbers then
        value, step = torch.as_tensor(norm), self.state.global_step + 1
        self._late.add(value, lambda: norm_fault(value, step))
        return norm

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """HR, NDCG and MRR over the whole catalogue, ``eval_ndcg@10`` and so on, by item."""
        rows: Any = self.valid if eval_dataset is None else eval_dataset.interactions
        with tracing(self.accelerator.unwrap_model(self.model)) as trace:
            result = self._rank(rows)
        if eval_dataset is None:
            self._note_best(result)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics["item"].items()}
        metrics[f"{metric_key_prefix}_seconds"] = result.settings["seconds"]
        self.log(metrics | {f"{metric_key_prefix}_{name}": value for name, value in trace.figures().items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def valid_result(self, samples: int = 1000) -> EvalResult | None:
        """The valid split ranked by the model as training left it, with intervals; None without such a split.

        Where that is the best model of this run, its evaluation is at hand and is not repeated.
        """
        if self.valid is None:
            return None
        best, name = self._best_result, self._chosen_by
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
        old, new = (None if x is None else x.metrics["item"].get(self._chosen_by) for x in (self._best_result, result))
        if new is not None and (old is None or (new > old if self.args.greater_is_better else new < old)):
            self._best_result = result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._throughput.line(self._mean, self.args.world_size)
        try:
            super().log(logs, start_time)
        except OSError as error:
            step = self.state.global_step
            raise OSError(f"report_to: expected to write the log of step {step}, got {error}") from error

    # saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights and processor, which appear together: until then the folder has the old ones or is refused."""
        target = Path(output_dir or str(self.args.output_dir))
        # a checkpoint is a folder of its own that is renamed as a whole
        staging = target if _internal_call else target / STAGING
        model, step, sharded = self.accelerator.unwrap_model(self.model), self.state.global_step, self.args.deepspeed
        weights = whole_weights(model, self.args.should_save) if sharded else dict(model.named_parameters())
        if sharded:
            in_main(self.args, lambda: check_finite(weights, step))
        else:
            check_finite(weights, step)
        with contextlib.nullcontext() if _internal_call else writing(target), without_card(model):
            if self.args.should_save and not _internal_call:
                shutil.rmtree(staging, ignore_errors=True)
            if sharded:
                self._save(str(staging), weights)
            else:
                super().save_model(str(staging), _internal_call=True)
            if not self.args.should_save:
                return
            self.processor.save_pretrained(staging)
            write_beside(staging, causal_lm(model))
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            if not _internal_call:
                move_files(staging, target, last=MARKS, owned=MODEL_FILES)
                shutil.rmtree(staging)

    def _get_output_dir(self, trial):
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        root = Path(str(self.args.output_dir))
        name, step, best = f"checkpoint-{self.state.global_step}", self.state.global_step, self.state.best_global_step
        if best and (best == step or (root / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(root / f"checkpoint-{best}")
        self._run_dir = str(root / STAGING)
        keep = self.state.best_model_checkpoint
        with writing(root / name):
            try:
                in_main(self.args, lambda: shutil.rmtree(root / STAGING, ignore_errors=True))
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self.state.best_model_checkpoint = keep  # not the place where it lies for a moment
                in_main(self.args, lambda: self._finish_checkpoint(root, name))
            finally:
                self._run_dir = None
                if self.args.process_index == 0:
                    shutil.rmtree(root / STAGING, ignore_errors=True)

    def _finish_checkpoint(self, root: Path, name: str) -> None:
        """Seal the checkpoint that lies in the staging folder, put it into its place, delete what is too old."""
        staged = root / STAGING / name
        self.state.save_to_json(str(staged / STATE_NAME))
        record(staged, self.settings)
        seal_folder(staged)
        place_folder(staged, root / name)
        best = best_checkpoint(root, {"best_model_checkpoint": self.state.best_model_checkpoint})
        rotate(root, self.args.save_total_limit, {name} | ({best.name} if best is not None else set()))

    def _load_best_model(self):
        check_seal(str(self.state.best_model_checkpoint))
        super()._load_best_model()


class _BestInPlace(TrainerCallback):
    """The best checkpoint of a run that is continued lies in its folder, which may have moved."""

    place: Path | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.place is not None and self.place.is_dir():
            state.best_model_checkpoint = str(self.place)
