"""The reinforcement of an update: a bounded number of steps with the hybrid objective, behind the supervised ones."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flr.data import Interactions, RecProcessor
from flr.evaluate import EvalResult
from flr.model.backbone import causal_lm

from .arguments import LatentGRPOConfig, UpdateConfig
from .base import RecTrainer
from .grpo import LatentGRPOTrainer
from .rewards import Rewards
from .stream import METRIC, decide

#: Options of an update that its reinforcement has as they are.
_SHARED = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "seed", "data_seed",
    "eval_num_beams", "use_cpu", "bf16", "fp16", "tf32", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "train_sampling_strategy", "save_strategy", "save_total_limit", "logging_steps", "disable_tqdm",
    "report_to", "dataloader_num_workers", "dataloader_pin_memory", "cuda_graphs", "compile_layers",
)  # fmt: skip
#: Of the hybrid objective (docs/rl.md): the KL and the share of users with rewards that differ are held at these.
_KL_WEIGHT, _KL_TARGET, _NOISE_TARGET = 0.01, 0.5, 0.5


def reinforcement(args: UpdateConfig, folder: Path, rows: int) -> LatentGRPOConfig:
    """The arguments of the steps on ``rows`` rows, whose run is in ``folder``."""
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * args.rl_steps))
    decodes = Rewards.parse(args.rl_reward).may_decode
    decoding: dict[str, Any] = {"reward_beams": args.eval_num_beams, "noise_target": _NOISE_TARGET} if decodes else {}
    return LatentGRPOConfig(
        **{name: getattr(args, name) for name in _SHARED},
        output_dir=str(folder),
        max_steps=args.rl_steps,
        save_steps=every,
        eval_strategy="no",
        load_best_model_at_end=False,
        learning_rate=args.rl_learning_rate,
        reward=args.rl_reward,
        **decoding,
        group_size=args.rl_group_size,
        likelihood_weight=args.rl_likelihood_weight,
        likelihood_adaptive=True,
        kl_weight=_KL_WEIGHT,
        kl_target=_KL_TARGET,
        dataloader_drop_last=rows >= step,
    )


def newest(rows: Interactions, number: int) -> Interactions:
    """The latest of ``rows`` by time, or the last ones where times are not known.

    >>> newest(Interactions(["u", "v", "w"], [[0], [0], [0]], [1, 2, 3], [7, 9, 8]), 2).targets
    array([2, 3], dtype=int32)
    """
    order = np.arange(len(rows)) if rows.timestamps is None else np.argsort(rows.timestamps, kind="stable")
    return rows.select(np.sort(order[-number:]))


def run_to_end(trainer: RecTrainer, watching: Callable[[Any], contextlib.AbstractContextManager[Any]]) -> None:
    """Begin a training or go on with one that was cut, to its end; one that has ended is loaded."""
    with trainer.running() as start, watching(trainer):
        if start.finished:
            trainer.load_finished()
        else:
            trainer.train()
            trainer.conclude({"steps": trainer.state.global_step})


def reinforce(
    model: Any,
    processor: RecProcessor,
    rows: Interactions,
    args: LatentGRPOConfig,
    watching: Callable[[Any], contextlib.AbstractContextManager[Any]],
    evaluated: Callable[[], EvalResult],
    supervised: EvalResult,
    before: EvalResult | None,
    known: np.ndarray,
) -> tuple[EvalResult | None, dict[str, Any]]:
    """Reinforce ``model`` in place, and take that back where it made something worse.

    A run that was cut goes on, and one that has ended is loaded. The steps are kept unless the newest rows are ranked
    worse beyond chance (:func:`~flr.train.stream.decide`) than by the supervised model, or than by the one before.

    Args:
        model: after the supervised steps.
        rows: new ones; as many of the newest are taken as the steps have room for.
        watching: around the training, given the trainer.
        evaluated: ranks the rows that decide by the model as it is.
        supervised, before, known: evaluations of these rows after and before the supervised steps, as for ``decide``.

    Returns:
        The evaluation of the reinforced model, None where it was not kept, and facts for JSON.
    """
    reasoner = causal_lm(model).flr
    kept_weights = copy.deepcopy(reasoner.state_dict())
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    taken = newest(rows, args.max_steps * step)
    trainer = LatentGRPOTrainer(model, args, processor, taken)
    run_to_end(trainer, watching)
    result = evaluated()
    kept, why, figures = decide(supervised, result, np.ones(len(known), bool))
    if kept and before is not None:
        kept, whole, _ = decide(before, result, known)
        why = why if kept else f"{whole}, from the model before the update"
    if not kept:
        reasoner.load_state_dict(kept_weights)
    facts = {"steps": trainer.state.global_step, "rows": len(taken), "kept": kept, "why": why, METRIC: figures["all"]}
    return (result if kept else None), facts
