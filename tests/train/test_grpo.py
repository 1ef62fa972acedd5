"""The surrogate, rewards, noise, and the trainer of latent GRPO."""

import copy
import math

import numpy as np
import pytest
import torch

import flr
from bench.baselines import two_pass
from flr.data import EpochSampler, InteractionDataset
from flr.decode import CatalogueTrie, beam_search, score_all_items
from flr.decode.group import group_ranks
from flr.group_forward import GroupInputs
from flr.train import RewardInputs, Rewards
from flr.train.grpo import GroupCollator, RepeatedBlocks
from flr.train.surrogate import clipped_surrogate, ranking_reward
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case
from tests.helpers.models import HIDDEN, trainable
from tests.helpers.training import grpo_config, grpo_trainer


def batch_of(train, users=range(16)):
    rows = InteractionDataset(DATA.train)
    return train._batch([rows[(0, i)] for i in users])


# --- surrogate and rewards


def test_surrogate_on_policy_is_the_advantage_weighted_gradient():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    loss = clipped_surrogate(logprobs, logprobs.detach(), mask, advantages).loss
    torch.testing.assert_close(loss, -advantages.mean(1))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    expected = -advantages[..., None] * (mask / mask.sum(1, keepdim=True))[:, None] / 4
    torch.testing.assert_close(gradient, expected)


def test_clip_by_hand():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.25, 2.0])
    for sign, kept in ((1.0, [0.5, 0.9, 1.0, 1.25, 1.3]), (-1.0, [0.8, 0.9, 1.0, 1.25, 2.0])):
        now = ratio.log()[None, None].requires_grad_()
        out = clipped_surrogate(now, torch.zeros(1, 1, 5), None, torch.tensor([[sign]]), low=0.2, high=0.3)
        torch.testing.assert_close(out.loss, -sign * torch.tensor([kept]).mean(1))
        torch.testing.assert_close(out.clipped, torch.tensor([0.2]))
        (gradient,) = torch.autograd.grad(out.loss.sum(), now)
        assert (gradient[0, 0] == 0).sum() == 1


def inputs_of(ranks=None):
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(2, 3, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    logprobs = logprobs * mask[:, None]
    return RewardInputs(
        logprobs, mask, torch.zeros(2, 4).long(), torch.zeros(2, 3, 1, 8), {}, torch.zeros(2).long(), lambda: ranks
    )


def test_rewards_are_weighted_sums():
    ranks = torch.tensor([[1, 2, 0], [11, 10, 3]])
    given = inputs_of(ranks)
    mean = given.logprobs.sum(-1) / given.target_mask.sum(1)[:, None]
    torch.testing.assert_close(Rewards.parse("neg_perplexity").of(given), -(-mean).exp())
    ndcg = torch.tensor([[1, 1 / math.log2(3), 0], [0, 1 / math.log2(11), 0.5]])
    hit = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    mrr = torch.tensor([[1, 0.5, 0], [1 / 11, 0.1, 1 / 3]])
    found = Rewards.parse("log_likelihood=2, ndcg@10=0.5, hit@9=3,mrr").of(given)
    torch.testing.assert_close(found, 2 * mean + 0.5 * ndcg + 3 * hit + mrr)
    own = Rewards({"log_likelihood": 1.0, lambda x: x.logprobs[..., 0]: -1.0})
    torch.testing.assert_close(own.of(given), mean - given.logprobs[..., 0])
    assert ranking_reward(torch.zeros(2).long(), "mrr").tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"reward: expected \[2, 3\] of a function"):
        Rewards({lambda x: x.logprobs: 1.0}).of(given)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "latentr3"])
def test_advantages_of_a_likelihood_and_of_a_sum_agree(kind):
    given = inputs_of()
    fused = Rewards.parse("neg_perplexity").advantages(given, kind, 1e-4)
    half = Rewards({"neg_perplexity": 0.5})
    summed = Rewards({**half.terms, half.of: 1.0})
    other = summed.advantages(given, kind, 1e-4)
    for a, b in zip(fused, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_latentr3_from_the_groups_own_clean_member():
    given = inputs_of()
    rewards = Rewards.parse("log_likelihood")
    r = rewards.of(given)
    published = rewards.advantages(given, "latentr3", 1e-4)
    centred = r - r[:, 0].mean()
    torch.testing.assert_close(published.advantages, centred / (centred.norm() + 1e-4))
    own = rewards.advantages(given, "latentr3", 1e-4, from_clean=True)
    centred = r - r[:, :1]
    torch.testing.assert_close(own.advantages, centred / (centred.norm() + 1e-4))
    assert own.advantages[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(own.rewards, r)
    torch.testing.assert_close(own.mean, r.mean(1))


@pytest.mark.parametrize("text", ["accuracy", "ndcg", "hit@0", "ndcg@x", "log_likelihood=much", ""])
def test_unknown_rewards_are_refused(text):
    with pytest.raises(ValueError, match="reward: expected"):
        Rewards.parse(text)
    with pytest.raises(ValueError, match="reward: expected at least one"):
        Rewards({})


# --- the policy of thoughts


@pytest.mark.parametrize("thoughts", [1, 2])
def test_thought_log_probabilities_by_hand(thoughts):
    model, prompts, group = group_case("phi", thoughts=thoughts)
    tokens = model(**prompts, group=group)
    group.policy = "thoughts"
    out = model(**prompts, group=group)
    torch.testing.assert_close(out.logprobs, tokens.logprobs)
    assert not out.logprobs.requires_grad
    actions, sigma = out.actions
    assert actions.shape == (3, 4, thoughts, HIDDEN)
    # -‖σ ε‖² / 2σ², whatever the thought
    expected = -group.noise.square().sum(-1) / 2
    torch.testing.assert_close(out.thought_logprobs, expected)
    # gradient (ε / σ) dr: of the first thought, which is shared
    weights = torch.randn(3, 4, dtype=torch.float64)
    mine = gradients_of(model, (weights * out.thought_logprobs[..., 0]).sum())
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    positions = (prompts["attention_mask"].cumsum(1) - 1).clamp_min(0)
    hidden = model.model(
        inputs_embeds=embeds, attention_mask=prompts["attention_mask"], position_ids=positions
    ).last_hidden_state[:, :12]
    r = model.flr(hidden, prompts["attention_mask"][:, :12].bool(), 11).thought
    direction = (weights[..., None] * group.noise[:, :, 0] / sigma[:, :, :1]).sum(1)
    assert_same_gradients(mine, gradients_of(model, (direction * r).sum()), 1e-12)


def test_given_actions_are_scored_without_the_targets():
    model, prompts, group = group_case("qwen2", thoughts=2)
    group.policy = "thoughts"
    first = model(**prompts, group=group)
    group.actions = first.actions
    again = model(**prompts, group=group)
    assert again.logprobs is None
    torch.testing.assert_close(again.thought_logprobs, first.thought_logprobs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.flr.output.add_(0.01 * torch.randn_like(model.flr.output))
    moved = model(**prompts, group=group).thought_logprobs
    assert (moved - first.thought_logprobs).abs().max() > 1e-3


def test_given_thoughts_take_the_place_of_the_reasoners():
    model, prompts, group = group_case("mistral", torch.float32, thoughts=2)
    out = model(**prompts, group=group)
    for member in (0, 3):
        ids = torch.cat([prompts["input_ids"], group.targets], 1)
        mask = torch.cat([prompts["attention_mask"], group.target_mask.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, thoughts=out.thoughts[:, member]
        ).logits
        logp = logits[:, 13:-1].log_softmax(-1).gather(-1, group.targets[..., None])[..., 0]
        torch.testing.assert_close(
            logp.masked_fill(~group.target_mask, 0), out.logprobs[:, member], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"thoughts: expected \[3, 2, D\]"):
        model(**prompts, thoughts=out.thoughts[:, 0, :1])


# --- noise and batches


def test_noise_depends_on_seed_epoch_and_row_alone():
    _, processor = trainable("sid", num_thoughts=2)
    collate = GroupCollator(processor, 4, 32, seed=1)
    rows = InteractionDataset(DATA.train)
    whole = collate([rows[(2, i)] for i in (5, 9, 11)])
    alone = collate([rows[(2, 9)]])
    assert whole["noise"].shape == (3, 4, 2, 32)
    assert torch.equal(whole["noise"][1], alone["noise"][0])
    assert not whole["noise"][:, 0].any()
    others = [collate([rows[(3, 9)]]), GroupCollator(processor, 4, 32, seed=2)([rows[(2, 9)]]), collate([rows[(2, 8)]])]
    for other in others:
        assert abs(float((other["noise"][0, 1:] * alone["noise"][0, 1:]).mean())) < 0.3
    drawn = torch.cat([collate([rows[(e, i)] for i in range(20)])["noise"][:, 1:].flatten() for e in range(4)])
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    tokens = [processor.item_codec.encode(rows[i].target) for i in (5, 9, 11)]
    for b, sequence in enumerate(tokens):
        assert whole["targets"][b][whole["target_mask"][b]].tolist() == list(sequence)


def test_blocks_are_repeated():
    sampler = RepeatedBlocks(EpochSampler(11, seed=0), block=4, times=3)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 24
    assert rows[:4] == rows[4:8] == rows[8:12] != rows[12:16]
    sampler.set_epoch(1)
    assert all(epoch == 1 for epoch, _ in sampler)


# --- the trainer


@pytest.mark.parametrize("policy", ["thoughts", "tokens"])
@pytest.mark.parametrize("kind", ["grpo", "latentr3"])
def test_loss_is_that_of_the_definition(tmp_path, policy, kind):
    model, processor = trainable("sid")
    train = grpo_trainer(
        tmp_path, model=model.double(), processor=processor, policy=policy, advantage=kind, advantage_epsilon=1e-4, reward="neg_perplexity",
        advantage_from_clean=False, kl_weight=0.1, regularise=True,
    )  # fmt: skip
    with torch.no_grad():
        train.reference.output.mul_(0.9)
    batch = batch_of(train)
    loss = train.compute_loss(train.model, dict(batch), num_items_in_batch=torch.tensor(32))
    gradients = gradients_of(train.model, loss)
    group = GroupInputs(batch["targets"], batch["target_mask"], batch["noise"], 0.3, policy=policy)
    group.reference = train.reference
    names = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")
    out = train.model(**{k: batch[k] for k in names}, group=group)
    _, advantages = two_pass.group_loss(out.logprobs, batch["target_mask"], kind)
    advantages = advantages * (8.0 if kind == "latentr3" else 1.0)  # √(16 · 4)
    weight = batch["target_mask"][:, None] / batch["target_mask"].sum(1)[:, None, None]
    logp = (out.logprobs * weight).sum(-1) if policy == "tokens" else out.thought_logprobs.mean(-1)
    users = -(advantages * logp).mean(1) + 0.1 * out.kl + out.regularisers
    assert_same_gradients(gradients, gradients_of(train.model, users.sum() / 32), 1e-5)
    value = (-advantages.mean(1) + 0.1 * out.kl + out.regularisers).sum() / 32
    torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-6)


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
    train = grpo_trainer(tmp_path, codec, reward_beams=40, noise_scale=3.0)
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
    train = grpo_trainer(tmp_path, model=model.double(), processor=processor, reward_beams=beams, noise_scale=3.0)
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


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi", "mistral"])
def test_group_ranks_of_families(family, scoring):
    """Items of one to five tokens behind prompts of different lengths: members finish at different steps."""
    model, prompts, group = group_case(family, thoughts=2)
    generator = np.random.default_rng(0)
    items = {tuple(generator.integers(3, 9, n)) for n in generator.integers(1, 5, 60)}
    items = [(*item, 9) for item in sorted(items)]  # none begins another
    trie = CatalogueTrie.from_sequences(np.concatenate(items), np.cumsum([0, *map(len, items)]))
    group.decodable = True
    out = model(**prompts, group=group)
    if family == "mistral":  # its window is shorter than prompt, thoughts and item
        assert group_ranks(model, out.prompts, trie, torch.zeros(3).long(), 15, scoring) is None
        return
    rows = {name: x.repeat_interleave(4, 0) for name, x in prompts.items()}
    rows["thoughts"] = out.thoughts.flatten(0, 1)
    lists = beam_search(model, rows, trie, 15, 15, scoring).items.view(3, 4, 15)
    for member, place in [(0, 0), (1, 4), (2, 9), (3, 14)]:
        targets = lists[:, member, place]
        ranks = group_ranks(model, out.prompts, trie, targets, 15, scoring)
        hits = lists == targets[:, None, None]
        assert torch.equal(ranks, (hits * torch.arange(1, 16)).amax(-1))
        assert (ranks[:, member] == place + 1).all()


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


def test_target_logprob_is_the_supervised_loss(tmp_path):
    train = grpo_trainer(tmp_path, "sid", per_device_eval_batch_size=7)
    found = train.target_logprobs(DATA.valid)
    again = grpo_trainer(tmp_path, "sid").target_logprobs(DATA.valid)
    assert found == pytest.approx(again, rel=1e-5)
    total = 0.0
    for row in (DATA.valid[i] for i in range(len(DATA.valid))):
        inputs = train.processor([row.history])
        del inputs["item_positions"]
        tokens = torch.tensor([train.processor.item_codec.encode(row.target)])
        ids = torch.cat([inputs["input_ids"], tokens], 1)
        logp = train.model(
            input_ids=ids, reasoner_mask=torch.nn.functional.pad(inputs["reasoner_mask"], (0, tokens.shape[1]))
        )
        logp = logp.logits[:, -tokens.shape[1] - 1 : -1].log_softmax(-1).gather(-1, tokens[..., None])
        total += float(logp.detach().mean())
    assert found.mean() == pytest.approx(total / len(DATA.valid), rel=1e-4)


def test_backbone_trains_when_asked(tmp_path):
    train = grpo_trainer(tmp_path, policy="tokens", train_backbone=True, learning_rate=1e-3)
    groups = train.create_optimizer().param_groups
    assert {g["lr"] for g in groups} == {1e-3, 1e-4}
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
        ({"group_size": 0}, "group_size: expected an integer >= 1, got 0"),
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
    with pytest.raises(ValueError, match="model: expected a patched model of variant flr or latentr3"):
        grpo_trainer(tmp_path, model=model, processor=processor)
    with pytest.raises(ValueError, match="train: expected at least one batch of 5000 users"):
        grpo_trainer(tmp_path, per_device_train_batch_size=5000)


def test_latentr3_variant_trains(tmp_path):
    model, processor = trainable(variant="latentr3")
    train = grpo_trainer(tmp_path, model=model, processor=processor, max_steps=2, learning_rate=1e-3)
    before = train.model.flr.value.weight.clone()
    train.train()
    assert not torch.equal(before, train.model.flr.value.weight)
    assert isinstance(flr.unpatch_model(train.model), torch.nn.Module)
    assert np.isfinite([x["reward"] for x in train.state.log_history if "reward" in x]).all()
