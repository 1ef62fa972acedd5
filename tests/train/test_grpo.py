"""The trainer of latent GRPO."""

import copy
import math

import numpy as np
import pytest
import torch

import flr
from bench.baselines import two_pass
from flr.data import InteractionDataset
from flr.decode import score_all_items
from flr.model.outputs import GroupInputs
from flr.train import Rewards
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.models import trainable
from tests.helpers.training import grpo_config, grpo_trainer


def batch_of(train, users=range(16)):
    rows = InteractionDataset(DATA.train)
    return train._batch([rows[(0, i)] for i in users])


@pytest.mark.parametrize("policy", ["thoughts", "tokens"])
@pytest.mark.parametrize("kind", ["grpo", "latentr3"])
def test_loss_is_that_of_the_definition(tmp_path, policy, kind):
    """On titles, whose targets differ in length; the reference is the reasoner as it was given."""
    model, processor = trainable("title", uneven=True)
    given, relative = copy.deepcopy(model.double().flr), kind == "grpo"
    train = grpo_trainer(
        tmp_path, model=model, processor=processor, policy=policy, advantage=kind,
        advantage_epsilon=0.05, reward="neg_perplexity", noise_relative=relative,
        kl_weight=0.1, regularise=True, **({} if kind == "grpo" else {"advantage_from_clean": False}),
    )  # fmt: skip
    with torch.no_grad():
        model.flr.output.mul_(1.1)
    batch = batch_of(train)
    assert batch["target_mask"].sum(1).unique().numel() > 1
    loss = train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(32))
    gradients = gradients_of(train.model, loss)
    group = GroupInputs(
        batch["targets"], batch["target_mask"], batch["noise"], 0.3, relative, policy=policy, reference=given
    )
    names = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")
    out = train.model(**{k: batch[k] for k in names}, group=group)
    _, advantages = two_pass.group_loss(out.logprobs, batch["target_mask"], kind, 0.05)
    advantages = advantages * (8.0 if kind == "latentr3" else 1.0)  # √(16 · 4)
    weight = batch["target_mask"][:, None] / batch["target_mask"].sum(1)[:, None, None]
    logp = (out.logprobs * weight).sum(-1) if policy == "tokens" else out.thought_logprobs.mean(-1)
    users = -(advantages * logp).mean(1) + 0.1 * out.kl + out.regularisers
    assert_same_gradients(gradients, gradients_of(train.model, users.sum() / 32), 1e-5)
    value = (-advantages.mean(1) + 0.1 * out.kl + out.regularisers).sum() / 32
    torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-6)
    assert (out.kl > 0).all()


def test_nothing_but_the_noise_is_left_to_chance(tmp_path):
    train = grpo_trainer(tmp_path, policy="tokens")
    train.model.model.layers[0].self_attn.attention_dropout = 0.5
    losses = [
        train.compute_loss(train.model.train(), batch_of(train), num_items_in_batch=torch.tensor(16)) for _ in range(2)
    ]
    assert losses[0] == losses[1]


def test_a_step_goes_by_what_was_adapted(tmp_path):
    train = grpo_trainer(tmp_path, reward="mrr", noise_target=0.5, kl_weight=0.1, kl_target=1.0, noise_relative=False)
    train.controls.values = {"noise_scale": torch.tensor(0.05), "kl_weight": torch.tensor(3.0)}
    with torch.no_grad():
        train.model.flr.output.mul_(1.1)
    loss = train.compute_loss(train.model, batch_of(train), num_items_in_batch=torch.tensor(16))
    rollout = train._rollouts[0]
    torch.testing.assert_close(rollout.actions[1], torch.full_like(rollout.actions[1], 0.05))
    kl = train._sums["kl"][0]
    expected = (-rollout.advantages.mean(1).sum() + 3.0 * kl) / 16
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_later_iteration_clips_at_either_bound(tmp_path):
    train = grpo_trainer(tmp_path, policy="tokens", num_iterations=2, epsilon_low=0.001, epsilon_high=0.01)
    batch = batch_of(train)
    train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(16))
    rollout = train._rollouts[0]
    with torch.no_grad():
        train.model.flr.output.mul_(1.5)
    train.state.global_step, train._micro_batch = 1, 0
    loss = train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(16))
    group = GroupInputs(batch["targets"], batch["target_mask"], batch["noise"], 0.3)
    names = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")
    ratio = (train.model(**{k: batch[k] for k in names}, group=group).logprobs[..., 0] - rollout.old[..., 0]).exp()
    a = rollout.advantages
    kept = torch.where(a > 0, ratio.clamp(max=1.01), ratio.clamp(min=0.999))
    assert (ratio[a > 0] > 1.01).any()
    assert (ratio[a < 0] < 0.999).any()
    torch.testing.assert_close(loss, -(kept * a).mean(), rtol=1e-5, atol=1e-6)


def test_it_learns_what_is_rewarded(tmp_path):
    train = grpo_trainer(tmp_path, learning_rate=3e-3, num_train_epochs=6, noise_scale=0.5, group_size=16)
    before = train.target_logprobs(DATA.train).mean()
    backbone = {n: p.clone() for n, p in train.model.named_parameters() if not n.startswith("flr.")}
    train.train()
    assert train.target_logprobs(DATA.train).mean() > before + 0.02
    assert all(torch.equal(p, backbone[n]) for n, p in train.model.named_parameters() if n in backbone)
    assert not any(p.requires_grad for n, p in train.model.named_parameters() if n in backbone)


def test_a_reward_of_ones_own(tmp_path):
    """Short thoughts are rewarded, and the thought's norm falls."""
    short = Rewards({lambda x: -x.thoughts.norm(dim=-1).sum(-1): 1.0})
    model, processor = trainable(anchor="none", init_scale=1.0)
    train = grpo_trainer(
        tmp_path,
        rewards=short,
        model=model,
        processor=processor,
        learning_rate=1e-2,
        num_train_epochs=3,
        logging_steps=1,
    )
    train.train()
    norms = [x["thought_norm"] for x in train.state.log_history if "thought_norm" in x]
    assert norms[-1] < 0.9 * norms[0]


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_ranks_are_those_of_the_catalogue(tmp_path, codec):
    train = grpo_trainer(tmp_path, codec, reward="mrr", reward_beams=40, noise_scale=3.0)
    batch = batch_of(train)
    names = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")
    prompts = {k: batch[k] for k in names}
    group = GroupInputs(batch["targets"], batch["target_mask"], batch["noise"], 3.0)
    with torch.no_grad():
        out = train.model.eval()(**prompts, group=group)
        ranks = train._ranks(train.model, prompts, batch["items"], out)
        for member in range(4):
            scores = score_all_items(
                train.model, {**prompts, "thoughts": out.thoughts[:, member]}, train.processor.item_codec
            )
            own = scores.gather(1, batch["items"][:, None])
            close = (scores - own).abs() < 1e-4
            better, tied = (scores > own + 1e-4).sum(1), close.sum(1)
            assert ((ranks[:, member] > better) & (ranks[:, member] <= better + tied)).all()
    assert len(ranks.unique()) > 3
    train.rewards = Rewards.parse("mrr")
    loss = train.compute_loss(train.model, batch, num_items_in_batch=torch.tensor(16))
    assert gradients_of(train.model, loss)["flr.output"].norm() > 0


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize(("codec", "thoughts", "beams"), [("id", 1, 9), ("sid", 2, 9), ("title", 1, 12)])
def test_ranks_behind_one_prompt_equal_those_of_repeated_prompts(tmp_path, codec, thoughts, beams, scoring):
    model, processor = trainable(codec, num_thoughts=thoughts)
    processor.scoring = scoring
    train = grpo_trainer(
        tmp_path, model=model.double(), processor=processor, reward="mrr", reward_beams=beams, noise_scale=3.0
    )
    batch = batch_of(train)
    prompts = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "reasoner_mask")}
    group = GroupInputs(batch["targets"], batch["target_mask"], batch["noise"], 3.0, decodable=True)
    out = train.model.eval()(**prompts, group=group)
    cells = []  # tokens that the backbone works on, call by call
    train.model.model.layers[0].register_forward_pre_hook(lambda _, x: cells.append(x[0].shape[:2].numel()))
    shared = train._ranks(train.model, prompts, batch["items"], out)
    ours, cells[:] = list(cells), []
    out.prompts = None
    repeated = train._ranks(train.model, prompts, batch["items"], out)
    assert torch.equal(shared, repeated)
    assert len(shared.unique()) > 3
    assert (shared == 0).any() or codec == "id"
    prefill = 16 * 4 * prompts["input_ids"].shape[1]
    assert sum(cells[: 1 + thoughts]) == prefill
    assert sum(ours) <= sum(cells) - prefill if thoughts == 1 else sum(ours) < sum(cells)
    assert not ours or codec != "id"


@pytest.mark.parametrize("reward", ["hit@40", "hit@100000"])
def test_beams_are_as_many_as_the_places_that_are_rewarded(tmp_path, reward):
    """Of 40 items each is among the first 40, however few beams were asked for."""
    train = grpo_trainer(tmp_path, "sid", reward=reward, reward_beams=2, max_steps=1, logging_steps=1)
    train.train()
    assert next(x["reward"] for x in train.state.log_history if "reward" in x) == 1


@pytest.mark.parametrize("policy", ["thoughts", "tokens"])
def test_iterations_on_a_batch(tmp_path, policy):
    """The second step on a batch has the first one's rewards, and a ratio that has moved."""
    train = grpo_trainer(
        tmp_path, policy=policy, num_iterations=3, learning_rate=1e-2, logging_steps=1, gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
    )  # fmt: skip
    seen = []
    roll_out = train._roll_out
    train._roll_out = lambda *args: (seen.append(train.state.global_step), roll_out(*args))
    train.train()
    steps = train.state.global_step
    assert steps == len(DATA.train) // 16 * 3
    assert seen == [s for s in range(0, steps, 3) for _ in range(2)]
    lines = [x for x in train.state.log_history if "clip_fraction" in x]
    clipped = [x["clip_fraction"] for x in lines]
    assert all(x == 0 for x in clipped[::3])
    assert max(clipped) > 0
    assert all(("reward" in x) == (i % 3 == 0) for i, x in enumerate(lines))


def test_what_is_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = grpo_trainer(tmp_path, logging_steps=2, report_to="tensorboard", eval_strategy="epoch", num_train_epochs=1)
    train.train()
    (folder,) = {f.parent for f in tmp_path.rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    names = "loss reward reward_std reward_clean advantage_min advantage_max clip_fraction kl thought_norm gate_entropy"
    assert {f"train/{name}" for name in names.split()} <= tags
    assert {"eval/target_logprob", "eval/ndcg@10"} <= tags
    value = {name: events.Scalars(f"train/{name}")[0].value for name in names.split()}
    assert value["advantage_min"] < 0 < value["advantage_max"]
    assert value["reward"] < 0 < value["reward_std"]
    assert 0 < value["gate_entropy"] <= math.log(4) + 1e-6
    assert value["kl"] >= 0


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_target_logprob_is_that_of_each_row(tmp_path, scoring):
    model, processor = trainable("title", uneven=True)
    processor.scoring = scoring
    train = grpo_trainer(tmp_path, model=model, processor=processor, per_device_eval_batch_size=7)
    found = train.target_logprobs(DATA.valid)
    expected = []
    for row in (DATA.valid[i] for i in range(len(DATA.valid))):
        inputs = processor([row.history])
        del inputs["item_positions"]
        score = score_all_items(model, inputs, processor.item_codec, scoring)[0, row.target]
        expected.append(float(score) / len(processor.item_codec.encode(row.target)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_backbone_trains_when_asked(tmp_path):
    train = grpo_trainer(tmp_path, policy="tokens", train_backbone=True, learning_rate=1e-3, weight_decay=0.1)
    groups = train.create_optimizer().param_groups
    assert {g["lr"] for g in groups} == {1e-3, 1e-4}
    norm = train.model.model.layers[0].input_layernorm.weight
    (own,) = (g for g in groups if any(p is norm for p in g["params"]))
    assert own["weight_decay"] == 0
    assert {g["weight_decay"] for g in groups if g is not own} == {0.1}
    before = train.model.model.layers[0].mlp.up_proj.weight.clone()
    train.train()
    assert not torch.equal(before, train.model.model.layers[0].mlp.up_proj.weight)


def test_reasoner_stays_in_float32(tmp_path):
    model, processor = trainable()
    train = grpo_trainer(tmp_path, model=model.to(torch.bfloat16), processor=processor, learning_rate=1e-5)
    before = copy.deepcopy(train.model.flr.state_dict())
    train.train()
    for name, value in train.model.flr.state_dict().items():
        assert value.dtype == torch.float32
        if name != "query":  # starts at 0, where the gradient of the others does not move it by as much
            assert (value != before[name]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "beams"}, "policy: expected one of thoughts, tokens"),
        ({"advantage": "ppo"}, "advantage: expected one of grpo"),
        ({"group_size": 1}, "group_size: expected an integer >= 2, got 1"),  # nothing to compare a thought with
        ({"noise_scale": 0.0}, "noise_scale: expected a positive number"),
        ({"epsilon_low": -0.1}, "epsilon_low: expected a number >= 0"),
        ({"train_backbone": True}, "train_backbone: expected policy tokens"),
        (
            {"train_backbone": True, "policy": "tokens", "kl_weight": 1.0},
            "train_backbone: expected policy tokens and kl",
        ),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: expected False"),
        ({"reward": "accuracy"}, "reward: expected neg_perplexity"),
        ({"num_iterations": 2, "save_strategy": "steps", "save_steps": 5}, "save_steps: expected a multiple of"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
    ],
)
def test_unusable_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grpo_config(tmp_path, **options)


def test_unusable_models_and_data_are_refused(tmp_path):
    model, processor = trainable(variant="anchor")
    with pytest.raises(ValueError, match="model: expected a patched model of variant flr, offsets or latentr3"):
        grpo_trainer(tmp_path, model=model, processor=processor)
    with pytest.raises(ValueError, match="train: expected at least one batch of 5000 users"):
        grpo_trainer(tmp_path, per_device_train_batch_size=5000)
    repeated = {"num_iterations": 2, "dataloader_drop_last": False}  # whole batches all the same
    with pytest.raises(ValueError, match="train: expected at least one batch of 5000 users"):
        grpo_trainer(tmp_path, per_device_train_batch_size=5000, **repeated)


def test_latentr3_variant_trains(tmp_path):
    model, processor = trainable(variant="latentr3")
    train = grpo_trainer(tmp_path, model=model, processor=processor, max_steps=2, learning_rate=1e-3)
    before = train.model.flr.value.weight.clone()
    train.train()
    assert not torch.equal(before, train.model.flr.value.weight)
    assert isinstance(flr.unpatch_model(train.model), torch.nn.Module)
    assert np.isfinite([x["reward"] for x in train.state.log_history if "reward" in x]).all()
