"""Arguments of both trainers, and which of transformers' own have no place here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from flr.config import check_beside, check_normalisation, option
from flr_kernels.ops.group_advantage.op import KINDS

from .limits import METRICS, check_limits
from .prompts import check_prompt_cache
from .rewards import Rewards
from .zero import load_whole, zero_settings

POLICIES = ("thoughts", "tokens")
_LOGGERS = "Where to log: none, tensorboard (pip install 'flr[tensorboard]'), or another that transformers knows."

_HUB = "a folder is published after the training, with model.push_to_hub or the command hf upload"
_RANKS = "the evaluation ranks the whole catalogue, and has no loss and no predictions to collect"
#: Flags of ``TrainingArguments`` that must keep their default, and why. Every other one does what transformers says:
#: tests/train/test_arguments.py goes over the fields of the installed version, and fails on one that is in no list.
REFUSED: dict[str, str] = {
    "remove_unused_columns": "rows are interactions, not tensors",
    "label_names": _RANKS,
    "prediction_loss_only": _RANKS,
    "eval_do_concat_batches": _RANKS,
    "eval_use_gather_object": _RANKS,
    "eval_accumulation_steps": _RANKS,
    "include_for_metrics": _RANKS,
    "batch_eval_metrics": _RANKS,
    "bf16_full_eval": "the evaluation computes as the model does: load it in bfloat16",
    "fp16_full_eval": "the evaluation computes as the model does: load it in float16 to evaluate",
    "logging_nan_inf_filter": "a loss that is not finite ends the run instead of being left out of the mean",
    "length_column_name": "rows have no columns; lengths are those of the prompts",
    "optim_target_modules": "parameters are grouped here: the reasoner, the token tables, the others",
    "use_liger_kernel": "it replaces the forward that makes the thought",
    "liger_kernel_config": "it replaces the forward that makes the thought",
    "use_cache": "the forward decides where it needs one",
    "auto_find_batch_size": "a batch that does not fit would start the count of steps anew with trained weights",
    "accelerator_config": "how rows are split over processes is part of what makes a continued run the same",
    "parallelism_config": "thoughts are inserted into whole sequences; DDP, FSDP and ZeRO split rows and weights",
    "dataloader_in_order": "the order of rows is a function of seed and epoch",
    "dataloader_multiprocessing_context": "workers are forks that share the rows",
    "ignore_data_skip": "a continued run would see rows of the epoch twice",
    "enable_jit_checkpoint": "it saves in the middle of a step, which cannot be continued to the same weights",
    "save_on_each_node": "a checkpoint is written and verified once, in a folder that all nodes share",
    "do_train": "the command says what is done",
    "do_predict": "the command says what is done: flr evaluate --split test",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
         "hub_revision"), _HUB,
    ),
}  # fmt: skip
#: What latent GRPO refuses beside these.
REFUSED_BY_GRPO: dict[str, str] = {
    "label_smoothing_factor": "the loss is a policy's and has no labels",
    "neftune_noise_alpha": "there is no noise but that on the thought",
    "gradient_checkpointing": "it excludes the cache that groups share",
    "activation_checkpointing": "it excludes the cache that groups share",
    "gradient_checkpointing_kwargs": "there is no checkpointing",
    "activation_checkpointing_kwargs": "there is no checkpointing",
    "average_tokens_across_devices": "the loss is divided by the users of all processes",
}
SAMPLING = ("random", "group_by_length", "sequential")


def _check_flags(args: Any, refused: Mapping[str, str]) -> None:
    """ValueError for a flag in ``refused`` that is not as it is by default."""
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        same = value is None or value == default or (field.name == "accelerator_config" and value == type(value)())
        if field.name in refused and not same and not (default is None and value is False):
            wanted = False if value is True else default
            raise ValueError(f"{field.name}: expected {wanted!r}, got {value!r}; {refused[field.name]}")


@dataclass
class RecTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of a recommender: the best model on the valid split is kept."""

    resume_from_checkpoint: str | None = option(
        None,
        "auto (default): go on from the newest whole checkpoint in output_dir, if any; true: there must be one; none: "
        "start anew; or the folder of a checkpoint. Of a run with the same settings alone.",
    )
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in output_dir, and start anew.")
    eval_num_beams: int = option(
        20, "Beams of the evaluation after every epoch; with fewer than k, metrics at k miss items."
    )
    eval_max_users: int | None = option(None, "Evaluate on that many users only, evenly spread. Default: all.")
    train_sampling_strategy: str = option(
        "random",
        "Order of training rows: random; sequential; group_by_length: those of a batch are of similar length, which "
        "saves padding (the length of their prompts before --augment_* changes them).",
    )
    prompt_cache: str = option(
        "none",
        "With a frozen backbone: keep the prompts' states from epoch to epoch, in memory or on disk (in output_dir, "
        "while the run lasts), so that each prompt is read once a run.",
    )
    prompt_cache_gb: float = option(4.0, "Bound of what prompt_cache keeps, in 10^9 bytes, in every process.")
    cuda_graphs: bool = option(
        True,
        "On one GPU: launch a training step's operations at once, by CUDA graphs, where its shapes have come before; "
        "prompts are padded by up to an eighth. FLR_CUDA_GRAPHS=0 turns those of decoding off, too.",
    )
    compile_layers: bool = option(
        False,
        "With cuda_graphs: compile the backbone's layers by torch.compile (a minute or so) before steps are captured.",
    )
    bf16: bool | None = option(  # type: ignore[assignment]
        None,
        "Compute in bfloat16 beside float32 weights (autocast). Default: where flr trains a model that it was given, "
        "on a GPU that has bfloat16.",
    )
    remove_unused_columns: bool = option(False, "Must stay false: rows are interactions.")
    logging_nan_inf_filter: bool = option(False, "Must stay false: a loss that is not finite ends the run.")
    eval_strategy: str = option("epoch", "When to rank the valid split: no, steps, epoch.")
    save_strategy: str = option("epoch", "When to write a checkpoint: no, steps, epoch, best.")
    save_total_limit: int | None = option(2, "Checkpoints kept, the best one included.")
    load_best_model_at_end: bool = option(True, "End with the best model on the valid split.")
    metric_for_best_model: str | None = option("ndcg@10", "What best means.")
    greater_is_better: bool | None = option(True, "Whether a larger metric is better.")
    report_to: None | str | list[str] = option("none", _LOGGERS)  # noqa: RUF036 - HfArgumentParser expects None first

    #: What ``metric_for_best_model`` may name.
    metrics: ClassVar[tuple[str, ...]] = METRICS

    def __post_init__(self) -> None:
        check_limits(self, self.metrics)
        self._check_own()
        _check_flags(self, REFUSED)
        if self.train_sampling_strategy not in SAMPLING:
            wanted = f"one of {', '.join(SAMPLING)}"
            raise ValueError(f"train_sampling_strategy: expected {wanted}, got {self.train_sampling_strategy!r}")
        if self.do_eval and self.eval_strategy == "no":
            raise ValueError("do_eval: expected an eval_strategy other than no, which says when, got do_eval alone")
        check_prompt_cache(self)
        check_beside(
            self,
            {
                "prompt_cache_gb": ("a prompt_cache", self.prompt_cache != "none"),
                "compile_layers": ("cuda_graphs", self.cuda_graphs),
            },
        )
        self.deepspeed = zero_settings(self)
        super().__post_init__()
        if self.deepspeed:
            load_whole()
        if self.fsdp and self.device.type == "cpu":
            raise ValueError("fsdp: expected GPUs, got processes on the CPU, where accelerate would do DDP in silence")
        if "tensorboard" in (self.report_to or ()) and not is_tensorboard_available():
            raise ValueError("report_to: expected an installed logger, got tensorboard; pip install 'flr[tensorboard]'")

    def _check_own(self) -> None:
        """ValueError for options of a subclass that are unusable; numbers have been looked at before."""


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

    def _check_own(self) -> None:
        check_normalisation("normalisation", self.normalisation)


#: What an update refuses beside what training refuses.
REFUSED_BY_UPDATE: dict[str, str] = {
    "resume_from_checkpoint": "an update that was cut goes on by itself",
    "overwrite_output_dir": "the output is replaced where the update is kept",
    "eval_strategy": "the newest rows are ranked before and after",
    "load_best_model_at_end": "the last weights are compared with those before",
    "save_only_model": "an update that was cut would begin anew",
    "normalisation": "it is that of the model",
}


@dataclass
class UpdateConfig(SFTConfig):
    """``SFTConfig`` with the defaults of an update: one epoch over new and old rows, and no more than some steps."""

    output_dir: str | None = option("", "Folder of the updated model. Default: the model's own, which is replaced.")
    max_steps: int = option(1000, "Steps at most; there are fewer where num_train_epochs over the rows need fewer.")
    num_train_epochs: float = option(1.0, "Epochs over new rows and replayed ones, where max_steps allows.")
    eval_strategy: str = option("no", "Must stay no: the newest rows are ranked before and after.")
    load_best_model_at_end: bool = option(False, "Must stay false: the last weights are compared with those before.")
    save_strategy: str = option("steps", "When to write a checkpoint to go on from: no, steps, epoch.")
    save_steps: float = option(0.25, "Steps between two checkpoints, or a share of all steps.")
    save_total_limit: int | None = option(1, "Checkpoints kept while the update lasts.")
    rl_steps: int = option(
        0,
        "Steps of reinforcement after the supervised ones, on the newest of the new rows; they are kept only where the "
        "rows that decide are not ranked worse. Default: none.",
    )
    rl_learning_rate: float = option(1e-4, "Learning rate of the reasoner in these steps; all else stays as it is.")
    rl_reward: str = option("ndcg@10", "Reward of these steps, as --reward of flr rl.")
    rl_group_size: int = option(8, "Thoughts a user in these steps: one as it is, the others with noise.")
    rl_likelihood_weight: float = option(
        0.2, "λ in [0, 1] of their objective: λ times the target's likelihood and 1 - λ times the reward's policy."
    )

    def _check_own(self) -> None:
        _check_flags(self, REFUSED_BY_UPDATE)
        Rewards.parse(self.rl_reward, "rl_reward")
        options = ("rl_learning_rate", "rl_reward", "rl_group_size", "rl_likelihood_weight")
        check_beside(self, dict.fromkeys(options, ("rl_steps", self.rl_steps > 0)))
        super()._check_own()


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
    reward_beams: int = option(20, "Beams of the rewards that decode (hit@k, ndcg@k, mrr); at least k are used.")
    epsilon_low: float = option(0.2, "The ratio is clipped below 1 minus this.")
    epsilon_high: float = option(0.2, "The ratio is clipped above 1 plus this.")
    num_iterations: int = option(1, "Optimizer steps on a batch, with its noise and rewards.")
    kl_weight: float = option(0.0, "Weight of the KL from the thoughts of the model given.")
    kl_target: float | None = option(
        None, "Adapt kl_weight so that the mean KL stays at this, in nats a user. Default: leave it as it is."
    )
    noise_target: float | None = option(
        None,
        "Adapt noise_scale so that this share of the users, in (0, 1), have members whose rewards differ; with rewards "
        "that rank. Default: leave it as it is.",
    )
    likelihood_weight: float = option(
        0.0,
        "λ in [0, 1] of a hybrid objective, λ times the target's likelihood after the thought without noise and 1 - λ "
        "times the policy's.",
    )
    likelihood_adaptive: bool = option(
        False, "λ is the least of every user's; it grows to 1 where a user's members are all rewarded alike."
    )
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

    metrics: ClassVar[tuple[str, ...]] = (*METRICS, "target_logprob")

    def _check_own(self) -> None:
        for name, allowed in (("policy", POLICIES), ("advantage", KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.kl_target and not self.kl_weight:
            wanted = "a positive number to begin from with kl_target"
            raise ValueError(f"kl_weight: expected {wanted}, got {self.kl_weight}")
        if self.is_hybrid and self.num_iterations > 1:
            wanted = "1 with a likelihood beside the policy"
            raise ValueError(f"num_iterations: expected {wanted}, got {self.num_iterations}")
        if self.train_backbone and (self.policy == "thoughts" or self.kl_weight):
            raise ValueError(
                "train_backbone: expected policy tokens and kl_weight 0, since thoughts reach the reasoner alone, got "
                f"policy {self.policy} and kl_weight {self.kl_weight}"
            )
        _check_flags(self, REFUSED_BY_GRPO)
        saves = {"steps": "save_steps", "best": "eval_steps"}.get(self.save_strategy)
        steps = getattr(self, saves) if saves else None
        if saves and steps is not None and steps % self.num_iterations:
            raise ValueError(f"{saves}: expected a multiple of num_iterations = {self.num_iterations}, got {steps}")
        Rewards.parse(self.reward)
        check_beside(
            self,
            {
                "advantage_from_clean": ("advantage latentr3", self.advantage == "latentr3"),
                "backbone_learning_rate": ("train_backbone", self.train_backbone),
            },
        )

    @property
    def is_hybrid(self) -> bool:
        """Whether the likelihood of targets is a part of the objective."""
        return self.likelihood_weight > 0 or self.likelihood_adaptive
