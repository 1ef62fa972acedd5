"""Numbers that an argument does not take are refused by its name, before anything reads them."""

import math

import numpy as np
import pytest

from flr.cli.parsing import parse
from flr.evaluate.metrics import row_metrics
from flr.train import LatentGRPOConfig, Rewards, SFTConfig
from flr.train.arguments import REFUSED, UpdateConfig
from flr.train.limits import METRICS, NUMBERS
from tests.helpers.numbers import is_number, outside
from tests.helpers.training import grpo_trainer

CONFIGS = (SFTConfig, UpdateConfig, LatentGRPOConfig)
#: Each with a class that has it.
LIMITED = [(name, next(c for c in CONFIGS if name in c.__dataclass_fields__)) for name in NUMBERS]


def test_every_number_has_limits():
    numbers = {name for config in CONFIGS for name in config.__dataclass_fields__ if is_number(config, name)}
    assert len(numbers) > 50
    launched = {"local_rank"}  # set by launchers, whose business it is
    assert numbers - set(REFUSED) - launched == set(NUMBERS)


@pytest.mark.parametrize(("name", "config"), LIMITED, ids=[name for name, _ in LIMITED])
def test_numbers_out_of_range_are_refused_by_name(tmp_path, name, config):
    for value in outside(NUMBERS[name]):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as error:
            config(output_dir=str(tmp_path), use_cpu=True, **{name: value})
        assert str(error.value).endswith(f", got {value!r}")


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1, "max_grad_norm": 0.0, "warmup_steps": 0.1, "learning_rate": 0.0, "num_train_epochs": 0},
        {"max_grad_norm": None, "save_total_limit": None, "eval_steps": None, "neftune_noise_alpha": 0.0},
        {"max_grad_norm": float("inf")},
        {
            "logging_steps": 0.5,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 0.1,
            "save_steps": 0.2,
        },
        {"logging_steps": 5.0, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 0, "save_steps": 10.0},
        {"logging_strategy": "epoch", "logging_steps": 0},
        {"learning_rate": np.float32(1e-3), "per_device_train_batch_size": np.int64(4), "data_seed": -1},
        {"embedding_learning_rate": 0.0, "reasoner_learning_rate": None, "embedding_weight_decay": None},
        {"metric_for_best_model": "eval_mrr"},
        {"metric_for_best_model": None, "load_best_model_at_end": False},
    ],
)
def test_what_transformers_gives_a_meaning_is_taken(tmp_path, options):
    SFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


#: As words of a command line, and what is said of them.
WORDS = [
    (LatentGRPOConfig, "--train_backbone true --policy tokens --backbone_learning_rate -1",
     "backbone_learning_rate: expected None or a number >= 0, got -1.0"),
    (SFTConfig, "--reasoner_learning_rate -1", "reasoner_learning_rate: expected None or a number >= 0, got -1.0"),
    (SFTConfig, "--embedding_learning_rate nan", "embedding_learning_rate: expected None or a number >= 0, got nan"),
    (SFTConfig, "--weight_decay -3", "weight_decay: expected a number >= 0, got -3.0"),
    (SFTConfig, "--label_smoothing_factor 1.5", "label_smoothing_factor: expected a number in [0, 1], got 1.5"),
    (SFTConfig, "--max_grad_norm nan", "max_grad_norm: expected None or inf or a number >= 0, got nan"),
    (SFTConfig, "--gradient_accumulation_steps 0", "gradient_accumulation_steps: expected an integer >= 1, got 0"),
    (SFTConfig, "--num_train_epochs nan", "num_train_epochs: expected a number >= 0, got nan"),
    (SFTConfig, "--max_steps 0", "max_steps: expected -1 or an integer >= 1, got 0"),
    (SFTConfig, "--eval_max_users 0", "eval_max_users: expected None or an integer >= 1, got 0"),
    (SFTConfig, "--logging_steps 0", "logging_steps: expected an integer >= 1 or a share of all steps in (0, 1), got"),
    (SFTConfig, "--eval_strategy steps --eval_steps 1.5", "eval_steps: expected an integer >= 1 or a share of all"),
    (SFTConfig, "--eval_strategy steps --logging_strategy no --logging_steps 0", "eval_steps: expected an integer"),
    (SFTConfig, "--adam_beta1 2", "adam_beta1: expected a number in [0, 1), got 2.0"),
    (SFTConfig, "--seed -1", "seed: expected an integer from 0 to 4294967295, got -1"),
    (SFTConfig, "--metric_for_best_model foo", "metric_for_best_model: expected one of hr@1, hr@5, hr@10, hr@20,"),
    (SFTConfig, "--metric_for_best_model target_logprob", "metric_for_best_model: expected one of hr@1"),
    (LatentGRPOConfig, "--noise_scale inf", "noise_scale: expected a positive number, got inf"),
    (LatentGRPOConfig, "--kl_weight inf", "kl_weight: expected a number >= 0, got inf"),
    (LatentGRPOConfig, "--epsilon_high nan", "epsilon_high: expected a number >= 0, got nan"),
    (LatentGRPOConfig, "--reward ndcg@10=nan", "reward: expected a finite number as weight of ndcg@10, got 'nan'"),
    (LatentGRPOConfig, "--reward mrr=much", "reward: expected a finite number as weight of mrr, got 'much'"),
    (LatentGRPOConfig, "--reward log_likelihood=1,log_likelihood=2",
     "reward: expected every reward once, got log_likelihood again in 'log_likelihood=1,log_likelihood=2'"),
    (UpdateConfig, "--rl_reward mrr=inf", "rl_reward: expected a finite number as weight of mrr, got 'inf'"),
    (UpdateConfig, "--rl_reward accuracy", "rl_reward: expected neg_perplexity"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words", "message"), WORDS, ids=[words for _, words, _ in WORDS])
def test_a_command_refuses_them_before_its_work(config, words, message):
    with pytest.raises(ValueError) as error:
        parse("sft", "", (config,), ["--use_cpu", "true", *words.split()])
    assert str(error.value).startswith(message)


def test_weights_of_rewards_that_code_gives_are_finite():
    with pytest.raises(ValueError, match="reward: expected a finite number as weight of mrr, got nan"):
        Rewards({"mrr": math.nan})


def test_the_metrics_to_choose_by_are_those_of_an_evaluation(tmp_path):
    assert {*row_metrics(np.array([1])), "coverage@10", "seconds"} == set(METRICS)
    train = grpo_trainer(tmp_path, metric_for_best_model="target_logprob")
    assert {f"eval_{name}" for name in train.args.metrics} == set(train.evaluate()) - {"epoch"}
