"""Arguments of both trainers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from flr.config import check_normalisation, option
from flr_kernels.ops.group_advantage.op import KINDS

from .rewards import Rewards

POLICIES = ("thoughts", "tokens")
_LOGGERS = "Where to log: none, tensorboard (pip install 'flr[tensorboard]'), or another that transformers knows."


@dataclass
class RecTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of a recommender: the best model on the valid split is kept."""

    eval_num_beams: int = option(20, "Beams of the evaluation after every epoch.")
    eval_max_users: int | None = option(None, "Evaluate on that many users only, evenly spread. Default: all.")
    remove_unused_columns: bool = option(False, "Must stay false: rows are interactions.")
    eval_strategy: str = option("epoch", "When to rank the valid split: no, steps, epoch.")
    save_strategy: str = option("epoch", "When to write a checkpoint: no, steps, epoch, best.")
    save_total_limit: int | None = option(2, "Checkpoints kept, the best one included.")
    load_best_model_at_end: bool = option(True, "End with the best model on the valid split.")
    metric_for_best_model: str | None = option("ndcg@10", "What best means.")
    greater_is_better: bool | None = option(True, "Whether a larger metric is better.")
    report_to: None | str | list[str] = option("none", _LOGGERS)  # noqa: RUF036 - HfArgumentParser expects None first

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, got True; rows are interactions, not tensors")
        super().__post_init__()
        if "tensorboard" in (self.report_to or ()) and not is_tensorboard_available():
            raise ValueError("report_to: expected an installed logger, got tensorboard; pip install 'flr[tensorboard]'")


@dataclass
class SFTConfig(RecTrainingArguments):
    """``TrainingArguments`` plus what a reasoner and a catalogue need.

    The reasoner is a small module on a large or a well-tuned one: it learns slowly, with decay of its own.
    """

    output_dir: str | None = option("runs/sft", "Checkpoints, and at the end the best model.")
    reasoner_learning_rate: float | None = option(
        None, "Learning rate of the reasoner. Default: a tenth of --learning_rate."
    )
    reasoner_weight_decay: float = option(0.0, "Weight decay of the reasoner.")
    embedding_learning_rate: float | None = option(None, "Learning rate of the token tables. Default: --learning_rate.")
    embedding_weight_decay: float | None = option(None, "Weight decay of the token tables. Default: --weight_decay.")
    normalisation: str = option(
        "full", "What a target token competes with: full (the vocabulary) or catalogue (what continues an item)."
    )
    embedding_dropout: float = option(0.0, "Dropout on input embeddings, in [0, 1).")
    output_dropout: float = option(0.0, "Dropout on the lm_head's input, in [0, 1).")
    logging_steps: float = option(50, "Steps between two lines of the log.")

    def __post_init__(self) -> None:
        check_normalisation("normalisation", self.normalisation)
        for name in ("embedding_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        super().__post_init__()
        if "tensorboard" in (self.report_to or ()) and not is_tensorboard_available():
            raise ValueError("report_to: expected an installed logger, got tensorboard; pip install 'flr[tensorboard]'")


@dataclass
class LatentGRPOConfig(RecTrainingArguments):
    """``TrainingArguments`` plus what latent GRPO needs; a batch size counts users, each of which is a group."""

    output_dir: str | None = option("runs/rl", "Checkpoints, and at the end the best model.")
    group_size: int = option(16, "G, thoughts a user: one as it is, the others with noise.")
    noise_scale: float = option(0.3, "Deviation of the noise on a thought.")
    noise_relative: bool = option(True, "noise_scale is in units of the thought's RMS.")
    policy: str = option("thoughts", f"What the ratio is of: {' or '.join(POLICIES)}.")
    advantage: str = option("grpo", f"One of {', '.join(KINDS)}.")
    advantage_epsilon: float = option(
        1.0, "Added to the spread that grpo divides by (and to latentr3's norm), in units of the reward."
    )
    advantage_from_clean: bool = option(
        True, "latentr3: compare with the group's own unperturbed member, not with the batch's mean of them."
    )
    reward: str = option(
        "log_likelihood", "neg_perplexity, log_likelihood, hit@k, ndcg@k, mrr; several as name=weight,name=weight."
    )
    reward_beams: int = option(20, "Beams of the rewards that decode (hit@k, ndcg@k, mrr).")
    epsilon_low: float = option(0.2, "The ratio is clipped below 1 minus this.")
    epsilon_high: float = option(0.2, "The ratio is clipped above 1 plus this.")
    num_iterations: int = option(1, "Optimizer steps on a batch, with its noise and rewards.")
    kl_weight: float = option(0.0, "Weight of the KL from the thoughts of the model given.")
    regularise: bool = option(False, "Add the reasoner's regularisers, as in SFT.")
    train_backbone: bool = option(False, "Train the backbone too (policy tokens).")
    backbone_learning_rate: float | None = option(
        None, "Learning rate of the backbone. Default: a tenth of --learning_rate."
    )
    learning_rate: float = option(1e-4, "Learning rate of the reasoner.")
    dataloader_drop_last: bool = option(
        True, "Leave out the last incomplete batch of an epoch; the next one has another."
    )
    logging_steps: float = option(10, "Steps between two lines of the log.")

    def __post_init__(self) -> None:
        for name, allowed in (("policy", POLICIES), ("advantage", KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("group_size", "num_iterations", "reward_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.noise_scale <= 0:
            raise ValueError(f"noise_scale: expected a positive number, got {self.noise_scale}")
        for name in ("epsilon_low", "epsilon_high", "kl_weight", "advantage_epsilon"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.train_backbone and (self.policy == "thoughts" or self.kl_weight):
            raise ValueError(
                "train_backbone: expected policy tokens and kl_weight 0, since thoughts reach the reasoner alone, got "
                f"policy {self.policy} and kl_weight {self.kl_weight}"
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: expected False, got True; it excludes the cache that groups share"
            )
        if self.save_strategy == "steps" and self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps: expected a multiple of num_iterations = {self.num_iterations}, got {self.save_steps}"
            )
        Rewards.parse(self.reward)
        super().__post_init__()
        if "tensorboard" in (self.report_to or ()) and not is_tensorboard_available():
            raise ValueError("report_to: expected an installed logger, got tensorboard; pip install 'flr[tensorboard]'")
