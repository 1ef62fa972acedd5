"""Every flag of ``TrainingArguments`` does what it says, or is refused by name."""

import copy
import dataclasses
import itertools

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flr.train import LatentGRPOConfig, SFTConfig
from flr.train.arguments import REFUSED, REFUSED_BY_GRPO
from flr.train.run_folder import checkpoints
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer

#: Shown to change the weights of three steps, in SFT and in RL; options that a flag needs to matter come with it.
TRAJECTORY = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 8},
    "num_train_epochs": {"num_train_epochs": 0.3, "max_steps": -1},
    "max_steps": {"max_steps": 2},
    "learning_rate": {"learning_rate": 3e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}},
    "warmup_steps": {"warmup_steps": 2},
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": {"weight_decay": 0.5, "reasoner_weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"optim": "sgd", "max_grad_norm": 1e-3},
    "label_smoothing_factor": {"label_smoothing_factor": 0.2},
    "neftune_noise_alpha": {"neftune_noise_alpha": 20.0},
    "bf16": {"bf16": True},
    "seed": {"seed": 5},
    "data_seed": {"data_seed": 0},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
}
#: Shown below to have an effect that is not one on the weights.
EFFECTS = {
    "output_dir", "disable_tqdm", "report_to", "logging_strategy", "logging_steps", "logging_first_step",
    "include_num_input_tokens_seen", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
    "eval_on_start", "save_only_model", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "full_determinism", "use_cpu", "dataloader_drop_last",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode", "debug",
    "skip_memory_metrics", "average_tokens_across_devices", "resume_from_checkpoint", "do_eval",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
    "restore_callback_states_from_checkpoint",
}  # fmt: skip
#: Read by parts of transformers that no subclass here touches: devices, launchers, logs and services that are not here.
THEIRS = {
    "fp16", "dataloader_pin_memory", "tf32", "torch_empty_cache_steps", "ddp_backend", "ddp_timeout", "local_rank",
    "fsdp", "fsdp_config",
    "deepspeed",  # tests/train/test_zero_distributed.py
    "log_level", "log_level_replica", "log_on_each_node", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id",
}  # fmt: skip
#: The default of a flag says no more than what type it has; these values are of that type and another.
VALUES = {
    "label_names": ["labels"], "eval_accumulation_steps": 2, "include_for_metrics": ["loss"],
    "length_column_name": "size", "optim_target_modules": "all-linear", "liger_kernel_config": {"rope": True},
    "accelerator_config": {"split_batches": True}, "parallelism_config": "x",
    "dataloader_multiprocessing_context": "spawn", "hub_token": "x", "hub_private_repo": True, "hub_model_id": "x",
    "hub_strategy": "end", "hub_revision": "x", "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "gradient_checkpointing": True, "activation_checkpointing": True, "gradient_checkpointing_kwargs": {"a": 1},
    "activation_checkpointing_kwargs": {"a": 1},
}  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(TrainingArguments)}


def test_every_flag_of_the_installed_version_is_in_one_list():
    lists = [set(TRAJECTORY), EFFECTS, THEIRS, set(REFUSED)]
    known = set().union(*lists)
    assert sum(map(len, lists)) == len(known), "a flag is in two lists"
    odd = sorted(set(FIELDS) - known)
    assert not odd, f"flags of this transformers that nobody has looked at: {odd}; honour and test them, or refuse them"
    assert set(REFUSED_BY_GRPO) <= set(TRAJECTORY) | EFFECTS


@pytest.mark.parametrize(("name", "config"), [(n, c) for n in REFUSED for c in (SFTConfig, LatentGRPOConfig)]
                         + [(n, LatentGRPOConfig) for n in REFUSED_BY_GRPO])  # fmt: skip
def test_what_is_refused_is_named_with_a_reason(tmp_path, name, config):
    if name not in FIELDS:
        pytest.skip("another version of transformers")
    reason = (REFUSED | REFUSED_BY_GRPO)[name]
    field = {f.name: f for f in dataclasses.fields(config)}[name]
    value = VALUES.get(name, not field.default)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as error:
        config(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    assert reason in str(error.value)


@pytest.mark.parametrize("config", [SFTConfig, LatentGRPOConfig])
def test_arguments_may_be_built_again_from_themselves(tmp_path, config):
    args = config(output_dir=str(tmp_path), use_cpu=True)
    assert dataclasses.replace(args, seed=3).seed == 3


def test_another_order_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="train_sampling_strategy: expected one of random, group_by_length, sequential"
    ):
        SFTConfig(output_dir=str(tmp_path), train_sampling_strategy="batch_rebalance")


def test_what_accelerate_would_not_do_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fsdp: expected GPUs, got processes on the CPU"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, fsdp="full_shard")


MAKE = {"sft": lambda folder, **options: sft_trainer(folder, *trainable(), **options), "rl": grpo_trainer}
BASE = {"max_steps": 3, "learning_rate": 1e-2, "seed": 3, "lr_scheduler_type": "linear"}
_weights = {}


def trained(make, folder, **options):
    """The weights after training with options over the base."""
    if make == "rl":
        options.pop("reasoner_weight_decay", None)
        options = {"advantage_epsilon": 0.01, **options}
    train = MAKE[make](folder, **{**BASE, **options})
    train.train()
    return {name: p.detach().clone() for name, p in train.model.named_parameters()}


def differ(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "make"), [(n, m) for n in TRAJECTORY for m in MAKE if m != "rl" or n not in REFUSED_BY_GRPO]
)
def test_what_shapes_the_weights_does(tmp_path, name, make):
    options = dict(TRAJECTORY[name])
    # what comes with the flag is in the other run, too
    left = (*options,) if name == "num_train_epochs" else (name, f"reasoner_{name}")
    plain = {key: value for key, value in options.items() if key not in left}
    key = (make, str(plain))
    if key not in _weights:
        _weights[key] = trained(make, tmp_path / "plain", **plain)
    assert differ(_weights[key], trained(make, tmp_path / "other", **options))


def test_the_order_of_rows_goes_by_its_own_seed(tmp_path):
    def order(**options):
        return list(MAKE["sft"](tmp_path, **options)._get_train_sampler())

    assert order(seed=3) == order(seed=5, data_seed=3)
    assert order(seed=3, data_seed=0) == order(seed=0)
    assert order(train_sampling_strategy="sequential") == [(0, i) for i in range(len(order()))]


def lines(folder, names, make, **options):
    """For each name, the steps of the log's lines that have such a value."""
    train = MAKE[make](folder, **{**BASE, **options})
    train.train()
    return [[line["step"] for line in train.state.log_history if name in line] for name in names]


@pytest.mark.parametrize("make", MAKE)
def test_logs_and_evaluations_come_when_they_should(tmp_path, make):
    names = ("loss", "eval_mrr", "num_input_tokens_seen")
    every = {"eval_strategy": "steps", "eval_steps": 1}
    assert lines(tmp_path, names, make, logging_steps=2, **every) == [[2], [1, 2, 3], []]
    told = {"logging_steps": 2, "logging_first_step": True, "include_num_input_tokens_seen": "all"}
    loss, evaluated, tokens = lines(tmp_path, names, make, **told, **every | {"eval_steps": 2})
    assert (loss, evaluated) == ([1, 2], [2, 3])
    assert tokens
    silent = {"logging_strategy": "no"}
    assert lines(tmp_path, names, make, **silent, **every, eval_delay=2) == [[], [2, 3], []]
    assert lines(tmp_path, names, make, **silent, **every | {"eval_steps": 9}, eval_on_start=True)[1][0] == 0
    with pytest.raises(ValueError, match=r"do_eval: expected an eval_strategy"):
        MAKE[make](tmp_path, do_eval=True)


def test_checkpoints_come_when_they_should(tmp_path):
    def saved(**options):
        train = MAKE["sft"](tmp_path, **{**BASE, "overwrite_output_dir": True, **options})
        train.train()
        found = [p.name for p in checkpoints(tmp_path)][::-1]
        return [int(name[11:]) for name in found], train

    assert saved(save_strategy="steps", save_steps=1, save_total_limit=9)[0] == [1, 2, 3]
    assert saved(save_strategy="steps", save_steps=2, save_total_limit=9)[0] == [2, 3]
    assert saved(save_strategy="steps", save_steps=1, save_total_limit=1)[0] == [3]
    assert saved(save_strategy="no")[0] == []
    assert not (tmp_path / "checkpoint-3").exists()
    saved(save_strategy="steps", save_steps=3, save_only_model=True)
    assert not (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    best = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 9}
    for metric, greater in itertools.product(("mrr", "seconds"), (True, False)):
        judged = {"metric_for_best_model": metric, "greater_is_better": greater}
        train = saved(**best, **judged, load_best_model_at_end=True)[1]
        values = {e["step"]: e[f"eval_{metric}"] for e in train.state.log_history if f"eval_{metric}" in e}
        step = (max if greater else min)(values, key=lambda s: (values[s], -s if greater else s))
        assert train.state.best_global_step == step
        kept = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert kept["state"][0]["step"] == step


def test_where_and_how_it_reports(tmp_path):
    def callbacks(**options):
        return [type(c) for c in MAKE["sft"](tmp_path, **options).callback_handler.callbacks]

    assert ProgressCallback in callbacks(disable_tqdm=False)
    assert PrinterCallback in callbacks(disable_tqdm=True)
    assert TensorBoardCallback in callbacks(report_to="tensorboard")
    assert TensorBoardCallback not in callbacks(report_to="none")


def test_how_batches_are_loaded(tmp_path, monkeypatch):
    def loader(**options):
        return MAKE["sft"](tmp_path, per_device_train_batch_size=16, **options).get_train_dataloader()

    assert loader(dataloader_num_workers=2).num_workers == 2
    assert loader(dataloader_num_workers=1, dataloader_prefetch_factor=7).prefetch_factor == 7
    assert loader(dataloader_num_workers=1, dataloader_persistent_workers=True).persistent_workers
    assert len(loader()) == len(loader(dataloader_drop_last=True)) + 1
    sizes = []
    monkeypatch.setattr("flr.train.base.evaluate", lambda *a, batch_size, **k: sizes.append(batch_size) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MAKE["sft"](tmp_path, per_device_eval_batch_size=3).evaluate()
    assert sizes == [3]


def test_workers_and_checkpointed_activations_give_the_same_weights(tmp_path):
    plain = trained("sft", tmp_path / "plain")
    assert not differ(plain, trained("sft", tmp_path / "workers", dataloader_num_workers=1))
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen.append(model.is_gradient_checkpointing)

    flags = ("gradient_checkpointing", "activation_checkpointing")  # the second since transformers 5.20
    flags = tuple(flag for flag in flags if flag in {field.name for field in dataclasses.fields(SFTConfig)})
    for flag in flags:
        options = {flag: True, f"{flag}_kwargs": {"use_reentrant": False}}
        train = MAKE["sft"](tmp_path / flag, **{**BASE, **options})
        train.add_callback(Look())
        train.train()
        for name, parameter in train.model.named_parameters():
            torch.testing.assert_close(parameter, plain[name], rtol=1e-4, atol=1e-5)  # another order of sums
    assert seen == [True] * 3 * len(flags)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE)
def test_compilation_is_handed_on(tmp_path, make):
    from torch._dynamo.utils import counters

    plain = trained(make, tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    compiled = trained(make, tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert counters["frames"]["ok"] > 0
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-6)
    train = MAKE[make](tmp_path, torch_compile_backend="eager", torch_compile_mode="max-autotune")
    plugin = train.accelerator.state.dynamo_plugin
    assert (plugin.backend.value.lower(), plugin.mode) == ("eager", "max-autotune")


def test_what_is_handed_on(tmp_path, monkeypatch):
    options = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False}
    train = MAKE["sft"](tmp_path, **options, ddp_static_graph=True)
    monkeypatch.setattr(type(train.args), "parallel_mode", "distributed", raising=False)
    handler = train.accelerator.ddp_handler
    if handler is None:  # made for several processes alone
        seen = {}
        monkeypatch.setattr("transformers.trainer.DistributedDataParallelKwargs", lambda **k: seen.update(k))
        train._wrap_model(train.model)
    else:
        seen = handler.to_kwargs()
    assert {"find_unused_parameters": True, "bucket_cap_mb": 7, "broadcast_buffers": False}.items() <= seen.items()
    assert MAKE["sft"](tmp_path, use_cpu=True).args.device.type == "cpu"
    train = MAKE["sft"](tmp_path, **BASE, skip_memory_metrics=False)
    assert any("mem_cpu" in name for name in train.train().metrics)
    watched = []
    monkeypatch.setattr("transformers.trainer.DebugUnderflowOverflow", lambda model: watched.append(model))
    train = MAKE["sft"](tmp_path, **BASE, debug="underflow_overflow")
    train.train()
    assert watched == [train.model]


def test_determinism_is_switched_on(tmp_path):
    try:
        MAKE["sft"](tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_averaging_over_devices_may_be_left_out(tmp_path, monkeypatch):
    train = MAKE["sft"](tmp_path, average_tokens_across_devices=False)
    batch = next(iter(train.get_train_dataloader()))
    train.model.eval()
    alone = train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(50))
    monkeypatch.setattr(type(train.accelerator), "num_processes", property(lambda _: 4))
    torch.testing.assert_close(train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(50)), alone)


def test_optimizers_without_groups_and_options_that_nothing_reads_are_refused(tmp_path):
    train = MAKE["sft"](tmp_path, optim="adamw_torch", optim_args="momentum=0.9")
    with pytest.raises(ValueError, match=r"optim_args: expected what adamw_torch reads, got 'momentum=0.9'"):
        train.create_optimizer()
    train = MAKE["sft"](tmp_path)
    train.get_optimizer_cls_and_kwargs = lambda *a: (torch.optim.SGD, {"params": []})
    with pytest.raises(ValueError, match=r"optim: expected one that takes groups"):
        train.create_optimizer()


def test_states_of_callbacks_come_back(tmp_path):
    from transformers import EarlyStoppingCallback

    options = {
        **BASE, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "save_total_limit": 9, "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    train = MAKE["sft"](tmp_path, **options)
    train.add_callback(EarlyStoppingCallback(early_stopping_patience=7))
    train.train()
    again = MAKE["sft"](tmp_path, **options)
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    again.add_callback(stopping)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    restored = next(c for c in again.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
    assert restored.early_stopping_patience == 7
    assert copy.copy(stopping).early_stopping_patience == 1
