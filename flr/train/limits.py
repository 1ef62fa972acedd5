"""Which numbers the arguments of both trainers take, transformers' own among them, before anything reads them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flr.config import COUNT, COUNT_FROM_ZERO, NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED, SHARE, Numbers, check_numbers
from flr.evaluate.metrics import COVERAGE_CUTOFF, HR_CUTOFFS, NDCG_CUTOFFS

#: Numbers by argument, of all classes of arguments; one with another meaning in a subclass has the same range there.
#: tests/train/test_limits.py fails on an argument that is a number and is not here.
NUMBERS: dict[str, Numbers] = {
    # transformers': what is 0 or None there to turn something off may be so
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": NOT_NEGATIVE,
    "max_steps": Numbers(1, whole=True, also=(-1,)),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,  # below 1 a share of all steps
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Numbers(0, also=(None, math.inf)),  # infinity: only to log the norm
    "label_smoothing_factor": PROBABILITY,
    "neftune_noise_alpha": NOT_NEGATIVE.or_none,
    "logging_steps": NOT_NEGATIVE,  # these three also by _check_intervals
    "eval_steps": NOT_NEGATIVE.or_none,
    "save_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": COUNT_FROM_ZERO.or_none,
    "seed": SEED,
    "data_seed": Numbers(whole=True).or_none,
    "dataloader_num_workers": COUNT_FROM_ZERO,
    "dataloader_prefetch_factor": COUNT.or_none,
    "torch_empty_cache_steps": COUNT.or_none,
    "ddp_bucket_cap_mb": COUNT.or_none,
    "ddp_timeout": COUNT,
    # both trainers'
    "eval_num_beams": COUNT,
    "eval_max_users": COUNT.or_none,
    "prompt_cache_gb": POSITIVE,
    # SFT's
    "reasoner_learning_rate": NOT_NEGATIVE.or_none,
    "reasoner_weight_decay": NOT_NEGATIVE,
    "embedding_learning_rate": NOT_NEGATIVE.or_none,
    "embedding_weight_decay": NOT_NEGATIVE.or_none,
    "embedding_dropout": SHARE,
    "output_dropout": SHARE,
    # an update's
    "rl_steps": COUNT_FROM_ZERO,
    "rl_learning_rate": POSITIVE,
    "rl_group_size": Numbers(2, whole=True),
    "rl_likelihood_weight": PROBABILITY,
    # latent GRPO's
    "group_size": Numbers(2, whole=True),
    "noise_scale": POSITIVE,
    "advantage_epsilon": NOT_NEGATIVE,
    "reward_beams": COUNT,
    "epsilon_low": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "num_iterations": COUNT,
    "kl_weight": NOT_NEGATIVE,
    "kl_target": POSITIVE.or_none,
    "noise_target": Numbers(0, 1, "()").or_none,
    "likelihood_weight": PROBABILITY,
    "backbone_learning_rate": NOT_NEGATIVE.or_none,
}
#: What ``metric_for_best_model`` may name: what the evaluation of either trainer returns.
METRICS = (
    *(f"hr@{k}" for k in HR_CUTOFFS),
    *(f"ndcg@{k}" for k in NDCG_CUTOFFS),
    "mrr",
    f"coverage@{COVERAGE_CUTOFF}",
    "seconds",
)
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that read it, too


def check_limits(args: Any, metrics: tuple[str, ...] = METRICS) -> None:
    """ValueError for a number out of range, or a metric that the evaluation has not."""
    names = {field.name for field in dataclasses.fields(args)}
    check_numbers(args, {name: taken for name, taken in NUMBERS.items() if name in names})
    _check_intervals(args)
    best = args.metric_for_best_model
    needed = args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in _BY_METRIC
    if (best is not None or needed) and str(best).removeprefix("eval_") not in metrics:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(metrics)}, got {best!r}")


def _check_intervals(args: Any) -> None:
    """ValueError for a number of steps between two lines of the log, two evaluations or checkpoints that come by it."""
    for what in ("logging", "eval", "save"):
        name = f"{what}_steps"
        value = getattr(args, name)
        every = args.logging_steps if what == "eval" and not value else value  # as transformers does
        if getattr(args, f"{what}_strategy") == "steps" and not (0 < every < 1 or (every and every == int(every))):
            raise ValueError(f"{name}: expected an integer >= 1 or a share of all steps in (0, 1), got {value!r}")
