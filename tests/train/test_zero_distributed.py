"""Training on shards by DeepSpeed (ZeRO-2 and ZeRO-3; gloo, CPU) is that of one process, and continues to the bit."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from flr.train import SFTConfig
from flr.train.lora import LoraSettings, add_lora, own_tokens
from tests.helpers.models import trainable, wake
from tests.helpers.processes import in_processes
from tests.helpers.training import grpo_trainer, sft_trainer

ROWS, STEPS = 8, 4
#: Not Adam, to which gradients of another size are the same; each step is clipped.
COMMON = {"max_steps": STEPS, "seed": 3, "logging_steps": 1, "max_grad_norm": 0.5, "lr_scheduler_type": "linear",
          "optim": "sgd", "learning_rate": 0.3}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_max_users": 20, "eval_num_beams": 4,
             "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}  # fmt: skip
RUNS = {
    "adapters": {"lora": True, **EVALUATED},
    "whole": {"lora": False, "optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3,
              "gradient_accumulation_steps": 2},
    "rl": {"lora": True, "policy": "tokens", "group_size": 4, "kl_weight": 0.1, "learning_rate": 0.02},
}  # fmt: skip


def make(folder, name, world, stage):
    from accelerate.state import AcceleratorState

    options = {**COMMON, **RUNS[name], "per_device_train_batch_size": ROWS // world}
    if world > 1:
        os.environ["DS_ACCELERATOR"] = "cpu"
        AcceleratorState._reset_state()  # a run a process is what it expects
        options["deepspeed"] = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    torch.manual_seed(0)
    model, processor = trainable("sid")
    if name == "rl":
        wake(model)  # rewards that differ by rounding alone would be normalised
    if options.pop("lora"):
        model = add_lora(model, LoraSettings(2, 4.0), own_tokens(processor))
        with torch.no_grad():  # at zero the adapters would not reach the first step
            for name_, parameter in model.named_parameters():
                if "lora_B" in name_:
                    parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name_)))
    if name == "rl":
        return grpo_trainer(folder, model=model, processor=processor, **options)
    return sft_trainer(folder, model, processor, **options)


def ended(trainer, folder, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train and save; what was logged, and the weights of the folder."""
    trainer.train(resume)
    if trainer.args.deepspeed and trainer.args.deepspeed["zero_optimization"]["stage"] == 3:
        assert any(p.numel() == 0 for p in trainer.model.parameters())
    trainer.save_model(folder)
    if dist.is_initialized():
        dist.barrier()
    log = trainer.state.log_history
    found = {f"loss {line['step']}": torch.tensor(line["loss"]) for line in log if "loss" in line}
    found |= {f"norm {line['step']}": torch.tensor(line["grad_norm"]) for line in log if "loss" in line}
    found |= {f"ndcg {line['step']}": torch.tensor(line["eval_ndcg@10"]) for line in log if "eval_ndcg@10" in line}
    (file,) = (p for p in Path(folder).glob("*model.safetensors"))
    return found | load_file(file)


def runs(rank: int, world: int, path: str, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name in RUNS:
        folder = f"{path}/{name}-{world}"
        found[name] = ended(make(folder, name, world, stage), folder)
    if world > 1:
        folder = f"{path}/adapters-{world}"
        if rank == 0:
            shutil.rmtree(f"{folder}/checkpoint-{STEPS}")
        dist.barrier()
        trainer = make(folder, "adapters", world, stage)
        found["continued"] = ended(trainer, folder, resume=True)
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_train_as_one_process_does(tmp_path, stage):
    pytest.importorskip("peft")
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    one = runs(0, 1, str(tmp_path), stage)
    for found in in_processes(runs, 2, tmp_path, 2, str(tmp_path), stage):
        for name, value in found["adapters"].items():  # the bits of a run that nothing happened to
            assert torch.equal(found["continued"][name], value), name
        for run, expected in one.items():
            assert found[run].keys() == expected.keys()
            for name, value in expected.items():
                rl = run == "rl" and name.startswith(("loss", "norm"))  # of advantages, in which rounding is enlarged
                torch.testing.assert_close(
                    found[run][name],
                    value,
                    rtol=1e-3 if rl else 0,
                    atol=2e-5,
                    msg=lambda text, at=(run, name): f"{at}: {text}",
                )


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, {}, "expected zero_optimization.stage 2 or 3, got 1"),
        ({}, {}, "expected zero_optimization.stage 2 or 3, got None"),
        ("[1]", {}, "expected a JSON object, or the name of a file with one, got"),
        ("no/such.json", {}, "expected a JSON object, or the name of a file with one, got"),
        ({"zero_optimization": {"stage": 3, "offload_param": {}}}, {}, "got zero_optimization.offload_param"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', {}, "got optimizer"),
        ({"zero_optimization": {"stage": 2}}, {"bf16": True}, "expected none with bf16 True, got ZeRO-2"),
        ({"zero_optimization": {"stage": 2}}, {"optim": "adafactor"}, "optim: expected one of adamw_torch"),
        ({"zero_optimization": {"stage": 3}}, {"prompt_cache": "memory"}, "prompt_cache: expected none with ZeRO-3"),
    ],
)  # fmt: skip
def test_what_was_not_compared_is_refused(tmp_path, given, options, said):
    with pytest.raises(ValueError, match=r"^(deepspeed|optim|prompt_cache): expected ") as error:
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=given, **options)
    assert said in str(error.value)


def test_without_the_package_or_a_launcher_it_says_so(tmp_path, monkeypatch):
    given = {"zero_optimization": {"stage": 2}}
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"pip install deepspeed|one without RANK"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=given)
    monkeypatch.setattr(sys.modules["importlib.util"], "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^deepspeed: expected the package deepspeed, got none; pip install"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=given)


def test_accelerates_own_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ValueError, match=r"^deepspeed: expected a file of DeepSpeed's as --deepspeed, got accelerate's"
    ):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True)
