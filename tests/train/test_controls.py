"""The hybrid objective of latent GRPO, and what it adapts from step to step."""

import math
from types import SimpleNamespace

import pytest
import torch

from flr.data import InteractionDataset
from flr.model.outputs import GroupInputs
from flr.train import LatentGRPOConfig, Rewards
from flr.train.controls import NOISE_RANGE, RATE, Controls, user_weights
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer

NAMES = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")


def batch_of(train, users=range(16)):
    rows = InteractionDataset(DATA.train)
    return train._batch([rows[(0, i)] for i in users])


@pytest.mark.parametrize("policy", ["thoughts", "tokens"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("thoughts", [1, 2])
def test_the_objective_is_that_of_the_definition(tmp_path, policy, adaptive, thoughts):
    model, processor = trainable("sid", num_thoughts=thoughts)
    train = grpo_trainer(
        tmp_path, model=model.double(), processor=processor, policy=policy, likelihood_weight=0.25,
        likelihood_adaptive=adaptive, kl_weight=0.1, reward="log_likelihood",
    )  # fmt: skip
    batch = batch_of(train)
    loss = train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(16))
    gradients = gradients_of(train.model, loss)

    def forward(policy, noise):
        group = GroupInputs(batch["targets"], batch["target_mask"], noise, 0.3, policy=policy)
        group.reference = train.reference
        return train.model(**{k: batch[k] for k in NAMES}, group=group)

    out = forward(policy, batch["noise"])
    clean = forward("tokens", batch["noise"][:, :1]).logprobs[:, 0]  # by itself, and with gradients
    tokens = batch["target_mask"].sum(1)
    rollout = train._rollouts[0]
    spread = rollout.rewards.std(1, unbiased=False)
    weights = 1 - 0.75 * (spread / spread.mean()).clamp(max=1) if adaptive else torch.full_like(spread, 0.25)
    assert not adaptive or weights.unique().numel() > 3
    ratio = out.thought_logprobs if policy == "thoughts" else out.logprobs
    count = thoughts if policy == "thoughts" else tokens[:, None]
    gained = (rollout.advantages * ratio.sum(-1) / count).mean(1)
    users = -(1 - weights) * gained - weights * clean.sum(-1) / tokens + 0.1 * out.kl
    assert_same_gradients(gradients, gradients_of(train.model, users.mean()), 1e-5)


def test_the_likelihood_reaches_the_unperturbed_member_alone(tmp_path):
    train = grpo_trainer(tmp_path, "sid")
    batch = batch_of(train)
    group = GroupInputs(batch["targets"], batch["target_mask"], batch["noise"], 0.3, policy="thoughts", likelihood=True)
    out = train.model.eval()(**{k: batch[k] for k in NAMES}, group=group)
    assert gradients_of(train.model, out.logprobs[:, 0].sum())["flr.output"].norm() > 0
    out = train.model(**{k: batch[k] for k in NAMES}, group=group)
    others = gradients_of(train.model, out.logprobs[:, 1:].sum())
    assert max(float(x.abs().max()) for x in others.values()) == 0


def test_likelihood_alone_is_supervised_learning_of_the_thought(tmp_path):
    train = grpo_trainer(tmp_path, likelihood_weight=1.0, learning_rate=3e-3, num_train_epochs=6)
    before = train.target_logprobs(DATA.train).mean()
    train.train()
    assert train.target_logprobs(DATA.train).mean() > before + 0.02


def test_a_user_without_spread_is_left_to_the_likelihood():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert user_weights(rewards, 0.1, True, torch.mean)[0] == 1
    assert user_weights(rewards[:1], 0.1, True, torch.mean).tolist() == [1.0]  # nobody has any
    assert user_weights(rewards, 0.1, False, torch.mean).tolist() == pytest.approx([0.1, 0.1])


def controls(**targets) -> Controls:
    return Controls(0.5, 0.3, targets.get("kl"), targets.get("noise"), lambda x: x)


def step(adapted: Controls, kl: float, differing: int) -> None:
    rewards = torch.zeros(4, 2)
    rewards[:differing, 1] = 1
    adapted.observe(torch.full((4,), kl), rewards)
    adapted.on_step_end(None, None, None)


def test_the_weight_of_the_kl_follows_a_dual_step():
    adapted = controls(kl=0.1)
    step(adapted, 0.15, 0)
    assert float(adapted.values["kl_weight"]) == pytest.approx(0.5 * math.exp(RATE * 0.5))
    step(adapted, 0.1, 0)
    assert float(adapted.values["kl_weight"]) == pytest.approx(0.5 * math.exp(RATE * 0.5))
    step(adapted, 1e9, 0)  # a step is bounded
    assert float(adapted.values["kl_weight"]) == pytest.approx(0.5 * math.exp(RATE * 1.5))
    assert adapted.on("noise_scale", torch.device("cpu")) == 0.3


def test_the_noise_grows_until_enough_users_differ_and_stays_in_its_range():
    adapted = controls(noise=0.5)
    step(adapted, 0.0, 1)
    assert float(adapted.values["noise_scale"]) == pytest.approx(0.3 * math.exp(RATE * 0.5))
    for _ in range(100):
        step(adapted, 0.0, 0)
    assert float(adapted.values["noise_scale"]) == pytest.approx(0.3 * NOISE_RANGE)
    step(adapted, 0.0, 4)
    assert float(adapted.values["noise_scale"]) < 0.3 * NOISE_RANGE


def test_a_step_without_new_rewards_adapts_nothing():
    adapted = controls(kl=0.1)
    adapted.on_step_end(None, None, None)
    assert float(adapted.values["kl_weight"]) == 0.5


def test_values_go_on_from_a_checkpoint():
    adapted = controls(kl=0.1)
    step(adapted, 0.2, 0)
    other = controls(kl=0.1)
    other.on_train_begin(None, SimpleNamespace(stateful_callbacks={"Controls": adapted.state()}), None)
    assert other.values["kl_weight"] == adapted.values["kl_weight"]


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    options = {
        "likelihood_weight": 0.2, "likelihood_adaptive": True, "kl_weight": 0.1, "kl_target": 1e-3,
        "reward": "log_likelihood=1,ndcg@3=1", "noise_target": 0.9, "reward_beams": 4, "learning_rate": 1e-2,
        "max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None,
    }  # fmt: skip
    whole = grpo_trainer(tmp_path / "a", **options)
    whole.train()
    again = grpo_trainer(tmp_path / "a", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    lines = [[x for x in t.state.log_history if "kl_weight" in x][2:4] for t in (whole, again)]
    for name in ("kl_weight", "noise_scale", "loss", "likelihood_weight"):
        assert [x[name] for x in lines[0]] == [x[name] for x in lines[1]]
    assert lines[0][0]["kl_weight"] != lines[0][1]["kl_weight"] != 0.1
    assert lines[0][1]["noise_scale"] != 0.3
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, dict(again.model.named_parameters())[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood_weight": 1.5}, r"likelihood_weight: expected a number in \[0, 1\], got 1.5"),
        ({"kl_target": 0.0, "kl_weight": 1.0}, "kl_target: expected None or a positive number, got 0.0"),
        ({"kl_target": 0.1}, "kl_weight: expected a positive number to begin from with kl_target, got 0.0"),
        ({"noise_target": 1.0}, "noise_target: expected None or a number in \\(0, 1\\), got 1.0"),
        ({"likelihood_weight": 0.5, "num_iterations": 2}, "num_iterations: expected 1 with a likelihood beside"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LatentGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_a_share_of_users_is_refused_where_every_reward_differs(tmp_path):
    with pytest.raises(ValueError, match="noise_target: expected None with likelihoods"):
        grpo_trainer(tmp_path, noise_target=0.5)
    grpo_trainer(tmp_path, noise_target=0.5, rewards=Rewards({"mrr": 1.0}))
