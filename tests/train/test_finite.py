"""Numbers that are not finite end a run with the row they come from, and reach no weight and no disk."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

from flr.cli import main
from flr.model.backbone import fixed_shapes
from flr.train import Rewards
from tests.helpers.catalogues import DATA
from tests.helpers.models import tiny_llama, trainable
from tests.helpers.training import grpo_trainer, sft_trainer
from tests.helpers.waits import HostWaits

ITEM = int(DATA.train[5].history[-1])


def assert_unchanged(model, before):
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)


def test_a_loss_that_is_not_finite_names_its_row(tmp_path):
    """An item's input embedding is poisoned; the output table is another one, so that other rows' losses are finite."""
    model, processor = trainable()
    token = int(processor.item_codec.tokens[processor.item_codec.offsets[ITEM]])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    train = sft_trainer(tmp_path, model, processor, per_device_train_batch_size=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"loss: expected a finite number, got another for row.* in step \d+$"
    ) as error:
        train.train()
    named = [int(n) for n in str(error.value).split(" of the")[0].split("row")[1].lstrip("s").split(",")]
    step = int(str(error.value).rpartition(" ")[2])
    batch = [row for _, row in list(train._get_train_sampler())[4 * (step - 1) : 4 * step]]
    assert named == [row for row in batch if ITEM in DATA.train[row].history[-10:]]
    if step == 1:
        assert_unchanged(model, before)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_row_of_many_is_found(tmp_path, accumulation):
    """A soft target's weight is NaN for one row, as a faulty table of neighbours would have it."""
    model, processor = trainable()
    train = sft_trainer(
        tmp_path, model, processor, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation
    )
    order = list(train._get_train_sampler())
    bad = order[4 * accumulation * 2 + 1][1]  # in the third step
    make = train._batch

    def poisoned(rows):
        batch = make(rows)
        weights = torch.tensor([[math.nan if row.row == bad else 0.0] for row in rows])
        return {**batch, "soft_targets": torch.zeros(len(rows), 1, dtype=torch.long), "soft_weights": weights}

    train._batch = poisoned
    with pytest.raises(ValueError, match=rf"got another for row {bad} of the training data in step 3$"):
        train.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", ["grpo", "latentr3", "dr_grpo"])
def test_a_reward_that_is_not_finite_names_its_row(tmp_path, value, advantage):
    bad = 11

    def reward(inputs):
        rewards = inputs.logprobs.sum(-1)
        rewards[inputs.items == DATA.train[bad].target, 1] = value
        return rewards

    train = grpo_trainer(tmp_path, rewards=Rewards({reward: 1.0}), advantage=advantage, num_train_epochs=9)
    before = copy.deepcopy(train.model.state_dict())
    with pytest.raises(ValueError, match="reward: expected finite numbers, got others for row") as error:
        train.train()
    numbers = [int(n) for n in str(error.value).split(" of the")[0].split("row")[1].lstrip("s").split(",")]
    assert all(DATA.train[n].target == DATA.train[bad].target for n in numbers)
    if "in step 1" in str(error.value):
        assert_unchanged(train.model, before)
    assert all(torch.isfinite(p).all() for p in train.model.parameters())


@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("make", ["sft", "rl"])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, norm, make):
    if make == "sft":
        train = sft_trainer(tmp_path, *trainable(), max_steps=3, max_grad_norm=norm)
    else:
        train = grpo_trainer(tmp_path, max_steps=3, max_grad_norm=norm)
    before = copy.deepcopy(train.model.state_dict())
    train.model.flr.key.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match=r"gradient: expected a finite norm, got .* in step 1"):
        train.train()
    assert_unchanged(train.model, before)


def test_half_precision_weights_are_not_trained(tmp_path):
    """Adam's epsilon is 0 in them: the first step would already make weights that are not finite."""
    model, processor = trainable()
    with pytest.raises(ValueError, match="model: expected float32 or bfloat16 weights to train, got float16 in "):
        sft_trainer(tmp_path, model.half(), processor)
    for name, parameter in model.named_parameters():  # what is frozen may be
        parameter.requires_grad_(name.startswith("flr."))
    model.flr.float()
    sft_trainer(tmp_path, model, processor)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, processor = trainable()
    train = sft_trainer(tmp_path, model, processor)
    with torch.no_grad():
        model.flr.key.view(-1)[3] = math.inf
    with pytest.raises(ValueError, match=r"weights: expected finite numbers to save, .* in 1 tensors .* flr\.key"):
        train.save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="weights: expected finite"):
        train._save_checkpoint(model, None)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_half_precision_folder_is_trained_in_full_precision(tmp_path, capsys, command):
    model, processor = trainable()
    if command == "sft":
        model = tiny_llama(len(processor.tokenizer), num_hidden_layers=1)
    model.half().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    DATA.save(tmp_path / "data")
    options = ["--model", tmp_path / "half", "--data", tmp_path / "data", "--output_dir", tmp_path / "run"]
    options += ["--use_cpu", "true", "--report_to", "none", "--max_steps", "2", "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false", "--learning_rate", "0.001"]
    assert main([command, *map(str, options)]) == 0
    assert "in float32" in " ".join(capsys.readouterr().err.split())
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize("make", ["sft", "rl"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_on_a_device_the_look_comes_with_the_log(tmp_path, make, fault):
    """Nothing waits in between, the error has the first bad step, and nothing is saved after it."""
    options = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if make == "sft":
        train = sft_trainer(tmp_path, *trainable(), **options)
    else:
        train = grpo_trainer(tmp_path, **options)

    def poison(module, args, output):
        return output * math.nan if train.state.global_step == 2 else output

    if fault == "loss":
        train.model.get_input_embeddings().register_forward_hook(poison)
    else:
        train.model.flr.key.register_hook(
            lambda gradient: gradient * (math.inf if train.state.global_step == 2 else 1.0)
        )
    with fixed_shapes(), pytest.raises(ValueError, match=rf"{fault}: expected a finite .* in step 3"):
        train.train()
    assert train.state.global_step == 4
    assert [x.name for x in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("make", ["sft", "rl"])
@pytest.mark.parametrize("codec", ["id", "sid"])
def test_a_step_of_a_trainer_waits_for_nothing(tmp_path, make, codec):
    options = {"max_steps": 2, "logging_steps": 9}
    if make == "sft":
        train = sft_trainer(tmp_path, *trainable(codec), **options)
        own = train._batch
        train._batch = lambda rows: {
            **own(rows),
            "thought_start": int((own(rows)["labels"] != -100).any(0).int().argmax()) - 1,
        }
    else:
        train = grpo_trainer(tmp_path, codec, **options)
    waits = HostWaits()
    for name in ("training_step", "_get_grad_norm"):
        setattr(train, name, under(waits, getattr(train, name)))
    with fixed_shapes():
        train.train()
    assert train.state.global_step == 2
    assert dict(waits.found) == {}


def under(mode, function):
    def inside(*args, **kwargs):
        with mode:
            return function(*args, **kwargs)

    return inside
